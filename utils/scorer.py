"""The runs of an evaluation: of several models, each run made once and on disk when it is known."""

from __future__ import annotations

import argparse
from collections.abc import Callable
from functools import lru_cache

from torch import Tensor

from model.meta_test import MetaTest, Purpose, Score, Track
from utils.journal import Journal, Key
from utils.models import Model
from utils.plots import forgetting_figure, save_figure
from utils.results import write_table
from utils.run import Run

Scorer = Callable[[Purpose, int, int, int, float], Score]
"""Accuracies of one run, from its purpose, position of the model, classes, draw and learning rate."""


def scorer(
    args: argparse.Namespace, run: Run, journal: Journal, models: list[Model], pools: dict[str, Tensor]
) -> Scorer:
    """A function that tests the models; what the journal knows is not tested again.

    Args:
        args: those of an evaluation.
        models: on the device of the pools.
        pools: images `[C, 20, 1, 28, 28]` of each split in use, `evaluation` and `background`.
    """

    # Two, since outputs of frozen layers take memory: with one model both pools keep theirs.
    @lru_cache(maxsize=2)
    def meta_test(position: int, split: str) -> MetaTest:
        return MetaTest(
            models[position].net,
            pools[split],
            args.rln,
            args.seed,
            epochs=args.epoch,
            iid=args.iid,
            reset_all=args.reset or args.scratch,
            class_order=args.class_order,
            split=args.split,
        )

    def score(purpose: Purpose, position: int, classes: int, draw: int, lr: float) -> Score:
        tracked = args.track_every and (purpose, position, draw) == ("report", 0, 0)
        track = Track(args.track_every) if tracked else None

        def compute() -> Score:
            tester = meta_test(position, args.lr_search_split if purpose == "search" else "evaluation")
            # No draw is that of two models, which makes their runs independent.
            found = tester.score(classes, lr, purpose, draw * len(models) + position, track)
            if track is not None:
                write_forgetting(run, classes, track)
            return found

        return journal.score(Key(purpose, models[position].name, classes, draw, lr), compute)

    return score


def write_forgetting(run: Run, classes: int, track: Track) -> None:
    """What a run of `classes` classes remembered on its way: a table, a picture, and to TensorBoard."""
    write_table(run.folder / f"forgetting_{classes}.csv", track.rows)
    figure = forgetting_figure(track.rows)
    save_figure(figure, run.folder / f"forgetting_{classes}.png")
    run.figure(f"meta_test/forgetting_{classes}", figure, classes)
