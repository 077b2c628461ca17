"""CUDA graphs, which launch thousands of small kernels at once.

A meta-step at batch 1 is some ten thousand kernels of a few microseconds each. Python launches them more
slowly than a GPU computes them. A graph replays the same kernels on the same memory.
"""

from collections.abc import Callable, Collection, Hashable, Iterable, Sequence
from typing import Generic, TypeVar

import torch
from torch import Tensor, nn

from model.layers import FrozenOutput, Inputs, parts
from model.method import OnlineLearner, Optimizer

T = TypeVar("T")
WARM_UP = 2  # calls before the capture, in which libraries choose kernels and allocate memory


class CudaGraph(Generic[T]):
    """A function of CUDA tensors, captured at its first call for each set of shapes, then replayed.

    The next call overwrites the results of a call.

    Args:
        function: must read nothing back from the device, and its tensors must keep their addresses.
        changed: tensors that `function` changes in place; their values are restored after the warm-up.
    """

    def __init__(self, function: Callable[..., T], changed: Iterable[Tensor] = ()) -> None:
        self.function = function
        self.changed = list(changed)
        self.captured: dict[Hashable, tuple[torch.cuda.CUDAGraph, Sequence[Tensor], T]] = {}

    def __call__(self, *inputs: Tensor) -> T:
        key = tuple((x.shape, x.dtype) for x in inputs)
        if key not in self.captured:
            self.captured[key] = self._capture(inputs)
        graph, static_inputs, result = self.captured[key]
        for static, x in zip(static_inputs, inputs, strict=True):
            static.copy_(x)
        graph.replay()
        return result

    def _capture(self, inputs: Sequence[Tensor]) -> tuple[torch.cuda.CUDAGraph, Sequence[Tensor], T]:
        static_inputs = [x.clone() for x in inputs]
        saved = [x.detach().clone() for x in self.changed]
        stream = torch.cuda.Stream()
        stream.wait_stream(torch.cuda.current_stream())
        with torch.cuda.stream(stream):
            for _ in range(WARM_UP):
                self.function(*static_inputs)
            for x, value in zip(self.changed, saved, strict=True):
                x.detach().copy_(value)
        torch.cuda.current_stream().wait_stream(stream)
        graph = torch.cuda.CUDAGraph()
        with torch.cuda.graph(graph):
            result = self.function(*static_inputs)
        return graph, static_inputs, result


def capture(function: Callable[..., T], net: nn.Module) -> Callable[..., T]:
    """`function`, which computes with `net`; on a GPU as a CUDA graph."""
    return CudaGraph(function) if all(parameter.is_cuda for parameter in net.parameters()) else function


class GraphLearner(OnlineLearner):
    """An online learner whose step is a CUDA graph."""

    def __init__(
        self, net: nn.Module, trained: Collection[str], optimizer: Callable[[list[Tensor]], Optimizer]
    ) -> None:
        super().__init__(net, trained, optimizer)
        moments = [x for part in self.optimizer.state_dict().values() for x in part]
        self.graph = CudaGraph(self._step, [*self.params, *moments])
        self.done: tuple[int, ...] | None = None  # of the latest `FrozenOutput`; None for images

    def learn(self, images: Inputs, labels: Tensor) -> None:
        self.done = images.done if isinstance(images, FrozenOutput) else None
        for label, *part in zip(labels.split(1), *(part.split(1) for part in parts(images)), strict=True):
            self.graph(label, *part)

    def _step(self, label: Tensor, *part: Tensor) -> None:
        self.step(part[0] if self.done is None else FrozenOutput(part, self.done), label)
