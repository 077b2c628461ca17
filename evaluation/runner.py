"""The runs of an evaluation: of several models, each run made once and on disk when it is known."""

from __future__ import annotations

import argparse
from collections.abc import Callable, Iterator, Sequence
from functools import lru_cache, partial

from torch import Tensor

from evaluation.journal import Journal, Key
from evaluation.models import Model
from evaluation.plots import forgetting_figure, save_figure
from evaluation.results import write_table
from model.fast import Backend, learner
from model.learner import Settings
from model.meta_test import LEARNERS, MetaTest, Purpose, Track
from model.modelfactory import Network
from model.scores import Score
from utils.distributed import Group
from utils.run import Run

Job = tuple[int, int, float | None]
"""One run: position of the model, draw, learning rate (None where there is none)."""

Scorer = Callable[[Purpose, int, Sequence[Job]], Iterator[Score]]
"""Scores of runs in order, from their purpose, number of classes and jobs."""


def scorer(
    args: argparse.Namespace,
    run: Run,
    journal: Journal | None,
    models: list[Model],
    pools: dict[str, Tensor],
    group: Group,
    backend: Backend,
) -> Scorer:
    """A function that tests the models; what the journal knows is not tested again.

    The processes of `group` test one run each at a time, and the first writes down what all found.

    Args:
        args: those of an evaluation.
        journal: of the first process; None in the others.
        models: on the device of the pools.
        pools: images `[C, 20, 1, 28, 28]` of each split in use, `evaluation` and `background`.
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
            learner=learner(args.learner, backend),
            settings=settings,
            own_head=kind.takes_steps,
            fit=kind.fit,
            background=pools.get("background"),
        )

    def test(purpose: Purpose, classes: int, job: Job) -> Score:
        position, draw, lr = job
        tracked = args.track_every and (purpose, position, draw) == ("report", 0, 0)
        track = Track(args.track_every) if tracked else None
        tester = meta_test(position, args.lr_search_split if purpose == "search" else "evaluation")
        # No draw is that of two models, which makes their runs independent.
        found = tester.score(classes, lr, purpose, draw * len(models) + position, track)
        if track is not None:  # the first job, hence in the first process
            write_forgetting(run, classes, track)
        return found

    def scores(purpose: Purpose, classes: int, jobs: Sequence[Job]) -> Iterator[Score]:
        keys = [Key(purpose, models[position].name, classes, draw, lr) for position, draw, lr in jobs]
        for start in range(0, len(jobs), group.size):
            together = range(start, min(start + group.size, len(jobs)))
            mine = [k for k in group.share(together) if keys[k] not in known]
            found = {keys[k]: test(purpose, classes, jobs[k]) for k in mine}
            for part in group.gather(found):
                for key, score in part.items():
                    known[key] = journal.score(key, partial(Score, score)) if journal else score
            yield from (known[keys[k]] for k in together)

    return scores


def frozen_layers(args: argparse.Namespace, net: Network) -> int:
    """Layers that an evaluation leaves as they are: `--rln`, or all but the head for a learner that changes
    no weights. (With `--scratch` these start anew in each run, and so does what it sees.)"""
    if args.rln is not None:
        return int(args.rln)
    return 0 if args.scratch else net.layers_below_head


def write_forgetting(run: Run, classes: int, track: Track) -> None:
    """What a run of `classes` classes remembered on its way: a table, a picture, and to TensorBoard."""
    write_table(run.folder / f"forgetting_{classes}.csv", track.rows)
    figure = forgetting_figure(track.rows)
    save_figure(figure, run.folder / f"forgetting_{classes}.png")
    run.figure(f"meta_test/forgetting_{classes}", figure, classes)
