"""What outer loops have in common; `model.outer_loops` has them by name.

A step is `draw`, `gradient` and `update`.
"""

from collections.abc import Mapping, Sequence
from dataclasses import KW_ONLY, dataclass, field
from typing import Any, ClassVar

import torch
import torch.nn.functional as F  # noqa: N812 (the usual name)
from torch import Tensor, nn

from datasets.images import ImageSet, Pool
from model.guard import PLAIN, Backend
from model.method import InnerLoop, MakeRule
from model.modelfactory import Network
from model.optimizer import Adam
from model.treatments import Weights
from utils.distributed import Group

Measured = dict[str, Tensor]
"""Numbers of one step by name, as tensors on the device, before its update: the loss first."""


@dataclass(eq=False)
class OuterLoop:
    """What outer loops have in common: the weights that learn, and Adam on their gradient.

    A run gives the attributes down to `backend`. What a loop has beside them are its flags.

    Attributes:
        net: the network, on the device where training happens.
        images: meta-training classes on the same device, normalised.
        generator: draws what a step needs (CPU).
        meta_lr: Adam's step size.
        make_rule: makes the inner rule; None for the paper's.
        group: the processes of the job.
        backend: gives the meta-loss.
        head: what learns in small meta-tests of the network, a key of `model.learner.LEARNERS`.
        rule: holds what learns beside the network; training states and model files keep it.
        learned: the parameters that learn.
        grads: the gradient that `differentiate` leaves, a tensor for each of `learned`.
        optimizer: Adam on `learned`; the run sets its `lr` before each update.
        several: whether processes can share a step, each a part of `--meta_batch`.
        trains_head: whether the head's parameters learn.
        rates: names of the flags to lower where a step diverges.
        defaults: values of flags of the script that are not given.
        model_name: default of `--model_name`; None for the network's.
        weights: what a model file says of how its weights were made.
    """

    net: Network
    images: Pool
    generator: torch.Generator
    _: KW_ONLY
    meta_lr: float
    make_rule: MakeRule | None = None
    group: Group = field(default_factory=Group)
    backend: Backend = PLAIN
    several: ClassVar[bool] = False
    trains_head: ClassVar[bool] = True
    rates: ClassVar[tuple[str, ...]] = ("meta_lr",)
    defaults: ClassVar[Mapping[str, Any]] = {}
    model_name: ClassVar[str | None] = None
    weights: ClassVar[Weights] = "meta-trained"
    head: str = field(default="adam", init=False)
    rule: nn.Module | None = field(default=None, init=False)
    grads: Sequence[Tensor] = field(default=(), init=False)

    @classmethod
    def inner_loop(cls, flags: Mapping[str, Any], rule: MakeRule | None = None) -> InnerLoop | None:
        """Settings of the inner loop with these flags; None for a loop without one."""
        return None

    @classmethod
    def validate(cls, flags: Mapping[str, Any]) -> None:
        """Raise UserError where flags contradict each other."""

    def __post_init__(self) -> None:
        fixed = set() if self.trains_head else {id(p) for p in self.net.head.parameters()}
        self.learned = [p for p in self.net.parameters() if p.requires_grad and id(p) not in fixed]
        self.learned += [] if self.rule is None else self.rule.parameters()
        self.optimizer = Adam(self.learned, self.meta_lr)

    def check(self, images: ImageSet) -> None:
        """Raise UserError where there are too few images for a step."""

    def draw(self) -> tuple[Any, ...]:
        """[B, 2] (class, image) of some images of a step, then what `differentiate` is called with."""
        raise NotImplementedError

    def differentiate(self, *drawn: Any) -> Measured:
        """Leave the gradient of a step in `grads`."""
        raise NotImplementedError

    def gradient(self, *drawn: Any) -> Measured:
        """Differentiate, and add the gradient of the network's penalty to `grads`.

        Returns:
            what `differentiate` does, and the `penalty` of a network that has one.
        """
        measured, penalty = self.differentiate(*drawn), self.net.penalty()
        if penalty is None:
            return measured
        self.grads = [a + b for a, b in zip(self.grads, self.grads_of(penalty), strict=True)]
        return {**measured, "penalty": penalty.detach()}

    def finite(self) -> bool:
        """Whether the gradient in `grads` is; waits for the device."""
        return bool(torch.nn.utils.get_total_norm(self.grads).isfinite())

    def update(self) -> None:
        """Make one Adam step along `grads`."""
        self.optimizer.step(self.grads)

    def undo(self) -> None:
        """Put the network back to where it was before `differentiate`, in a loop that changes it there."""

    def step(self, *drawn: Any) -> Measured:
        """Take the gradient and update."""
        measured = self.gradient(*drawn)
        self.update()
        return measured

    def grads_of(self, loss: Tensor) -> tuple[Tensor, ...]:
        """A tensor for each of `learned`; zero for what has no effect (a bias before a norm)."""
        return torch.autograd.grad(loss, self.learned, allow_unused=True, materialize_grads=True)

    def classified(self, logits: Tensor, labels: Tensor) -> Measured:
        """Leave the gradient of the mean cross-entropy of logits [B, K] in `grads`.

        Returns:
            `loss`, and `accuracy`, the fraction of the labels [B] that have the largest logit.
        """
        loss = F.cross_entropy(logits, labels)
        self.grads = self.grads_of(loss)
        right = logits.detach().argmax(1) == labels
        return {"loss": loss.detach(), "accuracy": right.to(loss.dtype).mean()}


def gather(pool: Pool, index: Tensor) -> tuple[Tensor, Tensor]:
    """Images [..., C, S, S], or other rows of a pool, and class ids [...] of an index [..., 2] of (class,
    image), which may lie on the CPU."""
    device = pool.rows.device
    copies_safely = device.type == "cuda"  # MPS would read the memory after another tensor has taken it
    both = (pool.positions(index), index)
    rows, labels = (tensor.to(device, non_blocking=copies_safely) for tensor in both)
    return pool.take(rows), labels[..., 0]
