"""Meta-training's outer step: head rows drawn anew, the meta-gradient of trajectories, Adam.

The method itself is `model.method`. No step here reads a value back from the device.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import replace
from typing import Any, ClassVar, NamedTuple, Protocol, TypeVar

import torch
from torch import Tensor, nn

from datasets.images import Pool
from datasets.task_sampler import Trajectory
from model import method
from model.inner_rules import MetaSGD
from model.method import InnerLoop, MetaLoss, Params
from model.modelfactory import Network, head_rows, reset_head, trained_parameters
from model.optimizer import Adam
from utils.distributed import seed_layers

T = TypeVar("T")

Shard = Callable[[Sequence[Any]], Sequence[Any]]
"""From the trajectories of a step, or what belongs to each, to those that this process computes."""

AllReduce = Callable[[Sequence[Tensor]], Sequence[Tensor]]
"""From tensors to their sums over the processes that share a step."""


class Capture(Protocol):
    """From a function of tensors that computes with a network to one with the same results."""

    def __call__(self, function: Callable[..., T], net: nn.Module) -> Callable[..., T]: ...


def no_capture(function: Callable[..., T], net: nn.Module) -> Callable[..., T]:
    """The function as it is."""
    return function


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


class OuterLoop:
    """What meta-training's outer steps have in common: the weights that learn, and Adam on their gradient.

    Args:
        net: the network, on the device where training happens.
        images: [C, 20, 1, 28, 28] meta-training classes on the same device.
        generator: draws what a step needs beside the images (CPU).
        learned: what learns.
        optimizer: of `learned`.
        rule: holds what learns beside the network; training states and model files keep it.

    Attributes:
        inner_loop: whether a step has an inner loop. Processes can share the trajectories of such a step.
        head: what learns in small meta-tests of the network, a key of `model.meta_test.LEARNERS`.
    """

    inner_loop: ClassVar[bool] = False
    head: ClassVar[str] = "adam"

    def __init__(
        self,
        net: Network,
        images: Pool | Tensor,
        generator: torch.Generator,
        learned: list[nn.Parameter],
        optimizer: Adam,
        rule: nn.Module | None = None,
    ) -> None:
        self.net = net
        self.images = Pool.of(images)
        self.generator = generator
        self.learned = learned
        self.optimizer = optimizer
        self.rule = rule
        self.grads: Sequence[Tensor] = ()

    def finite(self) -> bool:
        """Whether the gradient in `grads` is; waits for the device."""
        return bool(torch.nn.utils.get_total_norm(self.grads).isfinite())

    def update(self) -> None:
        """The second half of a step: one Adam step along `grads`."""
        self.optimizer.step(self.grads)

    def grads_of(self, loss: Tensor) -> tuple[Tensor, ...]:
        """A tensor for each of `learned`; zero for what has no effect (a bias before a norm)."""
        return torch.autograd.grad(loss, self.learned, allow_unused=True, materialize_grads=True)


class MetaLearner(OuterLoop):
    """Meta-trains a network with Adam, one trajectory per step or the mean over several.

    Args:
        net: the network, on the device where training happens.
        images: meta-training classes on the same device, normalised; [C, D, 1, 28, 28] where all have
            as many images.
        generator: draws the head rows (CPU).
        meta_lr: Adam's step size in the outer loop.
        inner: settings of the inner loop.
        rln: layers that the inner loop leaves alone; the outer step trains everything.
        learn_update_lr: give every parameter of the inner loop a step size of its own, learned from
            `inner.lr` on by the outer Adam (Meta-SGD).
        reset: draw the sampled classes' rows of the head anew before each trajectory.
        reset_copy: with `reset`, in the inner loop's copy of the weights alone.
        shard, all_reduce: how several processes share the trajectories of a step.
        meta_loss: `method.meta_loss`, or what is as good and faster.
        capture: turns the meta-gradient into a function that may be faster, and whose results the next call
            may overwrite.
    """

    inner_loop = True

    def __init__(
        self,
        net: Network,
        images: Pool | Tensor,
        generator: torch.Generator,
        *,
        meta_lr: float,
        inner: InnerLoop,
        rln: int,
        learn_update_lr: bool = False,
        reset: bool = True,
        reset_copy: bool = False,
        shard: Shard = list,
        all_reduce: AllReduce = list,
        meta_loss: MetaLoss = method.meta_loss,
        capture: Capture = no_capture,
    ) -> None:
        self.reset = reset
        self.reset_copy = reset_copy
        self.shard, self.all_reduce = shard, all_reduce
        self.meta_loss = meta_loss
        self.params: Params = {name: net.get_parameter(name) for name in trained_parameters(net, rln)}
        self.inner_rule = MetaSGD(self.params, inner.lr) if learn_update_lr else None
        self.inner = replace(inner, rule=self.inner_rule)
        learned = [weight for weight in net.parameters() if weight.requires_grad]
        if self.inner_rule is not None:
            learned += self.inner_rule.parameters()
        super().__init__(net, images, generator, learned, Adam(learned, meta_lr), self.inner_rule)
        self.meta_grads = capture(self._meta_grads, net)

    def step(self, *trajectories: Trajectory) -> MetaStep:
        """Learn from trajectories: reset head rows, adapt, differentiate, one Adam step."""
        result = self.differentiate(*trajectories)
        self.update()
        return result

    def differentiate(self, *trajectories: Trajectory) -> MetaStep:
        """The first half of a step: reset head rows, then leave the mean meta-gradient in `grads`.

        The rows are drawn anew in the meta-weights themselves and for good, so that a class the
        network has met before cannot be remembered in the head; bias and Adam moments stay
        (released code, `reset_classifer`). Those of all trajectories are drawn before the first, in
        all processes, which then share the trajectories; there are no fewer of these. The buffers move by
        the mean of what each trajectory moves them by.

        With `reset_copy` the meta-weights get their rows back, whose gradient is zero: the loss knows
        nothing of them (paper, second-hand).

        Returns:
            means over the trajectories.
        """
        classes = [label for trajectory in trajectories for label in trajectory.classes]
        rows = head_rows(self.net) if self.reset_copy else []
        kept = [parameter.detach()[classes] for parameter in rows]
        if self.reset:
            reset_head(self.net, self.generator, classes)
        result = self._differentiate_all(trajectories)
        with torch.no_grad():
            for parameter, values in zip(rows, kept, strict=True):
                parameter[classes] = values
                for learned, grad in zip(self.learned, self.grads, strict=True):
                    if learned is parameter:
                        grad[classes] = 0
        return result

    def _differentiate_all(self, trajectories: Sequence[Trajectory]) -> MetaStep:
        """Leave the mean meta-gradient in `grads`."""
        if len(trajectories) == 1:
            self.grads, result = self._differentiate(trajectories[0])
            return result
        # Layers draw (dropout) and move their buffers (running statistics) for each trajectory as if it were
        # alone: otherwise both would depend on which process takes which trajectory.
        seeds = torch.randint(2**62, (len(trajectories),)).tolist()
        buffers = list(self.net.buffers())
        before = [buffer.clone() for buffer in buffers]
        sums: list[Tensor] = []
        for seed, trajectory in self.shard(list(zip(seeds, trajectories, strict=True))):
            seed_layers(seed)
            for buffer, value in zip(buffers, before, strict=True):
                buffer.copy_(value)
            grads, result = self._differentiate(trajectory)
            moved = [_moved(*pair).to(result.loss) for pair in zip(buffers, before, strict=True)]
            if sums:
                torch._foreach_add_(sums, [*grads, *result, *moved])
            else:
                sums = [value.clone() for value in (*grads, *result, *moved)]
        means = [value / len(trajectories) for value in self.all_reduce(sums)]
        for buffer, value in zip(reversed(buffers), reversed(before), strict=True):
            mean = means.pop()
            buffer.copy_(value + (mean if buffer.is_floating_point() else mean.round().to(buffer.dtype)))
        self.grads = means[: len(self.learned)]
        return MetaStep(*means[len(self.learned) :])

    def _differentiate(self, trajectory: Trajectory) -> tuple[Sequence[Tensor], MetaStep]:
        """The meta-gradient of one trajectory, a tensor for each of `learned`, and what it measured."""
        images, labels = gather(self.images, trajectory.query)
        return self.meta_grads(images, labels, labels[-len(trajectory.support) :])

    def _meta_grads(
        self, images: Tensor, labels: Tensor, support: Tensor
    ) -> tuple[Sequence[Tensor], MetaStep]:
        """Of the query's images and labels, the last of which are those of the trajectory, `support`."""
        steps = len(support)
        # The frozen part does not change in the inner loop: one pass over the query, whose end is the
        # trajectory, serves both loops.
        inputs = self.net.frozen(images, self.params)
        examples = (inputs[-steps:], support), (inputs, labels)
        loss, logits, inner_losses = self.meta_loss(self.net, self.params, *examples, self.inner)
        grads = self.grads_of(loss)
        correct = (logits.detach().argmax(1) == labels).to(loss.dtype)
        return grads, MetaStep(loss.detach(), correct[-steps:].mean(), correct[:-steps].mean(), inner_losses)


def _moved(buffer: Tensor, before: Tensor) -> Tensor:
    """How far a buffer has moved: exactly 0 where it has not, even at infinity (a mask)."""
    return torch.where(buffer == before, torch.zeros_like(buffer), buffer - before)


def gather(images: Pool | Tensor, index: Tensor) -> tuple[Tensor, Tensor]:
    """Images [..., C, 28, 28], or other rows of a pool, and class ids [...] of an index [..., 2] of (class,
    image), which may lie on the CPU."""
    pool = Pool.of(images)
    return pool.rows[send(pool.positions(index), pool.device)], send(index, pool.device)[..., 0]


def send(tensor: Tensor, device: torch.device) -> Tensor:
    """A tensor of the CPU on a device, without waiting where it may be forgotten meanwhile.

    MPS would read the memory when it has long been another's.
    """
    return tensor.to(device, non_blocking=device.type == "cuda")


def fraction(mask: Tensor) -> float:
    """Fraction of the values of a bool tensor that are true; on the CPU, since MPS has no float64."""
    return mask.cpu().double().mean().item()


def active_fraction(activations: Tensor, threshold: float = 0.01) -> float:
    """Fraction of the values that are above `threshold` (paper, section 5: active units)."""
    return fraction(activations > threshold)
