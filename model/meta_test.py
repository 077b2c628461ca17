"""Meta-test: learn unseen classes one after the other, image by image, and see what is remembered.

One loop serves every treatment: what is trained is a matter of `rln` and of which layers start anew.
"""

import logging
from collections.abc import Collection, Iterator, Mapping, Sequence
from dataclasses import KW_ONLY, dataclass, field, replace
from functools import cached_property
from itertools import islice, pairwise
from typing import Any, Literal

import numpy as np
import torch
from torch import Tensor

from datasets.images import Pool
from datasets.task_sampler import sample_task
from model.check import OTHER_LOGITS, same
from model.layers import FrozenOutput, Inputs, parts
from model.learner import LEARNERS, Given, Learner, LearnerKind, Prior
from model.modelfactory import Network, build, reset_head, reset_parameters, shared_copy, trained_parameters
from model.outer_loop import gather
from model.scores import Answers, Score
from utils.errors import UserError

log = logging.getLogger("anml")

Purpose = Literal["search", "report", "validation"]
PURPOSES: tuple[Purpose, ...] = ("search", "report", "validation")  # each has draws of its own

CHUNK = 100  # images that pass through frozen layers, or are tested, at a time
FITTED = 200  # meta-training classes that a prior is fitted to; more change nothing
ROUNDING = 1e-3  # of logits in float32, relative to the largest
BUDGET = 4 * 2**30  # bytes of frozen outputs kept; beyond it they are recomputed for every pass


class FrozenOutputs:
    """What a network's frozen part makes of the images of a pool, computed and kept once per image, when
    needed.

    The frozen part does not change at meta-test, whatever the learning rate and the run: the search and all
    runs share its outputs. A class is always computed as one batch, and the images of a larger one each
    alone, so that the numbers do not depend on which run met them first.

    Args:
        net: the network to be tested.
        pool: on the device of the network.
        trained: names of the parameters that learn.
        budget: bytes to spend. The outputs of a pool that needs more are not kept: `get` computes them.

    Attributes:
        kept: the parts of the outputs of all images, in memory that is used as it is written.
        known: the rows that are computed.

    Raises:
        UserError: the network makes something else of its frozen outputs than of the image itself.
    """

    def __init__(self, net: Network, pool: Pool, trained: Collection[str], budget: int = BUDGET) -> None:
        self.net = net
        self.images = pool
        self.trained = trained
        self.known: set[int] = set()
        image = pool.take(slice(1))
        with torch.no_grad():
            self.sample = net.frozen(image, trained)
            logits, rest = net(image), net(self.sample)
        if bool(logits.isfinite().all()) and not same(rest, logits, tolerance=ROUNDING):
            raise UserError(f"network {net.network}: {OTHER_LOGITS}")
        # Where nothing is frozen there is nothing to keep but the images themselves.
        own = type(net).frozen is not Network.frozen
        done = self.sample.done if isinstance(self.sample, FrozenOutput) else [own]
        # Of channels that a view repeats one is kept.
        single = [part if part.stride(1) else part[:, :1] for part in parts(self.sample)]
        size = sum(part.numel() * part.element_size() for part in single) * len(pool.rows)
        self.keeps = any(done) and size <= budget
        count = len(pool.rows) if self.keeps else 0
        # A block for each part, or temporaries would leave holes.
        self.kept = tuple(part.new_empty(count, *part.shape[1:]) for part in single)

    @torch.no_grad()
    def get(self, index: Tensor) -> Inputs:
        """For the images at `index`, [K, 2] (class, image) on the CPU; K rows."""
        if not self.keeps:
            return self.net.frozen(gather(self.images, index)[0], self.trained)
        rows = self.images.positions(index)
        for label, row in zip(index[:, 0].tolist(), rows.tolist(), strict=True):
            if row not in self.known:
                first, size = int(self.images.starts[label]), self.images.sizes[label]
                first, size = (first, size) if size <= CHUNK else (row, 1)
                output = self.net.frozen(self.images.take(slice(first, first + size)), self.trained)
                for kept, made in zip(self.kept, parts(output), strict=True):
                    kept[first : first + size] = made[:, : kept.shape[1]]
                self.known.update(range(first, first + size))
        taken = tuple(
            kept[rows.to(kept.device)].expand(-1, *part.shape[1:])
            for kept, part in zip(self.kept, parts(self.sample), strict=True)
        )
        return replace(self.sample, activations=taken) if isinstance(self.sample, FrozenOutput) else taken[0]


def learn(learner: Learner, outputs: FrozenOutputs, stream: Tensor, output_of: Tensor | None = None) -> None:
    """Have a learner learn the images of `stream` [K, 2] (class, image), in order.

    Args:
        output_of: [C] the label of each class of the pool; the class id where there is none.
    """
    for index in stream.split(CHUNK):
        labels = index[:, 0] if output_of is None else output_of[index[:, 0]]
        learner.learn(outputs.get(index), labels.to(outputs.images.rows.device))


def answers(learner: Learner, outputs: FrozenOutputs, index: Tensor) -> Tensor:
    """The label that a learner gives to each image of `index` [..., 2], among all outputs: [...]."""
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
            f"{classes} classes are asked for; the network has {net.num_outputs} outputs, one for each"
        )


def with_outputs(net: Network, classes: int, seed: int = 0) -> Network:
    """The network, or a network with a head of `classes` outputs where that are more.

    Parameters whose shape changes are those of a new network of `seed`. All others are those of `net`.

    Raises:
        UserError: the network's constructor has no argument `num_classes`.
    """
    if classes <= net.num_outputs:
        return net
    if "num_classes" not in net.widths:
        check_outputs(net, classes)
    log.info("the head has %d new outputs, one for each class, in place of its %d", classes, net.num_outputs)
    widths = {**net.widths, "num_classes": classes}
    wide = build(net.network, widths, torch.Generator().manual_seed(seed), net.image_size)
    new, old = wide.state_dict(), net.state_dict()
    wide.load_state_dict(new | {name: old[name] for name in new if old[name].shape == new[name].shape})
    wide.normalisation = net.normalisation
    return wide


@dataclass(eq=False)
class MetaTest:
    """The meta-test of one network: draws and scores.

    Attributes:
        net: the network, on the device of the images.
        images: the pool that class draws are made from.
        rln: layers that stay frozen.
        seed: everything random follows from it.
        epochs: passes over the sequence.
        iid: shuffle the images of all classes, anew for each pass (the Oracle).
        reset_all: start all trained layers anew, not the head alone (Scratch).
        class_order, split, train_images, test_images: see `sample_task`.
        kind: what learns. One that takes no steps may learn more classes than the network has outputs.
        options: the learner's, by keyword.
        background: images of meta-training classes, for a prior.
        trained: names of the parameters that learn.
    """

    net: Network
    images: Pool
    rln: int
    seed: int
    _: KW_ONLY
    epochs: int = 1
    iid: bool = False
    reset_all: bool = False
    class_order: str = "random"
    split: str = "random"
    train_images: int = 15
    test_images: int = 5
    kind: LearnerKind = LEARNERS["adam"]
    options: Mapping[str, Any] = field(default_factory=dict)
    background: Pool | None = None

    def __post_init__(self) -> None:
        self.trained = trained_parameters(self.net, self.rln)
        self.net = shared_copy(self.net)
        self.outputs = FrozenOutputs(self.net, self.images, self.trained)

    def score(self, classes: int, lr: float | None, purpose: Purpose, draw: int) -> Score:
        """The score of one sequence of `classes` classes, all of its draw; see :meth:`walk`."""
        (answers,) = self.walk([classes], lr, purpose, draw, drawn=classes)
        return answers.score()

    def walk(
        self, stops: Sequence[int], lr: float | None, purpose: Purpose, draw: int, *, drawn: int
    ) -> Iterator[Answers]:
        """Learn one sequence of classes from a fresh head, and test at each of `stops` on all learned so far.

        The draw of classes, split, order and head is a function of the seed, `purpose`, `drawn` and `draw`
        alone, whatever the learner draws: all learning rates meet the same draws, and draws that a rate was
        chosen on are never the ones it is reported on. Answers at a stop are the same bits whatever other
        stops there are: testing draws nothing and trains nothing, and a class passes the frozen layers as one
        batch.

        Args:
            stops: numbers of classes, ascending; the sequence ends at the last.
            drawn: classes of the draw that the sequence is the beginning of.

        Raises:
            UserError: more classes than the pool or the outputs of a network whose head learns.
            ValueError: several stops in a stream that is shuffled or passed more than once.
        """
        pool = self.outputs.images
        if self.kind.takes_steps:
            check_outputs(self.net, stops[-1])
        if len(stops) > 1 and (self.iid or self.epochs > 1):
            raise ValueError(
                "only a stream of one class after another, passed once, can be tested on its way"
            )
        sequence = np.random.SeedSequence(self.seed, spawn_key=(PURPOSES.index(purpose), drawn, draw))
        seeds = sequence.generate_state(2, np.uint64).tolist()
        generator, of_learner = (torch.Generator().manual_seed(seed) for seed in seeds)
        task = sample_task(
            pool.sizes,
            drawn,
            generator,
            train_images=self.train_images,
            test_images=self.test_images,
            class_order=self.class_order,
            split=self.split,
            test_only=pool.test_only,
        )
        net = new_run(self.net, self.trained, generator, self.reset_all)
        prior = self._prior(net) if self.reset_all else self._prior_of_all_runs
        learner = self.kind(net, self.trained, Given(lr, of_learner, prior), **self.options)
        output_of = torch.arange(len(pool))
        if self.kind.takes_steps and self.net.num_outputs < len(pool):
            # The outputs stand for the classes of the draw in the order of learning. The whole head is drawn
            # anew, so no output means anything before.
            output_of[task.train[: stops[-1], 0, 0]] = torch.arange(stops[-1])
        for learned, stop in pairwise((0, *stops)):
            new = task.train[learned:stop]
            stream = new.reshape(-1, 2)
            for _ in range(self.epochs):
                if self.iid:
                    stream = stream[torch.randperm(len(stream), generator=generator)]
                for images in [stream] if self.iid else new:
                    learn(learner, self.outputs, images, output_of)
            test, train = task.test[:stop], task.train[:stop]
            given_test, given_train = (answers(learner, self.outputs, index).cpu() for index in (test, train))
            finite = all(bool(net.get_parameter(name).isfinite().all()) for name in self.trained)
            diverged = not finite or bool((given_test < 0).any() or (given_train < 0).any())
            right_test = (given_test == output_of[test[..., 0]]) & (not diverged)
            right_train = (given_train == output_of[train[..., 0]]) & (not diverged)
            yield Answers(right_test, right_train, diverged, train[:, 0, 0])

    def _prior(self, net: Network) -> Prior | None:
        if self.kind.fit is None or self.background is None:
            return None
        sizes = enumerate(self.background.sizes)  # one image has no variance
        classes = (self.background[label][:CHUNK] for label, size in sizes if size > 1)
        inputs = (net.frozen(images, self.trained) for images in islice(classes, FITTED))
        return self.kind.fit(net, inputs, **self.options)

    @cached_property
    def _prior_of_all_runs(self) -> Prior | None:
        return self._prior(self.net)
