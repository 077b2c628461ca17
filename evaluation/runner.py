"""The runs of an evaluation: of several models, each run made once and on disk when it is known."""

from __future__ import annotations

import argparse
from collections.abc import Callable, Iterator, Sequence
from functools import lru_cache, partial
from typing import NamedTuple

from datasets.images import Pool
from evaluation.journal import Journal, Key
from evaluation.models import Model
from evaluation.plots import figure_pixels, forgetting_figure, save_figure
from evaluation.results import Row, write_table
from model.fast import Backend, learner
from model.learner import Settings
from model.meta_test import LEARNERS, MetaTest, Purpose
from model.modelfactory import Network
from model.rate_search import Draw
from model.scores import Score
from utils.distributed import Group
from utils.run import Run


class Job(NamedTuple):
    """One run: a draw, learned at a rate and tested at each of `stops`, class counts in ascending order."""

    draw: Draw
    lr: float | None  # None where there is none
    stops: tuple[int, ...]


Scorer = Callable[[Purpose, Sequence[Job]], Iterator[dict[int, Score]]]
"""Scores of runs in order, by class count, from their purpose and jobs."""


def scorer(
    args: argparse.Namespace,
    run: Run,
    journal: Journal | None,
    models: list[Model],
    pools: dict[str, Pool],
    group: Group,
    backend: Backend,
) -> Scorer:
    """A function that tests the models; what the journal knows is not tested again.

    The processes of `group` test one run each at a time, and the first writes down what all found.

    Args:
        args: those of an evaluation.
        journal: of the first process; None in the others.
        models: on the device of the pools.
        pools: images of each split in use, `evaluation` and `background`.
        backend: of the models' layers.
    """
    kind = LEARNERS[args.learner]
    named = ("optimizer",) if kind.options is None else kind.options
    settings = Settings(**{name: getattr(args, name) for name in named})
    known = dict(group.gather(journal.known if journal else {})[0])

    # Two, since outputs of frozen layers take memory: with one model both pools keep theirs.
    @lru_cache(maxsize=2)
    def meta_test(position: int, split: str) -> MetaTest:
        return MetaTest(
            models[position].net,
            pools[split],
            frozen_layers(args, models[position].net),
            args.seed,
            epochs=args.epoch or 1,
            iid=bool(args.iid),
            reset_all=bool(args.reset or args.scratch),
            class_order=args.class_order,
            split=args.split,
            train_images=args.train_images,
            test_images=args.test_images,
            learner=learner(args.learner, backend),
            settings=settings,
            own_head=kind.takes_steps,
            fit=kind.fit,
            background=pools.get("background"),
        )

    def key(purpose: Purpose, job: Job, classes: int) -> Key:
        return Key(purpose, models[job.draw.model].name, classes, job.draw.number, job.lr)

    def test(purpose: Purpose, job: Job) -> tuple[dict[Key, Score], dict[int, list[Row]]]:
        """What a run is not known to reach, and of one that is tracked what it remembered until each stop."""
        stops = {n for n in job.stops if key(purpose, job, n) not in known}
        if not stops:
            return {}, {}
        every = args.track_every if (purpose, job.draw) == ("report", Draw(0, 0)) else 0
        on_the_way = set(range(every, max(stops), every)) if every else set()
        tester = meta_test(job.draw.model, args.lr_search_split if purpose == "search" else "evaluation")
        found: dict[Key, Score] = {}
        rows: list[Row] = []
        tracked: dict[int, list[Row]] = {}
        for answers in tester.walk(
            sorted(stops | on_the_way),
            job.lr,
            purpose,
            # No draw is that of two models, which makes their runs independent.
            job.draw.number * len(models) + job.draw.model,
            drawn=len(tester.images) if args.nested else job.stops[-1],
        ):
            seen = len(answers.classes)
            if seen in stops:
                found[key(purpose, job, seen)] = Score.of(answers)
                if every:
                    tracked[seen] = [*rows, *answers.by_class()]
            if seen in on_the_way:
                rows += answers.by_class()
        return found, tracked

    def scores(purpose: Purpose, jobs: Sequence[Job]) -> Iterator[dict[int, Score]]:
        for start in range(0, len(jobs), group.size):
            together = jobs[start : start + group.size]
            for part in group.gather([test(purpose, job) for job in group.share(together)]):
                for found, tracked in part:
                    for classes, rows in tracked.items():
                        if group.first:
                            write_forgetting(run, classes, rows)
                    for k, score in found.items():
                        known[k] = journal.score(k, partial(Score, score)) if journal else score
            yield from ({n: known[key(purpose, job, n)] for n in job.stops} for job in together)

    return scores


def frozen_layers(args: argparse.Namespace, net: Network) -> int:
    """Layers that an evaluation leaves as they are: `--rln`, or all but the head for a learner that changes
    no weights. (With `--scratch` these start anew in each run, and so does what it sees.)"""
    if args.rln is not None:
        return int(args.rln)
    return 0 if args.scratch else net.layers_below_head


def write_forgetting(run: Run, classes: int, rows: Sequence[Row]) -> None:
    """What a run of `classes` classes remembered on its way: a table, a picture, and to TensorBoard.

    Args:
        rows: of `Answers.by_class`, one moment after the other.
    """
    write_table(run.folder / f"forgetting_{classes}.csv", rows)
    figure = forgetting_figure(rows)
    save_figure(figure, run.folder / f"forgetting_{classes}.png")
    run.image(f"meta_test/forgetting_{classes}", figure_pixels(figure), classes)
