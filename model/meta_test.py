"""Meta-test: learn unseen classes one after the other, image by image, and see what is remembered.

One loop serves every treatment: what is trained is a matter of `rln` and of which layers start anew.
"""

from __future__ import annotations

from collections.abc import Collection, Iterator, Sequence
from dataclasses import replace
from functools import cached_property
from itertools import pairwise
from typing import Literal

import numpy as np
import torch
from torch import Tensor

from datasets.images import Pool
from datasets.task_sampler import sample_task
from model.heads import NearestClassMean, NormalMAP, StreamingLDA, fit_prior
from model.layers import FrozenOutput, Inputs
from model.learner import Fit, Learner, LearnerKind, MakeLearner, Prior, Settings
from model.method import OnlineLearner
from model.modelfactory import Network, reset_head, reset_parameters, shared_copy, trained_parameters
from model.optimizer import OPTIMIZERS
from model.outer_loops import gather, send
from model.scores import Answers, Score
from utils.errors import UserError

Purpose = Literal["search", "report", "validation"]
PURPOSES: tuple[Purpose, ...] = ("search", "report", "validation")  # each has draws of its own

CHUNK = 100  # images that pass through frozen layers, or are tested, at a time
BUDGET = 2 * 2**30  # bytes of frozen outputs kept; beyond it they are recomputed for every pass


class FrozenOutputs:
    """What a network's frozen part makes of the images of a pool, computed and kept once per image, when
    needed.

    The frozen part does not change at meta-test, whatever the learning rate and the run: the search and all
    runs share its outputs. A class is always computed as one batch, and the images of a larger one each
    alone, so that the numbers do not depend on which run met them first.

    Args:
        net: the network to be tested.
        images: the pool, on the device of the network; [C, D, 1, 28, 28] where all classes have as many.
        trained: names of the parameters that learn.
        budget: bytes to spend. The outputs of a pool that needs more are not kept: `get` computes them.
    """

    def __init__(
        self, net: Network, images: Pool | Tensor, trained: Collection[str], budget: int = BUDGET
    ) -> None:
        self.net = net
        self.images = pool = Pool.of(images)
        self.trained = trained
        with torch.no_grad():
            self.sample = net.frozen(pool.rows[:1], trained)
        self.kept: tuple[Tensor, ...] = ()
        # Where nothing is frozen there is nothing to keep but the images themselves.
        if isinstance(self.sample, FrozenOutput):
            anything = any(self.sample.done)
        else:
            anything = type(net).frozen is not Network.frozen
        if anything:
            parts = _parts(self.sample)
            size = sum(part.numel() * part.element_size() for part in parts) * len(pool.rows)
            if size <= budget:
                self.kept = tuple(part[:0] for part in parts)
        self.used = 0  # rows of `kept` that hold the outputs of an image
        self.slots = torch.full((len(pool.rows),), -1)  # the row of each image, -1 before it is computed

    @torch.no_grad()
    def get(self, index: Tensor) -> Inputs:
        """For the images at `index`, [K, 2] (class, image) on the CPU; K rows."""
        if not self.kept:
            return self.net.frozen(gather(self.images, index)[0], self.trained)
        positions = self.images.positions(index)
        missing = self.slots[positions] < 0
        for label, row in zip(index[missing, 0].tolist(), positions[missing].tolist(), strict=True):
            if self.slots[row] < 0:
                first, size = int(self.images.starts[label]), self.images.sizes[label]
                rows = slice(first, first + size) if size <= CHUNK else slice(row, row + 1)
                output = self.net.frozen(self.images.rows[rows], self.trained)
                self.slots[rows] = self._keep(_parts(output))
        slots = send(self.slots[positions], self.images.device)
        parts = tuple(part[slots] for part in self.kept)
        return replace(self.sample, activations=parts) if isinstance(self.sample, FrozenOutput) else parts[0]

    def _keep(self, parts: Sequence[Tensor]) -> Tensor:
        """Keep some rows more; returns where, on the CPU. Room doubles, so that few rows are moved often."""
        slots = torch.arange(self.used, self.used + len(parts[0]))
        self.used += len(slots)
        if self.used > len(self.kept[0]):
            room = min(2 * self.used, len(self.slots))
            self.kept = tuple(torch.cat([p, p.new_empty(room - len(p), *p.shape[1:])]) for p in self.kept)
        for store, part in zip(self.kept, parts, strict=True):
            store[slots[0] : self.used] = part
        return slots


def _parts(output: Inputs) -> tuple[Tensor, ...]:
    """The tensors that a frozen output consists of."""
    return output.activations if isinstance(output, FrozenOutput) else (output,)


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
    """Have a learner learn the images of `stream` [K, 2] (class, image), in order."""
    for index in stream.split(CHUNK):
        learner.learn(outputs.get(index), index[:, 0].to(outputs.images.device))


def answers(learner: Learner, outputs: FrozenOutputs, index: Tensor) -> Tensor:
    """The class that a learner gives to each image of `index` [..., 2], among all outputs: [...]."""
    given = [learner.predict(outputs.get(part)) for part in index.reshape(-1, 2).split(CHUNK)]
    return torch.cat(given).reshape(index.shape[:-1])


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


def check_outputs(net: Network, classes: int) -> None:
    """Raise UserError where a sequence of so many classes needs more outputs than a network has."""
    if classes > net.num_outputs:
        raise UserError(
            f"--schedule asks for {classes} classes; the network has {net.num_outputs} outputs, one for each"
        )


class MetaTest:
    """The meta-test of one network: draws and scores.

    Args:
        net: the network, on the device of the images.
        images: the pool that class draws are made from; [C, D, 1, 28, 28] where all have as many images.
        rln: layers that stay frozen.
        seed: everything random follows from it.
        epochs: passes over the sequence.
        iid: shuffle the images of all classes, anew for each pass (the Oracle).
        reset_all: start all trained layers anew, not the head alone (Scratch).
        class_order, split, train_images, test_images: see `sample_task`.
        learner: makes what learns, of an entry of `LEARNERS`.
        settings: what it is made with, but for the learning rate.
        own_head: the learner trains the network's head; one that does not is given class ids as labels,
            and may learn more classes than the network has outputs.
        fit: of the same entry, given `background`: the images of meta-training classes.
    """

    def __init__(
        self,
        net: Network,
        images: Pool | Tensor,
        rln: int,
        seed: int,
        *,
        epochs: int = 1,
        iid: bool = False,
        reset_all: bool = False,
        class_order: str = "random",
        split: str = "random",
        train_images: int = 15,
        test_images: int = 5,
        learner: MakeLearner = adam_learner,
        settings: Settings | None = None,
        own_head: bool = True,
        fit: Fit | None = None,
        background: Pool | Tensor | None = None,
    ) -> None:
        self.net = shared_copy(net)
        self.images = Pool.of(images)
        self.trained = trained_parameters(net, rln)
        self.seed = seed
        self.epochs = epochs
        self.iid = iid
        self.reset_all = reset_all
        self.class_order = class_order
        self.split = split
        self.train_images, self.test_images = train_images, test_images
        self.learner = learner
        self.settings = settings or Settings()
        self.own_head = own_head
        self.fit = fit
        self.background = None if background is None else Pool.of(background)
        self.outputs = FrozenOutputs(self.net, images, self.trained)

    def score(self, classes: int, lr: float | None, purpose: Purpose, draw: int) -> Score:
        """The score of one sequence of `classes` classes, all of its draw; see :meth:`walk`."""
        (answers,) = self.walk([classes], lr, purpose, draw, drawn=classes)
        return answers.score()

    def walk(
        self, stops: Sequence[int], lr: float | None, purpose: Purpose, draw: int, *, drawn: int
    ) -> Iterator[Answers]:
        """Learn one sequence of classes from a fresh head, and test at each of `stops` on all learned so far.

        The draw of classes, split, order and head is a function of the seed, `purpose`, `drawn` and `draw`
        alone: all learning rates meet the same draws, and draws that a rate was chosen on are never the
        ones it is reported on. Answers at a stop are the same bits whatever other stops there are: testing
        draws nothing and trains nothing, and a class passes the frozen layers as one batch.

        Args:
            stops: numbers of classes, ascending; the sequence ends at the last.
            drawn: classes of the draw that the sequence is the beginning of.

        Raises:
            UserError: more classes than the pool or the outputs of a network whose head learns.
            ValueError: several stops in a stream that is shuffled or passed more than once.
        """
        if self.own_head:
            check_outputs(self.net, stops[-1])
        if len(stops) > 1 and (self.iid or self.epochs > 1):
            raise ValueError(
                "only a stream of one class after another, passed once, can be tested on its way"
            )
        sequence = np.random.SeedSequence(self.seed, spawn_key=(PURPOSES.index(purpose), drawn, draw))
        generator = torch.Generator().manual_seed(int(sequence.generate_state(1, np.uint64)[0]))
        task = sample_task(
            self.images.sizes,
            drawn,
            generator,
            train_images=self.train_images,
            test_images=self.test_images,
            class_order=self.class_order,
            split=self.split,
        )
        net = new_run(self.net, self.trained, generator, self.reset_all)
        prior = self._prior(net) if self.reset_all else self._prior_of_all_runs
        learner = self.learner(net, self.trained, replace(self.settings, lr=lr, prior=prior))
        if self.own_head and net.num_outputs < len(self.images):
            place = len(self.images), net.num_outputs, self.images.device
            learner = _InOrder(learner, task.train[: stops[-1], 0, 0], *place)
        for learned, stop in pairwise((0, *stops)):
            new = task.train[learned:stop]
            stream = new.reshape(-1, 2)
            for _ in range(self.epochs):
                if self.iid:
                    stream = stream[torch.randperm(len(stream), generator=generator)]
                for images in [stream] if self.iid else new:
                    learn(learner, self.outputs, images)
            test, train = task.test[:stop], task.train[:stop]
            given_test, given_train = (answers(learner, self.outputs, index).cpu() for index in (test, train))
            finite = all(bool(net.get_parameter(name).isfinite().all()) for name in self.trained)
            diverged = not finite or bool((given_test < 0).any() or (given_train < 0).any())
            right_test = (given_test == test[..., 0]) & (not diverged)
            right_train = (given_train == train[..., 0]) & (not diverged)
            yield Answers(right_test, right_train, diverged, train[:, 0, 0])

    def _prior(self, net: Network) -> Prior | None:
        if self.fit is None or self.background is None:
            return None
        classes = (self.background[label][:CHUNK] for label in range(len(self.background)))
        return self.fit(net, self.settings, (net.frozen(images, self.trained) for images in classes))

    @cached_property
    def _prior_of_all_runs(self) -> Prior | None:
        return self._prior(self.net)
