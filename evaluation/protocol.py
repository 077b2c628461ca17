"""The two halves of an evaluation: the search of a learning rate, and the report of fresh draws at it."""

from __future__ import annotations

import logging
from collections.abc import Mapping, Sequence
from itertools import product, starmap
from typing import Any

from evaluation.models import Model
from evaluation.runner import Job, Scorer
from model.rate_search import Draw, RateSearch, next_tries
from utils.run import Run

log = logging.getLogger("anml")


def search(
    run: Run,
    scores: Scorer,
    models: Sequence[Model],
    counts: Sequence[int],
    *,
    lrs: Sequence[float],
    runs: int,
    objective: str,
    full: bool,
    processes: int,
) -> dict[int, RateSearch]:
    """The search of a rate for each of `counts`, all of which one pass serves.

    Args:
        lrs: rates to try.
        runs: draws of each model, each trying all rates as long as a try may change which is the best.
        objective: what is to be large, `test` or `train` accuracy.
        full: try all rates on all draws.
        processes: that make a try each at a time.
    """
    draws = list(starmap(Draw, product(range(len(models)), range(runs))))
    searches = {n: RateSearch(lrs, draws, objective, full=full) for n in counts}
    with run.progress(len(draws) * len(lrs), every=len(lrs), unit="try") as bar:
        while tries := next_tries(searches, processes):
            jobs = list(starmap(Job, tries))
            for (draw, lr, stops), found in zip(tries, scores("search", jobs), strict=True):
                for classes, score in found.items():
                    searches[classes].add(draw, lr, score)
                if bar.advance(**found[stops[-1]].accuracies()):
                    bar.report()
    for classes, made in searches.items():
        log.info(
            "%d classes: learning rate %g, decided by %d tries of %d",
            *(classes, made.best(), len(made.scores), made.most),
        )
        for lr in lrs:
            tried = [score for (_, rate), score in made.scores.items() if rate == lr]
            warn_of_diverged(classes, lr, "tries", tried)
    return searches


def warn_of_diverged(classes: int, lr: float | None, of: str, scores: Sequence[Mapping[str, Any]]) -> None:
    """Say how many of the runs at a rate diverged, if any did: their accuracies say nothing else."""
    diverged = sum(1 for score in scores if score["diverged"])
    if diverged:
        log.warning(
            "%d classes: %d of %d %s diverged%s: weights or logits are not finite",
            *(classes, diverged, len(scores), of),
            "" if lr is None else f" at the learning rate {lr:g}",
        )


def report(
    run: Run, scores: Scorer, models: Sequence[Model], rates: Mapping[int, float | None], runs: int
) -> list[dict[str, Any]]:
    """One row for each class count of `rates`, at its rate, and each of `runs` draws of each model.

    A run serves all counts of one rate, and goes as far as the largest of them.
    """
    draws = starmap(Draw, product(range(len(models)), range(runs)))
    stops = {lr: tuple(n for n, rate in rates.items() if rate == lr) for lr in rates.values()}
    jobs = [Job(draw, lr, stops[lr]) for draw, lr in product(draws, stops)]
    rows: list[dict[str, Any]] = []
    with run.progress(len(jobs), every=runs, unit="run") as bar:
        for job, found in zip(jobs, scores("report", jobs), strict=True):
            name = models[job.draw.model].name
            for classes, score in found.items():
                rows.append(
                    {"model": name, "classes": classes, "run": job.draw.number, "lr": job.lr, **score}
                )
                run.metrics(rows[-1])
            if bar.advance(**found[job.stops[-1]].accuracies()):
                bar.report()
    for classes, lr in rates.items():
        warn_of_diverged(classes, lr, "runs", [row for row in rows if row["classes"] == classes])
    return sorted(rows, key=lambda row: row["classes"])
