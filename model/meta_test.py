"""Meta-test: learn unseen classes one after the other, image by image, and see what is remembered.

One loop serves every treatment: what is trained is a matter of `rln` and of which layers start anew.
"""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Sequence
from dataclasses import dataclass, field
from fractions import Fraction
from statistics import fmean
from typing import Literal, NamedTuple

import numpy as np
import torch
from torch import Tensor
from torch.func import functional_call

from datasets.samplers import Task, sample_task
from model.kernels import times
from model.meta_learner import Weights, gather, inner_gradients
from model.modelfactory import Network, State, initialise, trained_parameters
from model.optimizer import Adam
from model.scores import Answers, Score, classify
from utils.device import use_huge_pages

Purpose = Literal["search", "report", "validation"]
PURPOSES: tuple[Purpose, ...] = ("search", "report", "validation")  # each has draws of its own

CHUNK = 100  # images that pass through frozen layers, or are tested, at a time
BUDGET = 2 * 2**30  # bytes of frozen outputs kept; beyond it they are recomputed for every pass


class FrozenStates:
    """Outputs of the layers below `rln`, computed once per image of the pool, when first needed.

    These layers do not change at meta-test, whatever the learning rate and the run: the lr search
    and all runs share them. A class is always computed as one batch, so that its numbers do not
    depend on which run met it first.

    Args:
        net: the network to be tested.
        images: [C, 20, 1, 28, 28] the pool, on the device of the network.
        rln: layers that stay frozen.
        budget: bytes to spend. A pool that needs more is not kept, and `get` computes every time.
    """

    def __init__(self, net: Network, images: Tensor, rln: int, budget: int = BUDGET) -> None:
        self.net = net
        self.images = images
        self.rln = rln
        with torch.no_grad():
            sample = net.lower(images[0, :1], rln)
        per_class = sum(part.numel() * part.element_size() for part in sample) * images.shape[1]
        self.kept: State | None = None
        # Without frozen layers the state is the image itself: nothing to keep.
        if rln > 0 and per_class * len(images) <= budget:
            self.kept = tuple(part.new_empty(*images.shape[:2], *part.shape[1:]) for part in sample)
        self.known = [False] * len(images)

    @torch.no_grad()
    def get(self, index: Tensor) -> State:
        """States of the images at `index`, [K, 2] (class, drawing) on the CPU; K rows each."""
        if self.kept is None:
            return self.net.lower(gather(self.images, index)[0], self.rln)
        for label in index[:, 0].unique().tolist():
            if not self.known[label]:
                lowered = self.net.lower(self.images[label], self.rln)
                for store, part in zip(self.kept, lowered, strict=True):
                    store[label] = part
                self.known[label] = True
        index = index.to(self.images.device, non_blocking=True)
        return tuple(store[index[:, 0], index[:, 1]] for store in self.kept)


def initial_weights(net: Network, rln: int, generator: torch.Generator, reset_all: bool = False) -> Weights:
    """Copies of the parameters above `rln` to start a run from, with a head drawn anew.

    The head's weights are Kaiming normal and its biases zero, as in a new network: at meta-test it
    has seen none of the classes (paper; the released code re-draws PLN's first layer as well unless
    told `--neuromodulation`).

    Args:
        reset_all: start all trained layers anew, not the head alone (Scratch).
    """
    fast = {name: net.get_parameter(name).detach().clone() for name in trained_parameters(net, rln)}
    for name, weight in fast.items():
        if reset_all or name.startswith("head."):
            initialise(name, weight, generator)
        weight.requires_grad_()
    return fast


class Learner:
    """Learns a stream of examples with Adam, batch 1 (released code, `evaluate_classification.py`).

    Args:
        net: the network that was meta-trained; it is not changed.
        rln: layers that stay frozen.
        lr: Adam's step size.
        fast: weights to start from, e.g. of `initial_weights`; changed in place.
    """

    def __init__(self, net: Network, rln: int, lr: float, fast: Weights) -> None:
        self.net = net
        self.rln = rln
        self.fast = fast
        *body, head_weight, head_bias = fast
        self.body = {name: fast[name] for name in body}
        self.weight, self.bias = fast[head_weight].detach(), fast[head_bias].detach()
        self.slope = torch.empty_like(self.weight)
        self.optimizer = Adam(fast.values(), lr)
        use_huge_pages(self.slope, *self.optimizer.weights, *self.optimizer.means, *self.optimizer.squares)

    def logits(self, inputs: Tensor) -> Tensor:
        return times(inputs, self.weight.t()) + self.bias

    def pull_back(self, error: Tensor) -> Tensor:
        return times(error, self.weight)

    def update(self, state: State, label: Tensor) -> Tensor:
        """One example: `state` one row of `FrozenStates`, `label` [1]. Returns the loss before."""
        example = inner_gradients(self.net, self.body, self, state, label, self.rln)
        torch.outer(example.error[0], example.inputs[0], out=self.slope)
        self.optimizer.step([*example.slopes, self.slope, example.error[0]])
        return example.loss

    def learn(self, states: FrozenStates, stream: Tensor) -> None:
        """Learn the images of `stream` [K, 2] (class, drawing), in order."""
        for index in stream.split(CHUNK):
            state = states.get(index)
            labels = index[:, 0].to(state[0].device)
            for k in range(len(index)):
                self.update(tuple(part[k : k + 1] for part in state), labels[k : k + 1])

    @torch.no_grad()
    def answers(self, states: FrozenStates, index: Tensor) -> Tensor:
        """The class that each image of `index` [..., 2] is given, among all outputs: [...].

        It is -1 where the learner has diverged; see `classify`.
        """
        given = [
            classify(functional_call(self.net, self.fast, (states.get(part), self.rln)))
            for part in index.reshape(-1, 2).split(CHUNK)
        ]
        return torch.cat(given).reshape(index.shape[:-1])

    def correct(self, states: FrozenStates, index: Tensor) -> Tensor:
        """Which images of `index` [..., 2] are classified right: bool [...]."""
        answers = self.answers(states, index)
        return answers == index[..., 0].to(answers.device)


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
    ) -> None:
        trained_parameters(net, rln)  # a wrong rln is an error now, not at the first draw
        self.net = net
        self.images = images
        self.rln = rln
        self.seed = seed
        self.epochs = epochs
        self.iid = iid
        self.reset_all = reset_all
        self.class_order = class_order
        self.split = split
        self.states = FrozenStates(net, images, rln)

    def score(
        self, classes: int, lr: float, purpose: Purpose, draw: int, track: Track | None = None
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
            ValueError: `track` in a stream that is shuffled or passed more than once.
        """
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
        fast = initial_weights(self.net, self.rln, generator, self.reset_all)
        learner = Learner(self.net, self.rln, lr, fast)
        if track is not None:
            self._learn_and_track(learner, task, track)
        else:
            stream = task.train.reshape(-1, 2)
            for _ in range(self.epochs):
                if self.iid:
                    stream = stream[torch.randperm(len(stream), generator=generator)]
                learner.learn(self.states, stream)
        test, train = (learner.answers(self.states, index).cpu() for index in (task.test, task.train))
        finite = all(bool(weight.isfinite().all()) for weight in fast.values())
        diverged = not finite or bool((test < 0).any() or (train < 0).any())
        right = ((test == task.test[..., 0]) & (not diverged), (train == task.train[..., 0]) & (not diverged))
        return Score.of(Answers(*right, diverged))

    def _learn_and_track(self, learner: Learner, task: Task, track: Track) -> None:
        if self.iid or self.epochs > 1:
            raise ValueError("only a stream of one class after another, passed once, can be tracked")
        classes = len(task.train)
        for start in range(0, classes, track.every):
            seen = min(start + track.every, classes)
            learner.learn(self.states, task.train[start:seen].reshape(-1, 2))
            columns = {
                "class": task.train[:seen, 0, 0],
                "train": learner.correct(self.states, task.train[:seen]).cpu().double().mean(1),
                "test": learner.correct(self.states, task.test[:seen]).cpu().double().mean(1),
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
