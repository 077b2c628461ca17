"""Meta-test: learn unseen classes one after the other, image by image, and see what is remembered.

One loop serves every treatment: what is trained is a matter of `rln` and of which layers start anew.
"""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Collection, Sequence
from dataclasses import dataclass, field, replace
from fractions import Fraction
from functools import cached_property
from statistics import fmean
from typing import Literal, NamedTuple

import numpy as np
import torch
from torch import Tensor

from model.episodes import Task, sample_task
from model.heads import NearestClassMean, NormalMAP, StreamingLDA, fit_prior
from model.layers import FrozenOutput, Inputs
from model.learner import Fit, Learner, LearnerKind, MakeLearner, Prior, Settings
from model.meta_learner import gather, send
from model.method import OnlineLearner
from model.modelfactory import Network, reset_head, reset_parameters, shared_copy, trained_parameters
from model.optimizer import OPTIMIZERS
from model.scores import Answers, Score
from utils.errors import UserError

Purpose = Literal["search", "report", "validation"]
PURPOSES: tuple[Purpose, ...] = ("search", "report", "validation")  # each has draws of its own

CHUNK = 100  # images that pass through frozen layers, or are tested, at a time
BUDGET = 2 * 2**30  # bytes of frozen outputs kept; beyond it they are recomputed for every pass


class FrozenOutputs:
    """What a network's frozen part makes of the images of a pool, computed once per image, when needed.

    It does not change at meta-test, whatever the learning rate and the run: the search and all runs share
    it. A class is always computed as one batch, so that its numbers do not depend on which run met it
    first.

    Args:
        net: the network to be tested.
        images: [C, 20, 1, 28, 28] the pool, on the device of the network.
        trained: names of the parameters that learn.
        budget: bytes to spend. A pool that needs more is not kept, and `get` computes every time.
    """

    def __init__(self, net: Network, images: Tensor, trained: Collection[str], budget: int = BUDGET) -> None:
        self.net = net
        self.images = images
        self.trained = trained
        with torch.no_grad():
            self.sample = net.frozen(images[0, :1], trained)
        self.kept: tuple[Tensor, ...] = ()
        # Where nothing is frozen there is nothing to keep but the images themselves.
        if isinstance(self.sample, FrozenOutput) and any(self.sample.done):
            parts = self.sample.activations
            size = sum(part.numel() * part.element_size() for part in parts) * images[:, :, 0, 0, 0].numel()
            if size <= budget:
                self.kept = tuple(part.new_empty(*images.shape[:2], *part.shape[1:]) for part in parts)
        self.known = [False] * len(images)

    @torch.no_grad()
    def get(self, index: Tensor) -> Inputs:
        """For the images at `index`, [K, 2] (class, drawing) on the CPU; K rows."""
        if not self.kept:
            return self.net.frozen(gather(self.images, index)[0], self.trained)
        assert isinstance(self.sample, FrozenOutput)
        for label in index[:, 0].unique().tolist():
            if not self.known[label]:
                output = self.net.frozen(self.images[label], self.trained)
                assert isinstance(output, FrozenOutput)
                for store, part in zip(self.kept, output.activations, strict=True):
                    store[label] = part
                self.known[label] = True
        index = send(index, self.images.device)
        return replace(self.sample, activations=tuple(part[index[:, 0], index[:, 1]] for part in self.kept))


def adam_learner(net: Network, trained: Collection[str], settings: Settings) -> Learner:
    """The paper's learner, and the released code's: one optimizer step per image."""
    kind, lr = OPTIMIZERS[settings.optimizer], settings.lr
    assert lr is not None
    return OnlineLearner(net, trained, lambda params: kind(params, lr))


LEARNERS: dict[str, LearnerKind] = {
    "adam": LearnerKind(adam_learner),
    "ncm": LearnerKind(NearestClassMean, "nearest class mean", {"features": "gated", "power": 0.5}),
    "map": LearnerKind(NormalMAP, "GeMCL-MAP", {"features": "gated", "power": 0.5}, fit_prior),
    "slda": LearnerKind(StreamingLDA, "streaming LDA", {"features": "both", "power": 0.5, "shrinkage": 0.5}),
}
"""What `--learner` may name. Defaults are what is best for ANML (see `docs/heads.md`)."""


class _InOrder:
    """A learner of a network with fewer outputs than its pool has classes: the outputs stand for the classes
    of one draw, in the order in which they are learned. All heads are drawn anew, so no output means anything
    before.

    Args:
        drawn: [N] class ids of the draw, below `pool`.
        num_outputs: of the network, N or more.
    """

    def __init__(self, learner: Learner, drawn: Tensor, pool: int, num_outputs: int, device: torch.device):
        self.learner = learner
        self.output_of = torch.zeros(pool, dtype=torch.long)
        self.output_of[drawn] = torch.arange(len(drawn))
        self.class_of = torch.full((num_outputs,), pool)  # of no class, which is no right answer
        self.class_of[: len(drawn)] = drawn
        self.output_of, self.class_of = self.output_of.to(device), self.class_of.to(device)

    def learn(self, images: Inputs, labels: Tensor) -> None:
        self.learner.learn(images, self.output_of[labels])

    def predict(self, images: Inputs) -> Tensor:
        given = self.learner.predict(images)
        return self.class_of[given.clamp_min(0)].where(given >= 0, given)


def learn(learner: Learner, outputs: FrozenOutputs, stream: Tensor) -> None:
    """Have a learner learn the images of `stream` [K, 2] (class, drawing), in order."""
    for index in stream.split(CHUNK):
        learner.learn(outputs.get(index), index[:, 0].to(outputs.images.device))


def answers(learner: Learner, outputs: FrozenOutputs, index: Tensor) -> Tensor:
    """The class that a learner gives to each image of `index` [..., 2], among all outputs: [...]."""
    given = [learner.predict(outputs.get(part)) for part in index.reshape(-1, 2).split(CHUNK)]
    return torch.cat(given).reshape(index.shape[:-1])


def correct(learner: Learner, outputs: FrozenOutputs, index: Tensor) -> Tensor:
    """Which images of `index` [..., 2] a learner classifies right: bool [...]."""
    given = answers(learner, outputs, index)
    return given == index[..., 0].to(given.device)


def new_run(
    net: Network, trained: Collection[str], generator: torch.Generator, reset_all: bool = False
) -> Network:
    """A network for one run: a copy, in `eval` mode, whose head is drawn anew.

    What does not learn is shared. The head has seen none of the classes (paper; the released code re-draws
    PLN's first layer as well unless told `--neuromodulation`).

    Args:
        reset_all: start all trained parameters anew, not the head alone (Scratch).
    """
    net = shared_copy(net, trained)
    if reset_all:
        reset_parameters(net, trained, generator)
    else:
        reset_head(net, generator)
    return net


@dataclass
class Track:
    """What is remembered while a run is under way.

    Attributes:
        every: classes between measurements; there is one after the last class in any case.
        rows: one per measurement and class learned by then: `seen` (classes learned), `position`
            (of the class in the order of learning, from 0), `class` (its id), and its accuracy
            on `train` (15 images) and `test` (5), 0 to 1.
    """

    every: int
    rows: list[dict[str, float]] = field(default_factory=list)


def check_outputs(net: Network, classes: int) -> None:
    """Raise UserError where a sequence of so many classes needs more outputs than a network has."""
    if classes > net.num_outputs:
        raise UserError(
            f"--schedule asks for {classes} classes; the network has {net.num_outputs} outputs, one for each"
        )


class MetaTest:
    """The meta-test of one network: draws, scores and the search of a learning rate.

    Args:
        net: the network, on the device of the images.
        images: [C, 20, 1, 28, 28] the pool that class draws are made from.
        rln: layers that stay frozen.
        seed: everything random follows from it.
        epochs: passes over the sequence.
        iid: shuffle the images of all classes, anew for each pass (the Oracle).
        reset_all: start all trained layers anew, not the head alone (Scratch).
        class_order, split: see `sample_task`.
        learner: makes what learns, of an entry of `LEARNERS`.
        settings: what it is made with, but for the learning rate.
        own_head: the learner trains the network's head; one that does not is given class ids as labels,
            and may learn more classes than the network has outputs.
        fit: of the same entry, given `background`: the images [C, D, 1, 28, 28] of meta-training classes.
    """

    def __init__(
        self,
        net: Network,
        images: Tensor,
        rln: int,
        seed: int,
        *,
        epochs: int = 1,
        iid: bool = False,
        reset_all: bool = False,
        class_order: str = "random",
        split: str = "random",
        learner: MakeLearner = adam_learner,
        settings: Settings | None = None,
        own_head: bool = True,
        fit: Fit | None = None,
        background: Tensor | None = None,
    ) -> None:
        self.net = shared_copy(net)
        self.images = images
        self.trained = trained_parameters(net, rln)
        self.seed = seed
        self.epochs = epochs
        self.iid = iid
        self.reset_all = reset_all
        self.class_order = class_order
        self.split = split
        self.learner = learner
        self.settings = settings or Settings()
        self.own_head = own_head
        self.fit = fit
        self.background = background
        self.outputs = FrozenOutputs(self.net, images, self.trained)

    def score(
        self, classes: int, lr: float | None, purpose: Purpose, draw: int, track: Track | None = None
    ) -> Score:
        """Learn one sequence of `classes` classes from a fresh head, then test on all of it.

        The draw of classes, split, order and head is a function of the seed, `purpose`, `classes`
        and `draw` alone: all learning rates meet the same draws, and draws that a rate was chosen
        on are never the ones it is reported on.

        Args:
            track: filled on the way, which leaves the run's numbers alone: measuring draws nothing
                and trains nothing. (Where frozen outputs do not fit their budget, images pass the
                frozen layers in other batches, which may change the last bits.)

        Raises:
            UserError: more classes than the pool or the outputs of a network whose head learns.
            ValueError: `track` in a stream that is shuffled or passed more than once.
        """
        if self.own_head:
            check_outputs(self.net, classes)
        sequence = np.random.SeedSequence(self.seed, spawn_key=(PURPOSES.index(purpose), classes, draw))
        generator = torch.Generator().manual_seed(int(sequence.generate_state(1, np.uint64)[0]))
        task = sample_task(
            len(self.images),
            self.images.shape[1],
            classes,
            generator,
            class_order=self.class_order,
            split=self.split,
        )
        net = new_run(self.net, self.trained, generator, self.reset_all)
        prior = self._prior(net) if self.reset_all else self._prior_of_all_runs
        learner = self.learner(net, self.trained, replace(self.settings, lr=lr, prior=prior))
        if self.own_head and net.num_outputs < len(self.images):
            place = len(self.images), net.num_outputs, self.images.device
            learner = _InOrder(learner, task.train[:, 0, 0], *place)
        if track is not None:
            self._learn_and_track(learner, task, track)
        else:
            stream = task.train.reshape(-1, 2)
            for _ in range(self.epochs):
                if self.iid:
                    stream = stream[torch.randperm(len(stream), generator=generator)]
                learn(learner, self.outputs, stream)
        test, train = (answers(learner, self.outputs, index).cpu() for index in (task.test, task.train))
        finite = all(bool(net.get_parameter(name).isfinite().all()) for name in self.trained)
        diverged = not finite or bool((test < 0).any() or (train < 0).any())
        right = ((test == task.test[..., 0]) & (not diverged), (train == task.train[..., 0]) & (not diverged))
        return Score.of(Answers(*right, diverged))

    def _prior(self, net: Network) -> Prior | None:
        if self.fit is None or self.background is None:
            return None
        return self.fit(net, self.settings, (net.frozen(images, self.trained) for images in self.background))

    @cached_property
    def _prior_of_all_runs(self) -> Prior | None:
        return self._prior(self.net)

    def _learn_and_track(self, learner: Learner, task: Task, track: Track) -> None:
        if self.iid or self.epochs > 1:
            raise ValueError("only a stream of one class after another, passed once, can be tracked")
        classes = len(task.train)
        for start in range(0, classes, track.every):
            seen = min(start + track.every, classes)
            learn(learner, self.outputs, task.train[start:seen].reshape(-1, 2))
            columns = {
                "class": task.train[:seen, 0, 0],
                "train": correct(learner, self.outputs, task.train[:seen]).cpu().double().mean(1),
                "test": correct(learner, self.outputs, task.test[:seen]).cpu().double().mean(1),
            }
            for position, values in enumerate(zip(*(c.tolist() for c in columns.values()), strict=True)):
                row = dict(zip(columns, values, strict=True))
                track.rows.append({"seen": seen, "position": position, **row})


class Trial(NamedTuple):
    """One learning rate on one draw of the search, of one of the models that are tested together."""

    draw: int
    lr: float
    score: Score
    model: str = ""


def best_rate(trials: Sequence[Trial], objective: str) -> float:
    """The learning rate that wins most draws (paper and released code: the mode of the winners).

    Rates that are equal on a draw share its win. Of rates that win equally often it is the one with the
    best mean over all draws, and then the smallest. So neither the order of the rates matters, nor does a
    rate win that is nowhere better than another one and somewhere worse. Several models share one rate:
    their draws count alike. A run that diverged is worse than any that did not.

    Args:
        trials: every rate on every draw of every model.
        objective: measure to maximise, `train` (as released) or `test`.
    """
    by_draw: defaultdict[tuple[str, int], dict[float, float]] = defaultdict(dict)
    for trial in trials:
        value = trial.score[objective]
        lost = trial.score.get("diverged")
        by_draw[trial.model, trial.draw][trial.lr] = -1 if value is None or lost else value
    wins: defaultdict[float, Fraction] = defaultdict(Fraction)
    for values in by_draw.values():
        winners = [lr for lr, value in values.items() if value == max(values.values())]
        for lr in winners:
            wins[lr] += Fraction(1, len(winners))

    def rank(lr: float) -> tuple[Fraction, float, float]:
        return wins[lr], fmean(values[lr] for values in by_draw.values()), -lr

    return max(wins, key=rank)
