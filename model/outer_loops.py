"""The outer loops: how the weights that a meta-test starts from are trained, by name in `OUTER_LOOPS`.

The method of the paper is `model.method`: `TrajectoryLoop`
draws head rows anew, takes the meta-gradient of trajectories and steps along it with Adam. The fields of a
loop are its flags.
"""

import math
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from functools import cached_property
from typing import Annotated, Any, ClassVar

import torch
import torch.nn.functional as F  # noqa: N812 (the usual name)
from torch import Tensor, nn

from datasets.images import ImageSet
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
from model.learner import GEMCL_SCORES, gemcl_logits, with_own
from model.method import Examples, InnerLoop, MakeRule, Params, inner_loop, kept_rule
from model.modelfactory import head_rows, reset_head, trained_parameters
from model.outer_loop import Measured, OuterLoop, gather
from utils.errors import UserError
from utils.flag import Range, positive


@dataclass(eq=False, kw_only=True)
class SequenceLoop(OuterLoop):
    """What loops have in common that learn a class image by image, and are measured on it and on others.

    Attributes:
        inner: settings of the inner loop.
        params: the parameters that the inner loop changes.
        meta_loss: gives the loss of the query after the inner loop; see `method.meta_loss`.
    """

    rln: Annotated[
        int | None,
        "layers frozen in the inner loop, counted from the input (7: the whole neuromodulatory network of "
        "ANML; 6: the convolutions of OML); the outer step trains all; without it 7 for ANML, 6 for OML, 0 "
        "for sANML, `rln_training` of another",
        Range(0),
    ] = None
    update_lr: Annotated[float, "learning rate of the inner SGD", positive] = 0.1
    update_step: Annotated[int, "inner steps, that is images, per trajectory", Range(1)] = 20
    tasks: Annotated[int, "classes per trajectory, sharing the --update_step images", Range(1)] = 1
    remember: Annotated[int, "random images added to the trajectory's in the loss", Range(1)] = 64
    reset: Annotated[bool, "re-draw the head's rows of the classes of a trajectory before its inner loop"] = (
        True
    )
    rates = ("meta_lr", "update_lr")

    def __post_init__(self) -> None:
        names = trained_parameters(self.net, self.net.rln_training if self.rln is None else self.rln)
        self.params: Params = {name: self.net.get_parameter(name) for name in names}
        inner = self.inner_loop(vars(self), self.make_rule)
        assert inner is not None
        self.inner, self.rule = kept_rule(inner, self.params)
        self.trajectory = {name: getattr(self, name) for name in ("update_step", "tasks", "remember")}
        self.meta_loss, self.meta_grads = self.backend.meta_loss, self._meta_grads
        super().__post_init__()

    def check(self, images: ImageSet) -> None:
        images.require(longest_share(self.update_step, self.tasks), f"--update_step {self.update_step}")
        sample_trajectory(images.sizes, torch.Generator(), **self.trajectory)

    def draw(self) -> tuple[Any, ...]:
        """The remember set of a trajectory, then the trajectory."""
        trajectory = sample_trajectory(self.images.sizes, self.generator, **self.trajectory)
        return trajectory.query[: self.remember], trajectory

    def _differentiate(self, trajectory: Trajectory) -> tuple[Sequence[Tensor], Measured]:
        """The gradient of one trajectory, a tensor for each of `learned`, and what it measured."""
        images, labels = gather(self.images, trajectory.query)
        return self.meta_grads(images, labels, labels[-len(trajectory.support) :])

    def _meta_grads(
        self, images: Tensor, labels: Tensor, support: Tensor
    ) -> tuple[Sequence[Tensor], Measured]:
        """What `_differentiate` gives, from tensors alone.

        Args:
            images, labels: of the query.
            support: the labels of the trajectory.
        """
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


@dataclass(eq=False, kw_only=True)
class TrajectoryLoop(SequenceLoop):
    """Meta-trains a network with Adam, one trajectory per step or the mean over several (the paper).

    No step reads a value back from the device.
    """

    meta_batch: Annotated[
        int,
        "trajectories per outer step, whose meta-gradients are averaged; under torchrun the processes share "
        "them",
        Range(1),
    ] = 1
    first_order: Annotated[
        bool,
        "take inner gradients as constants, as the released code does, instead of differentiating through "
        "the inner loop",
    ] = False
    second_order_steps: Annotated[
        int | None,
        "differentiate through this many last inner steps and take the gradients of those before as "
        "constants; 0 is --first_order; without it all",
        Range(0),
    ] = None
    reset_copy: Annotated[
        bool,
        "re-draw them in the copy of the weights that the inner loop changes alone, as the paper is said to, "
        "and not for good, as the released code",
    ] = False
    several = True

    @classmethod
    def inner_loop(cls, flags: Mapping[str, Any], rule: MakeRule | None = None) -> InnerLoop:
        return InnerLoop(flags["update_lr"], 0 if flags["first_order"] else flags["second_order_steps"], rule)

    @classmethod
    def validate(cls, flags: Mapping[str, Any]) -> None:
        if flags["reset_copy"] and not flags["reset"]:
            raise UserError("--reset_copy says where rows are drawn anew: drop it or --no-reset")
        if flags["first_order"] and flags["second_order_steps"]:
            raise UserError(
                "--first_order differentiates through no inner step: drop it or --second_order_steps"
            )

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.backend.capture is not None:
            self.meta_grads = self.backend.capture(self._meta_grads, self.net)

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
        buffers = [buffer for buffer in self.net.buffers() if buffer.dtype != torch.bool]
        before = [buffer.clone() for buffer in buffers]
        sums: list[Tensor] = []
        for seed, trajectory in self.group.shard(list(zip(seeds, trajectories, strict=True))):
            torch.manual_seed(seed)
            for buffer, value in zip(buffers, before, strict=True):
                buffer.copy_(value)
            grads, measured = self._differentiate(trajectory)
            # Exactly 0 where a buffer has not moved, even at infinity (a mask).
            moved = [
                torch.where(buffer == value, torch.zeros_like(buffer), buffer - value).to(grads[0])
                for buffer, value in zip(buffers, before, strict=True)
            ]
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


@dataclass(eq=False, kw_only=True)
class AlternatingLoop(SequenceLoop):
    """Learns without a meta-gradient: inner steps change the network itself, then Adam steps on the query.

    Frati et al., *Reset it and forget it: relearning last-layer weights improves continual and transfer
    learning* (2024), where it is called alternating sequential and batch learning (ASB), with zapping, which
    draws the head's row of the class anew. Adam's gradient is that at the weights after the inner steps.
    """

    @classmethod
    def inner_loop(cls, flags: Mapping[str, Any], rule: MakeRule | None = None) -> InnerLoop:
        return InnerLoop(flags["update_lr"], 0, rule)

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.rule is not None:
            raise UserError("--learner asb has no meta-gradient that an --inner_rule could learn by")
        self.meta_loss = _loss_after

    def differentiate(self, trajectory: Trajectory) -> Measured:
        """Reset head rows, make the inner steps and leave the gradient of the query's loss in `grads`.

        Returns:
            as `TrajectoryLoop.differentiate`.
        """
        self.before = [value.clone() for value in self.net.state_dict().values()]
        if self.reset:
            reset_head(self.net, self.generator, trajectory.classes)
        self.grads, measured = self._differentiate(trajectory)
        return measured

    def undo(self) -> None:
        for value, before in zip(self.net.state_dict().values(), self.before, strict=True):
            value.copy_(before)


def _loss_after(
    net: nn.Module, params: Params, support: Examples, query: Examples, inner: InnerLoop
) -> tuple[Tensor, Tensor, Tensor]:
    """As `method.meta_loss`, at the params themselves, which the inner loop changes in place."""
    fast_params, inner_losses = inner_loop(net, params, *support, inner)
    with torch.no_grad():
        for name, p in params.items():
            p.copy_(fast_params[name])
    logits: Tensor = net(query[0])
    return F.cross_entropy(logits, query[1]), logits, inner_losses


def prototype_logits(features: Tensor, shots: int | None) -> Tensor:
    """Logits of the queries of an episode: minus squared distance to each class mean, over sqrt(F).

    Args:
        features: [W, K, F] of K images of each of W classes.
        shots: images of each class that its mean is of; the others are the queries. None: all images are
            queries, and the means are those of all images. The mean of an image's own class leaves that image
            out.

    Returns:
        [W * (K - shots), W] or [W * K, W], class after class.
    """
    _, images, size = features.shape
    means, queries = features[:, :shots].mean(1), features[:, shots or 0 :].flatten(0, 1)
    distances = (queries**2).sum(1, keepdim=True) + (means**2).sum(1) - 2 * queries @ means.t()
    if shots is None:  # from the mean of the others it is K / (K - 1) times as far as from the mean of all
        own = (features - means[:, None]).pow(2).sum(2) * (images / (images - 1)) ** 2
        distances = with_own(distances, own)
    return -distances / math.sqrt(size)


@dataclass(eq=False, kw_only=True)
class EpisodeLoop(OuterLoop):
    """Trains the layers below the head for a head of class means, one episode per step.

    Snell et al., *Prototypical networks for few-shot learning* (2017). An episode draws classes and a few
    images of each. The means of their features are the head, and the loss is how well the head tells the
    classes of other images. Nothing is adapted, so a step has one gradient and no inner loop. At meta-test
    running sums give such a head in one pass over the stream, and forget nothing.

    See `sample_episode`, `prototype_logits` and `distort`.
    """

    ways: Annotated[int, "classes of an episode", Range(2)] = 60
    shots: Annotated[int, "images of each that its mean is of", Range(1)] = 3
    queries: Annotated[int, "images of each that are to be classified", Range(1)] = 2
    leave_one_out: Annotated[
        bool, "classify all the images of an episode, each by its class's mean of the others"
    ] = False
    symmetries: Annotated[
        int,
        "classes that each class stands for: 1, as it was drawn; 4, turned by quarters as well; 8, mirrored "
        "as well",
        (1, 4, 8),
    ] = 1
    augment: Annotated[
        float,
        "strength of a random turn, stretch, shear and shift of every other image; 1 for up to 12 degrees, "
        "15 %, 0.15 and 2 pixels",
        Range(0),
    ] = 0.0
    defaults: ClassVar = {"cosine": True}
    trains_head = False
    head: str = field(default="ncm", init=False)
    numbers: ClassVar[Mapping[str, float]] = {"scale": 1.0}
    """Positive numbers that the logits have, which learn with the weights, and where they start."""

    def __post_init__(self) -> None:
        device = self.images.rows.device
        logs = {name: torch.tensor(math.log(start), device=device) for name, start in self.numbers.items()}
        self.rule = nn.ParameterDict({f"log_{name}": nn.Parameter(value) for name, value in logs.items()})
        self.learned_shots = None if self.leave_one_out else self.shots
        self.episode = {"ways": self.ways, "images": self.shots + self.queries, "symmetries": self.symmetries}
        super().__post_init__()

    def logits(self, features: Tensor, **numbers: Tensor) -> Tensor:
        """Logits of the queries, as `prototype_logits` gives them, with the values of `numbers`."""
        return numbers["scale"] * prototype_logits(features, self.learned_shots)

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
            `loss` and `accuracy` of the queries, and the `numbers` that the logits were made with.
        """
        images, _ = gather(self.images, episode.index)  # [W, K, C, S, S]
        ways = len(images)
        images = show(images, episode.symmetries).flatten(0, 1)
        if self.augment:
            images = distort(images, self.generator, self.augment)
        features = self.net.features(images).unflatten(0, (ways, -1))
        assert self.rule is not None
        numbers = {name: self.rule.get_parameter(f"log_{name}").exp() for name in self.numbers}
        logits = self.logits(features, **numbers)
        labels = torch.arange(ways, device=logits.device).repeat_interleave(len(logits) // ways)
        return {
            **self.classified(logits, labels),
            **{name: number.detach() for name, number in numbers.items()},
        }


@dataclass(eq=False, kw_only=True)
class GeMCLLoop(EpisodeLoop):
    """Trains the layers below the head for a head of GeMCL: normal distributions with a prior.

    Banayeeanzadeh et al., *Generative vs. discriminative: rethinking the meta-continual learning* (2021).
    Episodes are those of `EpisodeLoop`. The logits are log densities, and the shape and scale of the prior
    learn with the weights. A meta-test fits a prior anew, as published (`model.learner.fit_prior`).
    """

    gemcl_head: Annotated[
        str,
        "density of a class: predictive, a Student t distribution; map, a normal distribution with the most "
        "likely variances",
        tuple(GEMCL_SCORES),
    ] = "predictive"
    numbers: ClassVar = {"shape": 100.0, "scale": 1000.0}

    def __post_init__(self) -> None:
        super().__post_init__()
        self.head = self.gemcl_head

    def logits(self, features: Tensor, **numbers: Tensor) -> Tensor:
        """Logits of the queries, as `gemcl_logits` gives them."""
        return gemcl_logits(features, self.learned_shots, GEMCL_SCORES[self.gemcl_head], **numbers)


@dataclass(eq=False, kw_only=True)
class BatchLoop(OuterLoop):
    """Trains all layers on shuffled images of all classes: the first half of Pretrain & Transfer.

    What meta-learning adds shows in comparison. Classes and number of images are those of meta-training. The
    network is trained to tell these classes apart, and not to learn new ones without forgetting.

    The seed of the generator gives all batches.
    """

    batch_size: Annotated[
        int, "images per step; 84 are as many as a step of the paper's meta-training sees", Range(1)
    ] = 84
    # The network of Pretrain & Transfer is OML's, which has no norm and needs the smaller rate.
    defaults: ClassVar = {"treatment": "OML", "meta_lr": 0.0001}
    model_name = "Pretrain_Model.net"
    weights = "pretrained"

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
    "gemcl": GeMCLLoop,
    "iid": BatchLoop,
    "asb": AlternatingLoop,
}
"""What `--learner` of a training may name. An entry is called with what the run gives to an
`OuterLoop`, and with its own flags."""
