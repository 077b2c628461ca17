"""The fast backend of ANML, sANML and OML: plain PyTorch's numbers up to rounding, several times faster.

A run uses this backend only where `model.guard` has just found the same numbers as those of `model.layers`
and `model.method`. Conv blocks become drop-in layers (`network`) with hand-written derivatives
(`derivatives`), the head's inner steps are kept as factors (`inner_loop`), and on CUDA a step is one graph
(`cuda_graph`).
"""

import logging
from collections.abc import Sequence

import torch

from model.check import Use
from model.fast.cuda_graph import capture
from model.fast.inner_loop import adam_learner, meta_loss
from model.fast.memory import keep_freed_memory
from model.fast.network import use_fast_layers
from model.guard import PLAIN, Backend, difference
from model.modelfactory import Network
from utils.errors import UserError

log = logging.getLogger("anml")

EQUAL = "it has just given the numbers of plain in float64"
FAST = Backend("fast", use_fast_layers, meta_loss, capture, adam_learner, EQUAL)
BACKENDS = {backend.name: backend for backend in (PLAIN, FAST)}


def choose_backend(asked: str, nets: Sequence[Network], device: torch.device, use: Use) -> Backend:
    """The backend of `--backend`, whose layers the networks get in place; the log names backend and reason.

    Args:
        asked: `plain`, `fast`, or `auto`, which is fast where fast has just given the numbers of plain.
        nets: of one architecture, in the mode (evaluation or training) in which they will be used.

    Raises:
        UserError: `fast` is asked for, and gives other numbers than plain or does not support the network.
    """
    keep_freed_memory()
    if asked == "plain":
        return PLAIN
    if device.type not in ("cpu", "cuda"):
        fault: str | None = f"the fast backend has not been tried on {device.type}"
    else:
        fault = difference(nets[0], device, use, FAST)
    if fault is not None and asked == "fast":
        raise UserError(f"--backend fast: {fault}; --backend plain runs what is written")
    chosen = FAST if fault is None else PLAIN._replace(why=fault)
    for net in nets:
        chosen.prepare(net)
    log.info("backend %s: %s", chosen.name, chosen.why)
    return chosen
