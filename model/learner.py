"""What learns at meta-test, by name in `LEARNERS`: the paper's optimizer, and heads that need no gradient.

The heads without gradient are statistics of a frozen network's features, which one pass gives. All that they
keep are sums, in double precision. So the order of the images and how the stream is cut into parts do not
matter, nothing is forgotten, and memory grows with the number of classes alone. What follows from the sums is
computed at the first prediction.
"""

from collections import Counter
from collections.abc import Callable, Collection, Iterator, Mapping
from dataclasses import KW_ONLY, dataclass, field
from functools import update_wrapper
from typing import Annotated, Any, Protocol

import torch
import torch.nn.functional as F  # noqa: N812 (the usual name)
from torch import Tensor

from model.layers import Inputs
from model.method import OnlineLearner, classify
from model.modelfactory import Network
from model.optimizer import OPTIMIZERS
from utils.flag import Range, positive

VIEWS = ("gated", "gate", "both")  # what a head without gradient sees of a network
Features = Annotated[
    str, "what is seen of the network: the input of its head, its gate, or both side by side", VIEWS
]

Prior = tuple[float, float]
"""Shape and scale of an inverse gamma distribution."""


class Learner(Protocol):
    """Learns a stream of images once, in order, and says what it has learned.

    Labels are class ids in the pool. For a learner that trains the head of a network with fewer outputs than
    the pool has classes, labels are positions in the draw.
    """

    def learn(self, images: Inputs, labels: Tensor) -> None:
        """Learn images, or a network's frozen output of them, with labels [B], one after the other."""

    def predict(self, images: Inputs) -> Tensor:
        """[B] labels; -1 for images whose logits are not finite."""


@dataclass(frozen=True)
class Given:
    """What a run gives its learner, beside the network and the names of the parameters that may learn.

    Attributes:
        lr: step size; None for a learner that takes no steps.
        generator: for all that the learner draws (CPU). The run draws nothing else from it.
        prior: what `LearnerKind.fit` found; None without one.
    """

    lr: float | None = None
    generator: torch.Generator = field(default_factory=torch.Generator)
    prior: Prior | None = None


MakeLearner = Callable[..., Learner]
"""From a network that is the learner's to change, names of the parameters that may learn, `Given`, and
options by keyword."""


@dataclass(eq=False)
class LearnerKind:
    """A line of the table of learners; calling it makes a learner.

    Attributes:
        make: makes one. Its arguments by keyword alone are options, each of which is a flag.
        title: what treatments that use it are called after; empty for the paper's.
        takes_steps: whether it trains the network by gradient steps, with `--lr` and its search, `--rln` and
            what else belongs to those. Each class then needs an output of the network's head.
        fit: gives `Given.prior` from a network, the images of one meta-training class after the other, and
            the options.
    """

    make: MakeLearner
    title: str = ""
    takes_steps: bool = False
    fit: Callable[..., Prior] | None = None

    def __post_init__(self) -> None:
        update_wrapper(self, self.make, updated=())  # its flags, and what `--help` says of it

    def __call__(
        self, net: Network, trained: Collection[str], given: Given | None = None, **options: Any
    ) -> Learner:
        return self.make(net, trained, given or Given(), **options)

    def describe(self, chosen: Mapping[str, object], defaults: Mapping[str, object]) -> str:
        """The title and what of the options is not as by default: `streaming LDA --power 1`; of the paper's
        learner these options alone: `SGD`."""
        other = {name: value for name, value in chosen.items() if value != defaults[name]}
        if not self.title:
            return " ".join(map(str, other.values())).upper()
        spelled = {name: f"{value:g}" if isinstance(value, float) else value for name, value in other.items()}
        return self.title + "".join(f" --{name} {value}" for name, value in spelled.items())


Scores = Callable[[Tensor], Tensor]
"""From features [B, F] to a score of each class, [B, C]."""

TINY = 1e-30  # stands for a variance of zero


Steps = Annotated[str, "what takes the steps, at the learning rate of --lr or the search", OPTIMIZERS]


def adam_learner(
    net: Network, trained: Collection[str], given: Given, *, optimizer: Steps = "adam"
) -> Learner:
    """One step of `--optimizer` on each image."""
    kind, lr = OPTIMIZERS[optimizer], given.lr
    assert lr is not None
    return OnlineLearner(net, trained, lambda params: kind(params, lr))


@torch.no_grad()
def view(net: Network, images: Inputs, features: str, power: float) -> Tensor:
    """[B, F] what a head sees of images, or of a network's frozen output of them, in float64.

    On the device of the images, or on the CPU where that has no float64 (Apple's). Each part is raised to
    `power` (Tukey's ladder of powers; negative numbers keep their sign) and gets unit length, by itself.

    Args:
        features: one of `VIEWS`.
        power: 1 leaves the parts as they are.
    """
    parts = []
    if features != "gate":
        parts.append(net.features(images))
    if features != "gated":
        gate = net.gate(images)
        assert gate is not None, "the network has no gate"
        parts.append(gate.flatten(1))
    parts = [(part if part.device.type in ("cpu", "cuda") else part.cpu()).double() for part in parts]
    if power != 1:
        parts = [F.normalize(part.sign() * part.abs().pow(power)) for part in parts]
    return torch.cat(parts, 1)


@dataclass(eq=False)
class NearestClassMean:
    """The class whose mean is nearest (Euclidean).

    A subclass extends `add`, which sums up, and says in `solve` what follows from the sums.

    Attributes:
        counts: images of each class.
        sums: of what `add` was given of each class, [F].
        scores: what `solve` gives of all that is learned so far; None where it was not asked yet.
    """

    net: Network
    trained: Collection[str]
    given: Given
    _: KW_ONLY
    features: Features = "gated"
    power: Annotated[
        float,
        "exponent that features are raised to before they get unit length; 1 leaves them as they are",
        positive,
    ] = 0.5
    counts: Counter[int] = field(default_factory=Counter, init=False)
    sums: dict[int, Tensor] = field(default_factory=dict, init=False)
    scores: Scores | None = field(default=None, init=False)

    def learn(self, images: Inputs, labels: Tensor) -> None:
        """Add images to the sums of their classes [B]."""
        features = view(self.net, images, self.features, self.power)
        self.add(features, labels.to(features.device))
        self.scores = None

    def predict(self, images: Inputs) -> Tensor:
        """[B] the class with the largest score among those learned; -1 where scores are not finite."""
        if self.scores is None:
            self.scores = self.solve()
        given = classify(self.scores(view(self.net, images, self.features, self.power)))
        labels = torch.tensor(self.labels, device=given.device)
        return labels[given.clamp_min(0)].where(given >= 0, given)

    @property
    def labels(self) -> list[int]:
        """The classes learned, in the order of the columns of scores, which is not that of learning."""
        return sorted(self.counts)

    def means(self) -> Tensor:
        """[C, F] the sum of each class over its images."""
        return torch.stack([self.sums[label] / self.counts[label] for label in self.labels])

    def add(self, features: Tensor, labels: Tensor) -> None:
        """Sum up features [B, F] of the classes [B]."""
        for label in labels.unique().tolist():
            own = features[labels == label]
            self.counts[label] += len(own)
            self.sums[label] = self.sums.get(label, 0) + own.sum(0)

    def solve(self) -> Scores:
        """The score of each class, from the sums."""
        means = self.means()
        return lambda features: 2 * features @ means.t() - means.square().sum(1)


@dataclass(eq=False, kw_only=True)
class StreamingLDA(NearestClassMean):
    """Linear discriminant analysis with one covariance for all classes.

    Hayes and Kanan, *Lifelong machine learning with deep streaming linear discriminant analysis* (2020). The
    covariance S within classes becomes (1 - s) S + s mean(diag S) I, with s the shrinkage, and a class of
    mean m has the score x' S^-1 m - m' S^-1 m / 2. (Theirs is updated image by image with the means of that
    time, on which the order has an influence.)

    Attributes:
        products: [F, F] the sum of x x' over all images; a number before the first.
    """

    features: Features = "both"
    shrinkage: Annotated[
        float, "part of the covariance that is replaced by a multiple of the identity", Range(1e-6, 1)
    ] = 0.5
    products: Tensor = field(default_factory=lambda: torch.zeros(()), init=False)

    def add(self, features: Tensor, labels: Tensor) -> None:
        super().add(features, labels)
        if not self.products.ndim:
            self.products = features.new_zeros(features.shape[1], features.shape[1])
        self.products.addmm_(features.t(), features)

    def solve(self) -> Scores:
        means, s = self.means(), self.shrinkage
        counts = means.new_tensor([self.counts[label] for label in self.labels])
        within = (self.products - (means.t() * counts) @ means) / counts.sum()
        shrunk = (1 - s) * within
        # Rounding is all there is within classes of one image, and no covariance.
        rounding = 1e4 * torch.finfo(means.dtype).eps * self.products.diagonal().mean() / counts.sum()
        shrunk.diagonal().add_(s * within.diagonal().mean().clamp_min(rounding.clamp_min(TINY)))
        factor, failed = torch.linalg.cholesky_ex(shrunk)
        if failed:
            factor = torch.full_like(factor, torch.nan)
        weight = torch.cholesky_solve(means.t(), factor)  # [F, C]
        return lambda features: features @ weight - (means.t() * weight).sum(0) / 2


def normal_score(squares: Tensor, shape: Tensor, scale: Tensor) -> Tensor:
    """Log density, up to a constant, of the normal distribution with the most likely precision of a class.

    The precision has a gamma distribution, so that its mode is (shape - 1) / scale.

    Args:
        squares: squared distances to the mean of the class, [..., F].
        shape, scale: of the inverse gamma distribution of the variance; they broadcast to `squares`.

    Returns:
        the sum over the features, [...].
    """
    precision = (shape - 1).clamp_min(TINY) / scale
    return (precision.log() - squares * precision).sum(-1) / 2


def student_score(squares: Tensor, shape: Tensor, scale: Tensor) -> Tensor:
    """Log density, up to a constant, of the Student t distribution that unknown variances give.

    It has 2 shape degrees of freedom, and its scale is sqrt(scale / shape). Arguments and what it returns are
    as in `normal_score`.
    """
    # The difference of these logarithms is small, and is added up over all features.
    exact = shape if shape.device.type == "mps" else shape.double()
    constant = ((exact + 0.5).lgamma() - exact.lgamma()).to(squares)
    tail = (squares / (2 * scale)).log1p()
    return (constant - scale.log() / 2 - (shape + 0.5) * tail).sum(-1)


class NormalMAP(NearestClassMean):
    """A normal distribution with a variance for each class and feature, known by what is likely of it.

    GeMCL (Banayeeanzadeh et al., *Generative vs. discriminative: rethinking the meta-continual learning*,
    2021): the variance has an inverse gamma prior, here with one shape and scale for all features
    (`fit_prior`), and its most likely precision after the images of the class stands for it.
    """

    def add(self, features: Tensor, labels: Tensor) -> None:
        super().add(torch.cat([features, features.square()], 1), labels)

    def posterior(self) -> tuple[Tensor, Tensor, Tensor]:
        """The means [C, F] of the classes, and shape [C, 1] and scale [C, F] of their variances."""
        assert self.given.prior is not None
        shape, scale = self.given.prior
        means, squares = self.means().chunk(2, 1)
        counts = means.new_tensor([self.counts[label] for label in self.labels])[:, None]
        deviations = counts * (squares - means.square()).clamp_min(0)
        return means, shape + counts / 2, scale + deviations / 2

    def solve(self) -> Scores:
        means, shape, scale = self.posterior()
        precisions = (shape - 1).clamp_min(TINY) / scale
        own = means * precisions
        constant = (means * own - precisions.log()).sum(1) / 2
        return lambda features: features @ own.t() - features.square() @ precisions.t() / 2 - constant


class Predictive(NormalMAP):
    """A Student t distribution for each class and feature: `NormalMAP` with all variances in place of one.

    GeMCL's predictive head. The mean of a class is taken as known.
    """

    def solve(self) -> Scores:
        means, shape, scale = self.posterior()
        constant = student_score(torch.zeros_like(means), shape, scale)
        # Logarithms take most of the time, so each is that of a product of four numbers, of 1 for padding.
        padding = (0, -means.shape[1] % 4)
        means, factors = F.pad(means, padding), F.pad(0.5 / scale, padding)

        def scores(features: Tensor) -> Tensor:
            features, tails = F.pad(features, padding), []
            # Class by class: distances to all classes at once would take a gigabyte.
            for mean, factor in zip(means, factors, strict=True):
                ratios = (features - mean).square_().mul_(factor).add_(1)
                tails.append(ratios.unflatten(1, (4, -1)).prod(1).log_().sum(1))
            return constant - (shape[:, 0] + 0.5) * torch.stack(tails, 1)

        return scores


Score = Callable[[Tensor, Tensor, Tensor], Tensor]
"""A log density by squared distances, and shape and scale of the variances' distribution."""

GEMCL_SCORES: dict[str, Score] = {"predictive": student_score, "map": normal_score}


def with_own(values: Tensor, own: Tensor) -> Tensor:
    """Values [W * K, W] of images, class after class, with those of own classes from `own` [W, K]."""
    classes = torch.arange(len(own), device=own.device).repeat_interleave(own.shape[1])
    return values.scatter(1, classes[:, None], own.flatten()[:, None])


def gemcl_logits(features: Tensor, shots: int | None, score: Score, shape: Tensor, scale: Tensor) -> Tensor:
    """Logits of the queries of an episode: the log density that GeMCL gives each class.

    Args:
        features, shots: as in `model.outer_loops.prototype_logits`. Without `shots`, the number of images and
            the sum of squares of an image's own class leave that image out as well. The variances of the
            other classes are those of all K images, taken for those of K - 1: under a prior of large
            variances one image more makes a class more likely for each feature, and its own class would be
            the least likely for every image.
        score: `normal_score` or `student_score`.
        shape, scale: of the prior of the variances.

    Returns:
        as `prototype_logits`.
    """
    learned, queries = features[:, :shots], features[:, shots or 0 :].flatten(0, 1)
    means, images = learned.mean(1), learned.shape[1]
    squares = (learned - means[:, None]).square()
    deviations, counted = squares.sum(1), images
    if shots is None:
        counted = images - 1
        deviations = deviations * ((counted - 1) / counted)
    shape = shape + counted / 2
    logits = score((queries[:, None] - means).square(), shape, scale + deviations / 2)
    if shots is None:
        ratio = images / counted
        left = (squares.sum(1, keepdim=True) - ratio * squares).clamp_min(0)
        logits = with_own(logits, score(ratio**2 * squares, shape, scale + left / 2))
    return logits


@torch.no_grad()
def fit_prior(
    net: Network, classes: Iterator[Inputs], *, features: str = "gated", power: float = 0.5
) -> Prior:
    """The most likely inverse gamma distribution of the classes' variances.

    As in GeMCL's evaluation, a class counts with one number, the mean of its variances over the features. The
    prior of all variances of all features would be wide and of no use.

    Args:
        classes: the images of one class after the other, two or more each.
        features, power: see `view`.
    """
    return inverse_gamma(
        torch.stack([view(net, images, features, power).var(0).mean() for images in classes])
    )


def inverse_gamma(values: Tensor) -> Prior:
    """The inverse gamma distribution under which positive values [N], in float64, are most likely.

    Their inverses have a gamma distribution. Its shape is found by Newton's method in 1 / shape, which
    converges in four steps or so (Minka, *Estimating a gamma distribution*, 2002). The shape is 5e7 at most,
    also where all values are equal. Left out are values a million times smaller than the median: variances
    of classes of copies of one image.
    """
    values = values[values >= 1e-6 * values.median()]
    precisions = 1 / values.clamp_min(TINY)
    spread = (precisions.mean().log() - precisions.log().mean()).clamp_min(1e-8)
    shape = (3 - spread + ((spread - 3).square() + 24 * spread).sqrt()) / (12 * spread)
    for _ in range(10):
        slope = 1 / shape - torch.polygamma(1, shape)
        shape = 1 / (1 / shape + (shape.log() - shape.digamma() - spread) / (shape.square() * slope))
    return shape.item(), (shape / precisions.mean()).item()


LEARNERS: dict[str, LearnerKind] = {
    "adam": LearnerKind(adam_learner, takes_steps=True),
    "ncm": LearnerKind(NearestClassMean, "nearest class mean"),
    "map": LearnerKind(NormalMAP, "GeMCL-MAP", fit=fit_prior),
    "predictive": LearnerKind(Predictive, "GeMCL predictive", fit=fit_prior),
    "slda": LearnerKind(StreamingLDA, "streaming LDA"),
}
"""What `--learner` may name. Defaults are what is best for ANML (see `docs/heads.md`)."""
