"""The fast backend: the numbers of plain PyTorch up to rounding, several times faster.

On CPUs layers take the place of a network's plain ones (`layers`), and the inner loop of the networks here
keeps the head's steps as factors (`head`). On CUDA a step of these networks is one graph (`cuda_graph`).
Nobody who reads or changes the method needs any of it: without it, everything runs on `model.layers` and
`model.method`.
"""

from __future__ import annotations

from typing import Literal

import torch

from model import method
from model.fast import cuda_graph, head
from model.fast.layers import use_fast_layers
from model.fast.memory import keep_freed_memory
from model.learner import MakeLearner
from model.meta_learner import Capture, no_capture
from model.meta_test import LEARNERS
from model.method import MetaLoss
from model.modelfactory import Network

Backend = Literal["plain", "fast"]
BACKENDS = ("auto", "plain", "fast")


def use_backend(net: Network, name: str, device: torch.device) -> Backend:
    """Give a network the layers of `--backend`, in place, and say which it is.

    `auto` is fast on the CPU and on CUDA, and plain elsewhere, until somebody has measured there.
    """
    keep_freed_memory()
    if name == "plain" or (name == "auto" and device.type not in ("cpu", "cuda")):
        return "plain"
    use_fast_layers(net)
    return "fast"


def learner(name: str, backend: Backend) -> MakeLearner:
    """The learner of `model.meta_test.LEARNERS` of that name, or what is as good and faster."""
    return head.adam_learner if (name, backend) == ("adam", "fast") else LEARNERS[name].make


def capture(backend: Backend) -> Capture:
    """A function that may turn functions which compute with a network into faster ones."""
    return cuda_graph.capture if backend == "fast" else no_capture


def meta_loss(backend: Backend) -> MetaLoss:
    """The function of `model.method` of that name, or what is as good and faster."""
    return head.meta_loss if backend == "fast" else method.meta_loss
