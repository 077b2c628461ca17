"""Meta-training: the inner loop that learns a trajectory, and the outer step that learns to learn.

Everything is functional: fast weights are plain tensors that stand in for the network's parameters,
and no step reads a value back from the device.
"""

from __future__ import annotations

from collections.abc import Iterable
from typing import NamedTuple

import torch
import torch.nn.functional as F  # noqa: N812 (the usual name)
from torch import Tensor
from torch.func import functional_call

from datasets.samplers import Trajectory
from model.modelfactory import Network, State, redraw, trained_parameters

Weights = dict[str, Tensor]
"""Fast weights: the parameters that the inner loop trains, by name."""


def inner_gradients(
    net: Network, fast: Weights, state: State, label: Tensor, rln: int, create_graph: bool = False
) -> tuple[Tensor, tuple[Tensor, ...]]:
    """Loss of one example and its gradient with respect to the fast weights.

    This is what every weight update inside a trajectory starts from: an SGD step of the inner loop
    and an Adam step of meta-test.

    Args:
        net: supplies the parameters that are not in `fast`.
        fast: the weights that learn.
        state: the example as `net.lower(image, rln)` left it, one row.
        label: [1] class id.
        create_graph: keep the graph, to differentiate through the update (second order).

    Returns:
        the loss (cross-entropy, scalar) and a gradient for each entry of `fast`.
    """
    loss = F.cross_entropy(functional_call(net, fast, (state, rln)), label)
    return loss, gradients(loss, list(fast.values()), create_graph)


def gradients(loss: Tensor, weights: list[Tensor], create_graph: bool = False) -> tuple[Tensor, ...]:
    """Gradient of `loss` for each weight; zero where a weight has no effect (biases before a norm)."""
    return torch.autograd.grad(
        loss, weights, create_graph=create_graph, allow_unused=True, materialize_grads=True
    )


def adam(weights: Iterable[Tensor], lr: float) -> torch.optim.Adam:
    """Adam with torch's defaults (paper and released code), in one pass over memory where it can be.

    The fused CPU kernel reads gradients as if they were laid out like the weights: make them
    contiguous before a step.
    """
    weights = list(weights)
    return torch.optim.Adam(weights, lr=lr, fused=weights[0].device.type in ("cpu", "cuda", "mps"))


def adapt(
    net: Network,
    support: State,
    labels: Tensor,
    *,
    rln: int,
    update_lr: float,
    first_order: bool = False,
) -> tuple[Weights, Tensor]:
    """The inner loop: one SGD step per support image, batch 1, on the layers above `rln`.

    Paper, algorithm 1. Second order keeps the graph of all steps, so that a loss at the fast weights
    can be differentiated with respect to the initial ones; first order (released code) returns fast
    weights that are leaves of a graph of their own.

    Args:
        support: the trajectory as `net.lower(images, rln)` left it, T rows in order.
        labels: [T] class ids.
        rln: layers that stay frozen.
        update_lr: step size.

    Returns:
        the fast weights, and [T] the loss before each step.
    """
    names = trained_parameters(net, rln)
    meta = dict(net.named_parameters())
    fast: Weights = {name: meta[name] for name in names}
    if first_order:
        fast = {name: weight.detach().requires_grad_() for name, weight in fast.items()}
        support = tuple(part.detach() for part in support)
    losses = []
    for t in range(len(labels)):
        state = tuple(part[t : t + 1] for part in support)
        loss, slopes = inner_gradients(net, fast, state, labels[t : t + 1], rln, create_graph=not first_order)
        stepped = (w - update_lr * g for w, g in zip(fast.values(), slopes, strict=True))
        if first_order:
            stepped = (weight.detach().requires_grad_() for weight in stepped)
        fast = dict(zip(names, stepped, strict=True))
        losses.append(loss.detach())
    return fast, torch.stack(losses)


class MetaStep(NamedTuple):
    """What one meta-step measured, as tensors on the device (read them when it suits).

    Attributes:
        loss: mean cross-entropy of the query images at the adapted weights.
        accuracy_trajectory: fraction of the support images classified right after the inner loop.
        accuracy_remember: the same for the remember images.
        inner_losses: [T] loss before each inner step.
    """

    loss: Tensor
    accuracy_trajectory: Tensor
    accuracy_remember: Tensor
    inner_losses: Tensor


def meta_gradient(
    net: Network,
    query: Tensor,
    labels: Tensor,
    steps: int,
    *,
    rln: int,
    update_lr: float,
    first_order: bool = False,
) -> MetaStep:
    """Loss of the query images after the inner loop; adds its gradient to `.grad` of the meta-weights.

    The layers below `rln` do not change in the inner loop, so one pass over the query, whose end is
    the trajectory, serves both loops. In first order the fast weights count as the initial ones plus
    a constant (released code); in second order the gradient runs through all inner steps (paper).

    Args:
        query: [R + T, 1 or 3, 28, 28] remember images, then the T support images in order.
        labels: [R + T] class ids.
        steps: T, the length of the trajectory.
    """
    lowered = net.lower(query, rln)
    support = tuple(part[-steps:] for part in lowered)
    fast, inner_losses = adapt(
        net, support, labels[-steps:], rln=rln, update_lr=update_lr, first_order=first_order
    )
    logits = functional_call(net, fast, (lowered, rln))
    loss = F.cross_entropy(logits, labels)
    meta = dict(net.named_parameters())
    # In first order d fast / d meta is the identity: the gradient of a fast weight is the answer.
    sources = {**meta, **fast} if first_order else meta
    slopes = gradients(loss, list(sources.values()))
    for weight, gradient in zip(meta.values(), slopes, strict=True):
        weight.grad = gradient.contiguous() if weight.grad is None else weight.grad + gradient
    correct = (logits.detach().argmax(1) == labels).to(loss.dtype)
    return MetaStep(loss.detach(), correct[-steps:].mean(), correct[:-steps].mean(), inner_losses)


class MetaLearner:
    """Meta-trains a network with Adam, one trajectory per step.

    Args:
        net: the network, on the device where training happens.
        images: [C, 20, 1, 28, 28] meta-training classes on the same device.
        generator: draws the head rows (CPU).
        meta_lr: Adam's step size in the outer loop.
        update_lr: SGD's step size in the inner loop.
        rln: layers that the inner loop leaves alone; the outer step trains everything.
        first_order: treat inner gradients as constants.
        reset: draw the sampled classes' rows of the head anew before each trajectory.
    """

    def __init__(
        self,
        net: Network,
        images: Tensor,
        generator: torch.Generator,
        *,
        meta_lr: float,
        update_lr: float,
        rln: int,
        first_order: bool = False,
        reset: bool = True,
    ) -> None:
        self.net = net
        self.images = images
        self.generator = generator
        self.update_lr = update_lr
        self.rln = rln
        self.first_order = first_order
        self.reset = reset
        trained_parameters(net, rln)  # a wrong rln is an error now, not at the first step
        self.optimizer = adam(net.parameters(), meta_lr)

    def step(self, trajectory: Trajectory) -> MetaStep:
        """Learn from one trajectory: reset head rows, adapt, differentiate, one Adam step.

        The rows are drawn anew in the meta-weights themselves and for good, so that a class the
        network has met before cannot be remembered in the head; bias and Adam moments stay
        (released code, `reset_classifer`).
        """
        if self.reset:
            redraw(self.net.head.weight, self.generator, rows=trajectory.classes)
        query, labels = gather(self.images, trajectory.query)
        self.optimizer.zero_grad(set_to_none=True)
        result = meta_gradient(
            self.net,
            query,
            labels,
            len(trajectory.support),
            rln=self.rln,
            update_lr=self.update_lr,
            first_order=self.first_order,
        )
        self.optimizer.step()
        return result


def gather(images: Tensor, index: Tensor) -> tuple[Tensor, Tensor]:
    """Images [..., 1, 28, 28] and class ids [...] of an index [..., 2] of (class, drawing).

    `images` is [C, 20, 1, 28, 28]; the index may lie on the CPU and travels without waiting.
    """
    index = index.to(images.device, non_blocking=True)
    return images[index[..., 0], index[..., 1]], index[..., 0]


def active_fraction(activations: Tensor, threshold: float = 0.01) -> float:
    """Fraction of the values that are above `threshold` (paper, section 5: active units)."""
    return (activations > threshold).double().mean().item()
