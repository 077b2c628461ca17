"""The runs of an evaluation: of several models, each run made once and on disk when it is known."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from functools import lru_cache, partial
from typing import NamedTuple

from evaluation.journal import Journal, Key
from evaluation.models import Model
from evaluation.plots import forgetting_figure, save_png
from evaluation.results import Row, write_table
from model.meta_test import MetaTest, Purpose
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
    run: Run,
    journal: Journal | None,
    models: list[Model],
    make: Callable[[Model, str], MetaTest],
    group: Group,
    *,
    search_split: str = "evaluation",
    nested: bool = False,
    track_every: int = 0,
) -> Scorer:
    """A function that tests the models; what the journal knows is not tested again.

    The processes of `group` test one run each at a time, and the first writes down what all found.

    Args:
        journal: of rank 0; None in the others.
        make: the meta-test of a model on a split of the data, `evaluation` or `background`.
        search_split: the one that searches are made on.
        nested: draw all classes, however many a run learns of them.
        track_every: classes between measurements within the first run of the report; 0 for none.
    """
    known = dict(group.gather(journal.known if journal else {})[0])

    # Two, since outputs of frozen layers take memory: with one model both pools keep theirs.
    @lru_cache(maxsize=2)
    def meta_test(position: int, split: str) -> MetaTest:
        return make(models[position], split)

    def key(purpose: Purpose, job: Job, classes: int) -> Key:
        return Key(purpose, models[job.draw.model].name, classes, job.draw.number, job.lr)

    def test(purpose: Purpose, job: Job) -> tuple[dict[Key, Score], dict[int, list[Row]]]:
        """What a run is not known to reach, and of one that is tracked what it remembered until each stop."""
        stops = {n for n in job.stops if key(purpose, job, n) not in known}
        if not stops:
            return {}, {}
        every = track_every if (purpose, job.draw) == ("report", Draw(0, 0)) else 0
        on_the_way = set(range(every, max(stops), every)) if every else set()
        tester = meta_test(job.draw.model, search_split if purpose == "search" else "evaluation")
        found: dict[Key, Score] = {}
        rows: list[Row] = []
        tracked: dict[int, list[Row]] = {}
        for answers in tester.walk(
            sorted(stops | on_the_way),
            job.lr,
            purpose,
            # No draw is that of two models, which makes their runs independent.
            job.draw.number * len(models) + job.draw.model,
            drawn=len(tester.images) if nested else job.stops[-1],
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
            for part in group.gather([test(purpose, job) for job in group.shard(together)]):
                for found, tracked in part:
                    for classes, rows in tracked.items():
                        if group.first:
                            write_forgetting(run, classes, rows)
                    for k, score in found.items():
                        known[k] = journal.score(k, partial(Score, score)) if journal else score
            yield from ({n: known[key(purpose, job, n)] for n in job.stops} for job in together)

    return scores


def write_forgetting(run: Run, classes: int, rows: Sequence[Row]) -> None:
    """What a run of `classes` classes remembered on its way: a table, a picture, and to TensorBoard.

    Args:
        rows: of `Answers.by_class`, one moment after the other.
    """
    write_table(run.folder / f"forgetting_{classes}.csv", rows)
    pixels = save_png(forgetting_figure(rows), run.folder / f"forgetting_{classes}.png")
    run.image(f"meta_test/forgetting_{classes}", pixels, classes)
