"""What learns at meta-test: its interface, and what the table of learners says of each."""

from __future__ import annotations

from collections.abc import Callable, Collection, Iterator, Mapping
from dataclasses import dataclass, field
from typing import Literal, Protocol

from torch import Tensor

from model.layers import Inputs
from model.modelfactory import Network

View = Literal["gated", "gate", "both"]
VIEWS: tuple[View, ...] = ("gated", "gate", "both")  # what a head without gradient sees of a network

Prior = tuple[float, float]
"""Shape and scale of an inverse gamma distribution."""


class Learner(Protocol):
    """Learns a stream of images once, in order, and says what it has learned."""

    def learn(self, images: Inputs, labels: Tensor) -> None:
        """Learn images, or a network's frozen output of them, with labels [B], one after the other.

        Labels are class ids in the pool. For a learner that trains a network's head of fewer outputs than
        that has classes, they are positions in the draw.
        """

    def predict(self, images: Inputs) -> Tensor:
        """[B] labels; -1 for images whose logits are not finite."""


@dataclass(frozen=True)
class Settings:
    """What a learner is made with. Each uses those that its entry in the table of learners names.

    Attributes:
        lr: step size; None for a learner that takes no steps.
        optimizer: key of `model.optimizer.OPTIMIZERS`.
        features: what is seen of a network: what enters its head, its gate, or both side by side.
        power: exponent of the features, which then get unit length; 1 leaves them as they are.
        shrinkage: weight of the multiple of the identity that a covariance is mixed with, 0 to 1.
        prior: of the variance of a feature within a class.
    """

    lr: float | None = None
    optimizer: str = "adam"
    features: View = "gated"
    power: float = 1.0
    shrinkage: float = 0.5
    prior: Prior | None = None


MakeLearner = Callable[[Network, Collection[str], Settings], Learner]
"""From a network that is the learner's to change, names of the parameters that may learn, and settings."""

Fit = Callable[[Network, Settings, Iterator[Inputs]], Prior]
"""From a network, settings and the images of one meta-training class after the other."""


@dataclass(frozen=True)
class LearnerKind:
    """A line of the table of learners.

    Attributes:
        make: makes one.
        title: what treatments that use it are called after; empty for the paper's.
        options: names and defaults of the settings that it uses and a flag sets. None for one that trains
            the network by gradient steps, with `--lr`, `--rln` and what else belongs to those.
        fit: what is fitted to meta-training classes, once for a model, and becomes `Settings.prior`.
    """

    make: MakeLearner
    title: str = ""
    options: Mapping[str, object] | None = field(default=None)
    fit: Fit | None = None

    @property
    def takes_steps(self) -> bool:
        """Whether it trains the network, an output of whose head then stands for each class."""
        return self.options is None

    def describe(self, chosen: Mapping[str, object], defaults: Mapping[str, object]) -> str:
        """The title and what of the options is not as by default: `streaming LDA --power 1`."""
        other = [
            f" --{name} {value:g}" if isinstance(value, float) else f" --{name} {value}"
            for name, value in chosen.items()
            if value != defaults[name]
        ]
        return self.title + "".join(other)
