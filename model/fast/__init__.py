"""The fast backend of ANML, sANML and OML: plain PyTorch's numbers up to rounding, several times faster.

Nobody who reads or changes the method needs any of it. A run uses it only where `guard` has just found it
equal to what is written; everything else runs on `model.layers` and `model.method`. Blocks become drop-ins
and features come with their derivatives (`network`, `derivatives`), the inner loop keeps the head's steps as
factors (`inner_loop`), and on CUDA a step is one graph (`cuda_graph`).
"""

from __future__ import annotations

from typing import Literal

from model import method
from model.fast import cuda_graph, inner_loop
from model.fast.network import use_fast_layers
from model.learner import MakeLearner
from model.meta_learner import Capture, no_capture
from model.meta_test import LEARNERS
from model.method import MetaLoss
from model.modelfactory import Network

Backend = Literal["plain", "fast"]
BACKENDS = ("auto", "plain", "fast")


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
