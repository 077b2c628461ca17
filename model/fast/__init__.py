"""The fast backend of ANML, sANML and OML: plain PyTorch's numbers up to rounding, several times faster.

Nobody who reads or changes the method needs any of it. A run uses it only where `model.guard` has just
found it equal to what is written; everything else runs on `model.layers` and `model.method`. Blocks become
drop-ins and features come with their derivatives (`network`, `derivatives`), the inner loop keeps the head's
steps as factors (`inner_loop`), and on CUDA a step is one graph (`cuda_graph`).
"""

from __future__ import annotations

import logging
from collections.abc import Sequence
from typing import Literal, NamedTuple

import torch

from model import method
from model.fast import cuda_graph, inner_loop
from model.fast.memory import keep_freed_memory
from model.fast.network import use_fast_layers
from model.guard import Candidate, Use, difference
from model.learner import MakeLearner
from model.meta_learner import Capture, no_capture
from model.meta_test import LEARNERS
from model.method import MetaLoss
from model.modelfactory import Network
from utils.errors import UserError

log = logging.getLogger("anml")

Backend = Literal["plain", "fast"]
BACKENDS = ("auto", "plain", "fast")
FAST = Candidate(use_fast_layers, inner_loop.meta_loss, inner_loop.inner_loop, inner_loop.adam_learner)


class Chosen(NamedTuple):
    """The backend of a run, and why it is that one."""

    name: Backend
    why: str


def choose_backend(asked: str, nets: Sequence[Network], device: torch.device, use: Use) -> Chosen:
    """Give networks of one architecture the layers of `--backend`, in place; the log says which, and why.

    Args:
        asked: `plain`, `fast`, or `auto`, which is fast where fast has just given the numbers of plain.
        nets: in evaluation mode or training mode, as they will be used.

    Raises:
        UserError: `fast` is asked for and differs, or does not know the network.
    """
    keep_freed_memory()
    if asked == "plain":
        return Chosen("plain", "as asked for")
    if device.type not in ("cpu", "cuda"):
        fault: str | None = f"the fast backend has not been tried on {device.type}"
    else:
        fault = difference(nets[0], device, use, FAST)
    if fault is None:
        for net in nets:
            use_fast_layers(net)
        chosen = Chosen("fast", "it has just given the numbers of plain in float64")
    elif asked == "fast":
        raise UserError(f"--backend fast: {fault}; --backend plain runs what is written")
    else:
        chosen = Chosen("plain", fault)
    log.info("backend %s: %s", *chosen)
    return chosen


def use_backend(net: Network, backend: Backend) -> None:
    """Give a network the layers of a backend, in place, without the comparison that runs begin with.

    Raises:
        NotImplementedError: the fast backend does not know the network.
    """
    if backend == "fast":
        use_fast_layers(net)


def learner(name: str, backend: Backend) -> MakeLearner:
    """The learner of `model.meta_test.LEARNERS` of that name, as the backend computes it."""
    return inner_loop.adam_learner if (name, backend) == ("adam", "fast") else LEARNERS[name].make


def capture(backend: Backend) -> Capture:
    """A function that may turn functions which compute with a network into faster ones."""
    return cuda_graph.capture if backend == "fast" else no_capture


def meta_loss(backend: Backend) -> MetaLoss:
    """`model.method.meta_loss`, as the backend computes it."""
    return inner_loop.meta_loss if backend == "fast" else method.meta_loss
