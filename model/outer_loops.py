"""The outer loops: how the weights that a meta-test starts from are trained, by name in `OUTER_LOOPS`.

A step is `draw`, `differentiate` and `update`. The method of the paper is `model.method`: `TrajectoryLoop`
draws head rows anew, takes the meta-gradient of trajectories and steps along it with Adam.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Sequence
from dataclasses import KW_ONLY, dataclass, field
from functools import cached_property
from typing import Any, ClassVar

import torch
import torch.nn.functional as F  # noqa: N812 (the usual name)
from torch import Tensor, nn

from datasets.images import ImageSet, Pool
from datasets.task_sampler import (
    Episode,
    Trajectory,
    distort,
    longest_share,
    sample_episode,
    sample_trajectory,
    show,
    shuffled_batches,
)
from model import method
from model.method import InnerLoop, MetaLoss, Params, kept_rule
from model.modelfactory import Network, head_rows, reset_head, trained_parameters
from model.optimizer import Adam
from utils.distributed import Group, seed_layers

Measured = dict[str, Tensor]
"""Numbers of one step by name, as tensors on the device, before its update: the loss first."""

Capture = Callable[[Callable[..., Any], nn.Module], Callable[..., Any]]
"""From a function of tensors that computes with a network to one with the same results."""


@dataclass(eq=False)
class OuterLoop:
    """What outer loops have in common: the weights that learn, and Adam on their gradient.

    Attributes:
        net: the network, on the device where training happens.
        images: meta-training classes on the same device, normalised; [C, D, 1, 28, 28] where all classes
            have as many images.
        generator: draws what a step needs (CPU).
        meta_lr: Adam's step size.
        rule: holds what learns beside the network; training states and model files keep it.
        learned: the parameters that learn.
        grads: the gradient that `differentiate` leaves, a tensor for each of `learned`.
        inner_loop: whether a step has an inner loop. Processes can share the trajectories of such a step.
        head: what learns in small meta-tests of the network, a key of `model.learner.LEARNERS`.
        trains_head: whether the head's parameters learn.
        rates: names of the flags to lower where a step diverges.
    """

    net: Network
    images: Pool
    generator: torch.Generator
    _: KW_ONLY
    meta_lr: float
    inner_loop: ClassVar[bool] = False
    head: ClassVar[str] = "adam"
    trains_head: ClassVar[bool] = True
    rates: ClassVar[tuple[str, ...]] = ("meta_lr",)
    rule: nn.Module | None = field(default=None, init=False)
    grads: Sequence[Tensor] = field(default=(), init=False)

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

    def finite(self) -> bool:
        """Whether the gradient in `grads` is; waits for the device."""
        return bool(torch.nn.utils.get_total_norm(self.grads).isfinite())

    def update(self) -> None:
        """Make one Adam step along `grads`."""
        self.optimizer.step(self.grads)

    def step(self, *drawn: Any) -> Measured:
        """Differentiate and update."""
        measured = self.differentiate(*drawn)
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


@dataclass(eq=False, kw_only=True)
class TrajectoryLoop(OuterLoop):
    """Meta-trains a network with Adam, one trajectory per step or the mean over several.

    No step reads a value back from the device.

    Args:
        inner: settings of the inner loop.
        rln: layers that the inner loop leaves alone; the outer step trains everything.
        update_step, tasks, remember: see `sample_trajectory`.
        meta_batch: trajectories of a step.
        reset: draw the sampled classes' rows of the head anew before each trajectory.
        reset_copy: with `reset`, in the inner loop's copy of the weights alone.
        group: the processes that share the trajectories of a step.
        meta_loss: `method.meta_loss`, or what gives the same numbers faster.
        capture: turns the meta-gradient into a function that may be faster, and whose results the next call
            may overwrite.
    """

    inner: InnerLoop
    rln: int
    update_step: int = 20
    tasks: int = 1
    remember: int = 64
    meta_batch: int = 1
    reset: bool = True
    reset_copy: bool = False
    group: Group = field(default_factory=Group)
    meta_loss: MetaLoss = method.meta_loss
    capture: Capture | None = None
    inner_loop = True
    rates = ("meta_lr", "update_lr")

    def __post_init__(self) -> None:
        names = trained_parameters(self.net, self.rln)
        self.params: Params = {name: self.net.get_parameter(name) for name in names}
        self.inner, self.rule = kept_rule(self.inner, self.params)
        self.meta_grads = self.capture(self._meta_grads, self.net) if self.capture else self._meta_grads
        self.trajectory = {name: getattr(self, name) for name in ("update_step", "tasks", "remember")}
        super().__post_init__()

    def check(self, images: ImageSet) -> None:
        images.require(longest_share(self.update_step, self.tasks), f"--update_step {self.update_step}")
        sample_trajectory(images.sizes, torch.Generator(), **self.trajectory)

    def draw(self) -> tuple[Any, ...]:
        """The remember set of the first trajectory, then the trajectories."""
        size = self.images.sizes, self.generator
        trajectories = [sample_trajectory(*size, **self.trajectory) for _ in range(self.meta_batch)]
        return trajectories[0].query[: self.remember], *trajectories

    def differentiate(self, *trajectories: Trajectory) -> Measured:
        """Reset head rows, then leave the mean meta-gradient in `grads`.

        The rows are drawn anew in the meta-weights themselves and for good, so that the head cannot remember
        a class that the network has met before; bias and Adam moments stay (released code,
        `reset_classifer`). The rows of all trajectories are drawn before the first trajectory is learned, in
        all processes. The processes then share the trajectories; there are no fewer of these. The buffers
        move by the mean of what each trajectory moves them by.

        With `reset_copy` the meta-weights get their rows back, whose gradient is zero, since the loss does
        not depend on them (paper, second-hand).

        Returns:
            means over the trajectories: `loss`, the mean cross-entropy of the query images at the adapted
            weights; `accuracy_trajectory`, the fraction of the support images classified right then;
            `accuracy_remember`, the same of the remember images.
        """
        classes = [label for trajectory in trajectories for label in trajectory.classes]
        rows = [self.net.get_parameter(name) for name in head_rows(self.net) if self.reset_copy]
        kept = [parameter.detach()[classes] for parameter in rows]
        if self.reset:
            reset_head(self.net, self.generator, classes)
        measured = self._differentiate_all(trajectories)
        with torch.no_grad():
            for parameter, values in zip(rows, kept, strict=True):
                parameter[classes] = values
                for learned, grad in zip(self.learned, self.grads, strict=True):
                    if learned is parameter:
                        grad[classes] = 0
        return measured

    def _differentiate_all(self, trajectories: Sequence[Trajectory]) -> Measured:
        """Leave the mean meta-gradient in `grads`."""
        if len(trajectories) == 1:
            self.grads, measured = self._differentiate(*trajectories)
            return measured
        # Layers draw (dropout) and move their buffers (running statistics) for each trajectory as if it were
        # alone: otherwise both would depend on which process takes which trajectory.
        seeds = torch.randint(2**62, (len(trajectories),)).tolist()
        buffers = list(self.net.buffers())
        before = [buffer.clone() for buffer in buffers]
        sums: list[Tensor] = []
        for seed, trajectory in self.group.shard(list(zip(seeds, trajectories, strict=True))):
            seed_layers(seed)
            for buffer, value in zip(buffers, before, strict=True):
                buffer.copy_(value)
            grads, measured = self._differentiate(trajectory)
            moved = [_moved(*pair).to(grads[0]) for pair in zip(buffers, before, strict=True)]
            found = [*grads, *measured.values(), *moved]
            if sums:
                torch._foreach_add_(sums, found)
            else:
                sums = [value.clone() for value in found]
        means = [value / len(trajectories) for value in self.group.all_reduce(sums)]
        for buffer, value in zip(reversed(buffers), reversed(before), strict=True):
            mean = means.pop()
            buffer.copy_(value + (mean if buffer.is_floating_point() else mean.round().to(buffer.dtype)))
        self.grads = means[: len(self.learned)]
        return dict(zip(measured, means[len(self.learned) :], strict=True))

    def _differentiate(self, trajectory: Trajectory) -> tuple[Sequence[Tensor], Measured]:
        """The meta-gradient of one trajectory, a tensor for each of `learned`, and what it measured."""
        images, labels = gather(self.images, trajectory.query)
        grads, measured = self.meta_grads(images, labels, labels[-len(trajectory.support) :])
        return grads, measured

    def _meta_grads(
        self, images: Tensor, labels: Tensor, support: Tensor
    ) -> tuple[Sequence[Tensor], Measured]:
        """:meth:`_differentiate` of the query's images and labels, and of the trajectory's labels."""
        steps = len(support)
        # The query ends with the trajectory, so one pass of it through the frozen part serves both loops.
        inputs = self.net.frozen(images, self.params)
        examples = (inputs[-steps:], support), (inputs, labels)
        loss, logits, _ = self.meta_loss(self.net, self.params, *examples, self.inner)
        grads = self.grads_of(loss)
        right = (logits.detach().argmax(1) == labels).to(loss.dtype)
        return grads, {
            "loss": loss.detach(),
            "accuracy_trajectory": right[-steps:].mean(),
            "accuracy_remember": right[:-steps].mean(),
        }


def _moved(buffer: Tensor, before: Tensor) -> Tensor:
    """How far a buffer has moved: exactly 0 where it has not, even at infinity (a mask)."""
    return torch.where(buffer == before, torch.zeros_like(buffer), buffer - before)


def prototype_logits(features: Tensor, shots: int, leave_one_out: bool = False) -> Tensor:
    """Logits of the queries of an episode: minus squared distance to each class mean, over sqrt(F).

    Args:
        features: [W, K, F] of K images of each of W classes.
        shots: images of each class that its mean is of; the others are the queries.
        leave_one_out: all images are queries, and the means are those of all images. The mean of an image's
            own class leaves that image out.

    Returns:
        [W * (K - shots), W] or [W * K, W], class after class.
    """
    ways, images, size = features.shape
    means = features.mean(1) if leave_one_out else features[:, :shots].mean(1)
    queries = (features if leave_one_out else features[:, shots:]).flatten(0, 1)
    distances = (queries**2).sum(1, keepdim=True) + (means**2).sum(1) - 2 * queries @ means.t()
    if leave_one_out:  # from the mean of the others it is K / (K - 1) times as far as from the mean of all
        own = (features - means[:, None]).pow(2).sum(2) * (images / (images - 1)) ** 2
        classes = torch.arange(ways, device=features.device).repeat_interleave(images)
        distances = distances.scatter(1, classes[:, None], own.flatten()[:, None])
    return -distances / math.sqrt(size)


@dataclass(eq=False, kw_only=True)
class EpisodeLoop(OuterLoop):
    """Trains the layers below the head for a head of class means, one episode per step.

    Snell et al., *Prototypical networks for few-shot learning* (2017). An episode draws classes and a few
    images of each. The means of their features are the head, and the loss is how well the head tells the
    classes of other images. Nothing is adapted, so a step has one gradient and no inner loop. At meta-test
    running sums give such a head in one pass over the stream, and forget nothing.

    Args:
        meta_lr: Adam's step size at the first step.
        steps: length of the cosine schedule, at whose end the step size is 0.
        ways, symmetries: see `sample_episode`.
        shots, leave_one_out: see `prototype_logits`.
        queries: images of each class beside `shots`.
        augment: strength of `distort` on every image.
    """

    steps: int
    ways: int = 60
    shots: int = 3
    queries: int = 2
    leave_one_out: bool = False
    symmetries: int = 1
    augment: float = 0
    head = "ncm"
    trains_head = False

    def __post_init__(self) -> None:
        # The logits have a learned scale, kept positive.
        self.log_scale = nn.Parameter(torch.zeros((), device=self.images.rows.device))
        self.rule = nn.ParameterDict({"log_scale": self.log_scale})
        self.episode = {"ways": self.ways, "images": self.shots + self.queries, "symmetries": self.symmetries}
        super().__post_init__()

    def check(self, images: ImageSet) -> None:
        images.require(self.episode["images"], f"--shots {self.shots} and --queries {self.queries}")
        sample_episode(images.sizes, torch.Generator(), **self.episode)

    def draw(self) -> tuple[Any, ...]:
        """An image of each class of the episode, then the episode."""
        episode = sample_episode(self.images.sizes, self.generator, **self.episode)
        return episode.index[:, 0], episode

    def differentiate(self, episode: Episode) -> Measured:
        """Leave the gradient of an episode's loss in `grads`.

        Returns:
            `loss` and `accuracy` of the queries, and `scale`, which multiplied the logits.
        """
        images, _ = gather(self.images, episode.index)  # [W, K, C, 28, 28]
        ways = len(images)
        images = show(images, episode.symmetries).flatten(0, 1)
        if self.augment:
            images = distort(images, self.generator, self.augment)
        features = self.net.features(images).unflatten(0, (ways, -1))
        scale = self.log_scale.exp()
        logits = scale * prototype_logits(features, self.shots, self.leave_one_out)
        labels = torch.arange(ways, device=logits.device).repeat_interleave(len(logits) // ways)
        return {**self.classified(logits, labels), "scale": scale.detach()}

    def update(self) -> None:
        done = self.optimizer.steps[0].item()
        self.optimizer.lr = self.meta_lr * (1 + math.cos(math.pi * done / self.steps)) / 2
        super().update()


@dataclass(eq=False, kw_only=True)
class BatchLoop(OuterLoop):
    """Trains all layers on shuffled images of all classes: the first half of Pretrain & Transfer.

    What meta-learning adds shows in comparison. Classes and number of images are those of meta-training. The
    network is trained to tell these classes apart, and not to learn new ones without forgetting.

    Args:
        generator: its seed gives all batches.
        batch_size: images per step.
    """

    batch_size: int

    @cached_property
    def batches(self) -> Iterator[Tensor]:
        """For each step [batch_size, 2] (class, image). The first use of this property leaves out the batches
        of the steps that Adam has made: it comes after a training state is restored."""
        done = int(self.optimizer.steps[0].item())
        seed = self.generator.initial_seed()
        return shuffled_batches(self.images.sizes, seed, batch_size=self.batch_size, skip=done)

    def draw(self) -> tuple[Any, ...]:
        """The batch, twice."""
        batch = next(self.batches)
        return batch, batch

    def differentiate(self, index: Tensor) -> Measured:
        """Leave the gradient of a batch's loss in `grads`; returns its `loss` and `accuracy`.

        Args:
            index: [B, 2] (class, image).
        """
        images, labels = gather(self.images, index)
        return self.classified(self.net(images), labels)


OUTER_LOOPS: dict[str, type[OuterLoop]] = {
    "sgd": TrajectoryLoop,
    "prototypes": EpisodeLoop,
    "iid": BatchLoop,
}
"""What `--learner` of a training may name. Keyword arguments of an entry are flags of the same name, or parts
of a run."""


def gather(pool: Pool, index: Tensor) -> tuple[Tensor, Tensor]:
    """Images [..., C, 28, 28], or other rows of a pool, and class ids [...] of an index [..., 2] of (class,
    image), which may lie on the CPU."""
    device = pool.rows.device
    return pool.rows[send(pool.positions(index), device)], send(index, device)[..., 0]


def send(tensor: Tensor, device: torch.device) -> Tensor:
    """A tensor of the CPU on a device, without waiting where that is safe.

    MPS would read the memory after another tensor has taken it.
    """
    return tensor.to(device, non_blocking=device.type == "cuda")
