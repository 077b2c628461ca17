"""Meta-training: the inner loop that learns a trajectory, and the outer step that learns to learn.

Everything is functional: fast weights are plain tensors that stand in for the network's parameters,
and no step reads a value back from the device.
"""

from __future__ import annotations

from typing import NamedTuple, Protocol

import torch
import torch.nn.functional as F  # noqa: N812 (the usual name)
from torch import Tensor
from torch.func import functional_call

from datasets.samplers import Trajectory
from model.fast.conv import SharedKernel, SharedLinear, StandIn
from model.modelfactory import Network, State, redraw, trained_parameters
from model.optimizer import Adam
from utils.distributed import Group

CHANNELS = 3  # of the images that the published networks read

Weights = dict[str, Tensor]
"""Fast weights: the parameters that the inner loop trains, by name."""


class Example(NamedTuple):
    """What one example says about the weights.

    Attributes:
        loss: cross-entropy before the update, scalar.
        inputs: [1, F] what entered the head.
        error: [1, num_classes] softmax probabilities minus the one-hot label. The gradient of the
            head's weight is `error.T @ inputs`, that of its bias `error`.
        slopes: the gradient of each weight below the head.
    """

    loss: Tensor
    inputs: Tensor
    error: Tensor
    slopes: tuple[Tensor, ...]


class Head(Protocol):
    """A linear head as an example meets it."""

    def logits(self, inputs: Tensor) -> Tensor:
        """[1, F] -> [1, num_classes]"""

    def pull_back(self, error: Tensor) -> Tensor:
        """Gradient of the inputs from that of the logits: [1, num_classes] -> [1, F]."""


def inner_gradients(
    net: Network, fast: Weights, head: Head, state: State, label: Tensor, rln: int, order: int = 1
) -> Example:
    """Loss of one example and its gradient with respect to the fast weights and the head.

    This is what every weight update within a trajectory starts from: an SGD step of the inner loop
    and an Adam step of meta-test. The gradient of the head is left as its two factors.

    Args:
        net: supplies the parameters that are not in `fast`.
        fast: the weights below the head that learn. A `StandIn` among them is left the factors of
            its gradient; its place in the result means nothing.
        head: the head as it is now.
        state: the example as `net.lower(image, rln)` left it, one row.
        label: [1] class id.
        order: 2 to keep the graph, to differentiate through the update.
    """
    with torch.set_grad_enabled(order == 2 or bool(fast)):
        inputs = functional_call(net, fast, (state, rln), {"head": False}, tie_weights=False)
    known = inputs if order == 2 else inputs.detach()
    with torch.set_grad_enabled(order == 2):
        logits = head.logits(known)
        loss = F.cross_entropy(logits, label)
        # The label's own p - 1 as minus the sum of the others: late in a trajectory p is so close
        # to 1 that the subtraction would leave few digits in float32.
        one_hot = F.one_hot(label, logits.shape[1])
        others = logits.softmax(1) * (1 - one_hot)
        error = others - one_hot * others.sum(1, keepdim=True)
        back = head.pull_back(error) if fast else None
    sources = [w.shared.token if isinstance(w, StandIn) else w for w in fast.values()]
    slopes = gradients(inputs, sources, back, create_graph=order == 2) if fast else ()
    return Example(loss.detach(), known, error, slopes)


def gradients(
    output: Tensor, weights: list[Tensor], slope: Tensor | None = None, create_graph: bool = False
) -> tuple[Tensor, ...]:
    """Gradient for each weight, given that of `output`; zero for a weight without effect (a bias
    before a norm)."""
    return torch.autograd.grad(
        output,
        weights,
        slope,
        create_graph=create_graph,
        allow_unused=True,
        materialize_grads=True,
    )


class SGDHead:
    """The head within a trajectory: its initial weights and a sum of rank-one steps.

    At batch 1 each SGD step adds an outer product. Kept as factors, T of them cost T dot products per
    example instead of a pass over all weights, and the graph of the inner loop holds no copies.

    Args:
        weight, bias: [O, F] and [O], the initial values.
        lr: step size.
    """

    def __init__(self, weight: Tensor, bias: Tensor, lr: float) -> None:
        self.weight, self.bias, self.lr = weight, bias, lr
        self.shared = SharedLinear(weight)
        self.inputs = weight.new_empty(0, weight.shape[1])
        self.errors = weight.new_empty(0, weight.shape[0])

    def logits(self, inputs: Tensor) -> Tensor:
        overlap = inputs @ self.inputs.t() + 1  # the 1 is the bias's input
        return self.shared.forward(inputs) + self.bias - self.lr * (overlap @ self.errors)

    def pull_back(self, error: Tensor) -> Tensor:
        return self.shared.transposed(error) - self.lr * (error @ self.errors.t()) @ self.inputs

    def step(self, inputs: Tensor, error: Tensor) -> None:
        """One SGD step on an example's factors."""
        self.inputs = torch.cat([self.inputs, inputs])
        self.errors = torch.cat([self.errors, error])

    def weights(self) -> tuple[Tensor, Tensor]:
        """Weight and bias after the steps so far; nothing may follow."""
        self.shared.release()
        return (
            torch.addmm(self.weight, self.errors.t(), self.inputs, alpha=-self.lr),
            self.bias - self.lr * self.errors.sum(0),
        )


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
    *body, head_weight, head_bias = names = trained_parameters(net, rln)
    meta: Weights = dict(net.named_parameters())
    if first_order:
        meta |= {name: meta[name].detach().requires_grad_() for name in names}
        support = tuple(part.detach() for part in support)
    with torch.set_grad_enabled(not first_order):
        head = SGDHead(meta[head_weight], meta[head_bias], update_lr)
        # The kernels of all but the first convolution, large enough that passes over them count.
        kernels = {
            name: SharedKernel(meta[name])
            for name in body
            if meta[name].ndim == 4 and meta[name].shape[1] > CHANNELS
        }
    fast = {name: meta[name] for name in body}
    losses = []
    for t in range(len(labels)):
        fast |= {name: kernel.stand_in() for name, kernel in kernels.items()}
        state = tuple(part[t : t + 1] for part in support)
        example = inner_gradients(
            net, fast, head, state, labels[t : t + 1], rln, order=1 if first_order else 2
        )
        for (name, weight), slope in zip(fast.items(), example.slopes, strict=True):
            if name in kernels:
                kernels[name].step(update_lr)
            else:
                stepped = torch.add(weight, slope, alpha=-update_lr)
                fast[name] = stepped.detach().requires_grad_() if first_order else stepped
        head.step(example.inputs, example.error)
        losses.append(example.loss)
    fast |= {name: kernel.result() for name, kernel in kernels.items()}
    fast |= zip((head_weight, head_bias), head.weights(), strict=True)
    if first_order:
        fast = {name: weight.detach().requires_grad_() for name, weight in fast.items()}
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
        weight.grad = gradient if weight.grad is None else weight.grad + gradient
    correct = (logits.detach().argmax(1) == labels).to(loss.dtype)
    return MetaStep(loss.detach(), correct[-steps:].mean(), correct[:-steps].mean(), inner_losses)


class MetaLearner:
    """Meta-trains a network with Adam, one trajectory per step or the mean over several.

    Args:
        net: the network, on the device where training happens.
        images: [C, 20, 1, 28, 28] meta-training classes on the same device.
        generator: draws the head rows (CPU).
        meta_lr: Adam's step size in the outer loop.
        update_lr: SGD's step size in the inner loop.
        rln: layers that the inner loop leaves alone; the outer step trains everything.
        first_order: treat inner gradients as constants.
        reset: draw the sampled classes' rows of the head anew before each trajectory.
        group: processes that share the trajectories of a step.
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
        group: Group | None = None,
    ) -> None:
        self.net = net
        self.group = group or Group()
        self.images = images
        self.generator = generator
        self.update_lr = update_lr
        self.rln = rln
        self.first_order = first_order
        self.reset = reset
        trained_parameters(net, rln)  # a wrong rln is an error now, not at the first step
        self.optimizer = Adam(net.parameters(), meta_lr)

    def step(self, *trajectories: Trajectory) -> MetaStep:
        """Learn from trajectories: reset head rows, adapt, differentiate, one Adam step."""
        result = self.differentiate(*trajectories)
        self.update()
        return result

    def differentiate(self, *trajectories: Trajectory) -> MetaStep:
        """The first half of a step: reset head rows, then leave the mean meta-gradient in `.grad`.

        The rows are drawn anew in the meta-weights themselves and for good, so that a class the
        network has met before cannot be remembered in the head; bias and Adam moments stay
        (released code, `reset_classifer`). Those of all trajectories are drawn before the first, in
        all processes, which then share the trajectories; there are no fewer of these.

        Returns:
            means over the trajectories.
        """
        if self.reset:
            rows = [label for trajectory in trajectories for label in trajectory.classes]
            redraw(self.net.head.weight, self.generator, rows=rows)
        self.net.zero_grad(set_to_none=True)
        results = []
        for trajectory in self.group.share(trajectories):
            query, labels = gather(self.images, trajectory.query)
            results.append(
                meta_gradient(
                    self.net,
                    query,
                    labels,
                    len(trajectory.support),
                    rln=self.rln,
                    update_lr=self.update_lr,
                    first_order=self.first_order,
                )
            )
        if len(trajectories) == 1:
            return results[0]
        weights = list(self.net.parameters())
        slopes = self.group.sum([self._gradient(weight) for weight in weights])
        for weight, slope in zip(weights, slopes, strict=True):
            weight.grad = slope / len(trajectories)
        sums = self.group.sum([torch.stack(values).sum(0) for values in zip(*results, strict=True)])
        return MetaStep(*(value / len(trajectories) for value in sums))

    def finite(self) -> bool:
        """Whether the meta-gradient in `.grad` is; waits for the device."""
        norm = torch.nn.utils.get_total_norm([self._gradient(weight) for weight in self.net.parameters()])
        return bool(norm.isfinite())

    def update(self) -> None:
        """The second half of a step: one Adam step along `.grad`."""
        self.optimizer.step([self._gradient(weight) for weight in self.net.parameters()])

    @staticmethod
    def _gradient(weight: Tensor) -> Tensor:
        assert weight.grad is not None
        return weight.grad


def gather(images: Tensor, index: Tensor) -> tuple[Tensor, Tensor]:
    """Images [..., 1, 28, 28] and class ids [...] of an index [..., 2] of (class, drawing).

    `images` is [C, 20, 1, 28, 28]; the index may lie on the CPU and travels without waiting.
    """
    index = index.to(images.device, non_blocking=True)
    return images[index[..., 0], index[..., 1]], index[..., 0]


def active_fraction(activations: Tensor, threshold: float = 0.01) -> float:
    """Fraction of the values that are above `threshold` (paper, section 5: active units)."""
    return (activations > threshold).double().mean().item()
