"""Adam, for the outer loop and meta-test, and SGD, for meta-test."""

from collections.abc import Iterable, Mapping, Sequence

import torch
from torch import Tensor
from torch.optim.adam import adam

BETAS = (0.9, 0.999)
EPS = 1e-8


class Adam:
    """Adam, which updates weights in place, with its published defaults (as in the paper and released code).

    The arithmetic is torch's functional `adam`, fused into one pass over memory.
    `torch.optim.Adam` would import the compiler, which takes seconds, and walk its parameter groups at each
    of the thousands of updates of a meta-test.

    Args:
        weights: the tensors to update; their addresses stay.
        lr: step size.
    """

    def __init__(self, weights: Iterable[Tensor], lr: float) -> None:
        self.weights = [weight.detach() for weight in weights]
        self.lr = lr
        self.means = [torch.zeros_like(weight) for weight in self.weights]
        self.squares = [torch.zeros_like(weight) for weight in self.weights]
        self.flat = [list(map(_flat, part)) for part in (self.weights, self.means, self.squares)]
        self.steps = [torch.zeros((), device=weight.device) for weight in self.weights]

    def state_dict(self) -> dict[str, list[Tensor]]:
        """Moments and step counts, a tensor per weight; later steps change these tensors."""
        return {"means": self.means, "squares": self.squares, "steps": self.steps}

    def load_state_dict(self, state: Mapping[str, Sequence[Tensor]]) -> None:
        """Copy a state that `state_dict` returned, on any device; raises ValueError if the weights differ."""
        for key, own in self.state_dict().items():
            loaded = state.get(key, ())
            if [(x.shape, x.dtype) for x in loaded] != [(x.shape, x.dtype) for x in own]:
                raise ValueError(f"the optimizer's {key} belong to other weights")
            for target, value in zip(own, loaded, strict=True):
                target.copy_(value)

    @torch.no_grad()
    def step(self, gradients: Sequence[Tensor]) -> None:
        """Update each weight with its gradient, a tensor of the same shape."""
        weights, means, squares = self.flat
        flat = [_flat(*pair) for pair in zip(gradients, self.weights, strict=True)]
        adam(
            *(weights, flat, means, squares, [], self.steps),
            fused=True,
            amsgrad=False,
            beta1=BETAS[0],
            beta2=BETAS[1],
            lr=self.lr,
            weight_decay=0.0,
            eps=EPS,
            maximize=False,
        )


class SGD:
    """Plain gradient descent, which the paper mentions for meta-test; the interface is that of `Adam`."""

    def __init__(self, weights: Iterable[Tensor], lr: float) -> None:
        self.weights = [weight.detach() for weight in weights]
        self.lr = lr

    @torch.no_grad()
    def step(self, gradients: Sequence[Tensor]) -> None:
        """Update each weight with its gradient, a tensor of the same shape."""
        for weight, gradient in zip(self.weights, gradients, strict=True):
            weight.sub_(gradient, alpha=self.lr)

    def state_dict(self) -> dict[str, list[Tensor]]:
        """An empty state: a step depends on its gradient alone."""
        return {}


OPTIMIZERS: dict[str, type[Adam] | type[SGD]] = {"adam": Adam, "sgd": SGD}
"""The choices of `--optimizer` at meta-test."""


def _flat(x: Tensor, like: Tensor | None = None) -> Tensor:
    """A flat view of `x` in memory order; of a copy with the memory layout of `like` if that differs.

    The fused pass would copy tensors that are not contiguous, such as convolution kernels with the channels
    last, and reads a gradient in the layout of its weight."""
    if like is not None and x.stride() != like.stride():
        x = torch.empty_like(like).copy_(x)
    return x.as_strided((x.numel(),), (1,))
