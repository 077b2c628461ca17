"""Inner rules beside the paper's SGD: from params and gradients to the params after an inner step.

A rule with parameters of its own is a module; the outer Adam learns them, training states and model files
keep them.
"""

from __future__ import annotations

import torch
from torch import Tensor, nn

from model.method import Params


class MetaSGD(nn.Module):
    """A learned step size for every number of every parameter.

    Li et al., *Meta-SGD: learning to learn quickly for few-shot learning* (2017).

    Args:
        params: the parameters that the inner loop changes.
        inner_lr: the step size that all begin with.
    """

    def __init__(self, params: Params, inner_lr: float) -> None:
        super().__init__()
        self.names = {name: name.replace(".", "/") for name in params}  # a module's own names have no dots
        for name, p in params.items():
            self.register_parameter(self.names[name], nn.Parameter(torch.full_like(p, inner_lr)))

    def forward(self, params: Params, grads: Params) -> Params:
        """p - inner_lr * g, number by number."""
        return {name: p - self.inner_lr(name) * grads[name] for name, p in params.items()}

    def inner_lr(self, name: str) -> Tensor:
        """The step sizes of one parameter, in its shape."""
        return self.get_parameter(self.names[name])
