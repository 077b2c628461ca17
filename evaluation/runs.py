"""The paper's evaluation from top to bottom: the search of a learning rate, then the report of fresh draws at
it, by runs each of which is made once and has its scores on disk before the next begins."""

from __future__ import annotations

import csv
import errno
import io
import logging
import os
from collections.abc import Callable, Iterator, Mapping, Sequence
from functools import lru_cache
from itertools import product, starmap
from pathlib import Path
from typing import Any, NamedTuple

from evaluation.models import Model
from evaluation.plots import forgetting_figure, save_png
from evaluation.results import Row, read_table, summarise, write_results, write_table
from flags.evaluation import Evaluation
from model.meta_test import LEARNERS, PURPOSES, MetaTest, Purpose
from model.rate_search import Draw, RateSearch, next_tries
from model.scores import MEASURES, Answers, Score, accuracies
from utils.distributed import Group, is_first
from utils.errors import UserError, refusing
from utils.files import sync
from utils.run import Progress, Run

log = logging.getLogger("anml")


def evaluate(
    args: Evaluation, schedule: Sequence[int], runs: Runs, about: Mapping[str, Any]
) -> list[dict[str, Any]]:
    """Search and report each class count of `schedule`, with `--nested` all at once.

    `results.csv` and `results.json` are written after each.

    Args:
        about: what `results.json` says beside the search and the summary.
    """
    rows: list[dict[str, Any]] = []
    tries: list[dict[str, Any]] = []
    numbers: list[dict[str, int]] = []
    for counts in [sorted(schedule)] if args.nested else [[classes] for classes in schedule]:
        rates = dict.fromkeys(counts, args.lr)
        if args.lr is None and LEARNERS[args.learner].takes_steps:
            for classes, made in search(args, runs, counts).items():
                rates[classes] = made.best()
                numbers.append({"classes": classes, "made": len(made.scores), "of": made.most})
                for (draw, lr), score in made.scores.items():
                    name = runs.models[draw.model].name
                    tries.append({"model": name, "classes": classes, "draw": draw.number, "lr": lr, **score})
        found = report(args, runs, rates)
        rows += found
        for line in summarise(found):
            tags = {"lr": "lr"} | {name: m.kind.tag.format(name) for name, m in MEASURES.items()}
            points = {f"meta_test/{tag}": line[name] for name, tag in tags.items() if line[name] is not None}
            runs.run.scalars(line["classes"], points)
        if is_first():
            chosen = how_chosen(args, len(runs.models), rows)
            more = {"search": tries, "search_tries": numbers, "lr_chosen": chosen}
            write_results(runs.run.folder, rows, {**about, **more})
    return rows


def search(args: Evaluation, runs: Runs, counts: Sequence[int]) -> dict[int, RateSearch]:
    """The search of a learning rate for each of `counts`, all of which one pass serves.

    All rates are tried on each draw of each model, as long as a try may change which rate is the best.
    """
    draws = list(starmap(Draw, product(range(len(runs.models)), range(args.lr_search_runs))))
    objective = "test" if args.test else "train"
    searches = {n: RateSearch(args.lrs, draws, objective, full=args.full_search) for n in counts}
    with Progress(len(draws) * len(args.lrs), every=len(args.lrs), unit="try") as bar:
        while tries := next_tries(searches, runs.group.size):
            scores = runs.scores("search", list(starmap(Job, tries)))
            for (draw, lr, stops), found in zip(tries, scores, strict=True):
                for classes, score in found.items():
                    searches[classes].add(draw, lr, score)
                _advance(bar, found[stops[-1]])
    for classes, made in searches.items():
        log.info(
            "%d classes: learning rate %g, decided by %d tries of %d",
            *(classes, made.best(), len(made.scores), made.most),
        )
        for lr in args.lrs:
            tried = [score for (_, rate), score in made.scores.items() if rate == lr]
            _warn_of_diverged(classes, lr, "tries", tried)
    return searches


def report(args: Evaluation, runs: Runs, rates: Mapping[int, float | None]) -> list[dict[str, Any]]:
    """One row for each class count of `rates`, at its rate, and each of `--runs` draws of each model.

    A run serves all counts of one rate, and goes as far as the largest of them.
    """
    stops = {lr: tuple(n for n, rate in rates.items() if rate == lr) for lr in rates.values()}
    draws = starmap(Draw, product(range(len(runs.models)), range(args.runs)))
    jobs = [Job(draw, lr, stops[lr]) for draw, lr in product(draws, stops)]
    rows: list[dict[str, Any]] = []
    with Progress(len(jobs), every=args.runs, unit="run") as bar:
        for job, found in zip(jobs, runs.scores("report", jobs), strict=True):
            name, number = runs.models[job.draw.model].name, job.draw.number
            for classes, score in found.items():
                rows.append({"model": name, "classes": classes, "run": number, "lr": job.lr, **score})
            _advance(bar, found[job.stops[-1]])
    for classes, lr in rates.items():
        _warn_of_diverged(classes, lr, "runs", [row for row in rows if row["classes"] == classes])
    return sorted(rows, key=lambda row: row["classes"])


def _advance(bar: Progress, score: Score) -> None:
    if bar.advance(**{name: score[name] for name in accuracies()}):
        bar.report()


def _warn_of_diverged(classes: int, lr: float | None, of: str, scores: Sequence[Mapping[str, Any]]) -> None:
    """Warn where runs at a rate diverged: their accuracies say nothing else."""
    diverged = sum(1 for score in scores if score["diverged"])
    if diverged:
        log.warning(
            "%d classes: %d of %d %s diverged%s: weights or logits are not finite",
            *(classes, diverged, len(scores), of),
            "" if lr is None else f" at the learning rate {lr:g}",
        )


def how_chosen(args: Evaluation, models: int, rows: Sequence[Row]) -> str:
    """One line on where the learning rates of `rows` come from: it names a search on the classes reported on,
    and the class counts whose best rate is the smallest or the largest tried."""
    if not LEARNERS[args.learner].takes_steps:
        return f"no learning rate: {LEARNERS[args.learner].title} takes no steps"
    if args.lr is not None:
        return f"learning rate {args.lr:g} as given"
    pool = "the meta-test classes themselves, as released"
    if args.lr_search_split == "background":
        pool = "meta-training classes, none of those reported on"
    draws = f"{args.lr_search_runs} draws" + (f" for each of {models} models" if models > 1 else "")
    accuracy = f"meta-test {'test' if args.test else 'train'} accuracy"
    low, high = min(args.lrs), max(args.lrs)
    rates = f"of {len(args.lrs)} from {low:g} to {high:g}, the one that wins most draws"
    text = f"learning rates chosen by {accuracy} on {draws} of {pool}; {rates}"
    edges = {row["classes"]: row["lr"] for row in rows if row["lr"] in (low, high)}
    if low == high or not edges:
        return text
    at = ", ".join(f"{lr:g} for {classes} classes" for classes, lr in edges.items())
    return f"{text}; at the edge of these, beyond which a better one may lie: {at}"


class Job(NamedTuple):
    """A run to make: a draw, learned at a rate (None for a learner that takes no steps) and tested at each of
    `stops`, class counts in ascending order."""

    draw: Draw
    lr: float | None
    stops: tuple[int, ...]


class Key(NamedTuple):
    """What a score is a function of, within one run folder; `purpose` is one of `PURPOSES`, `lr` None for a
    learner that takes no steps."""

    purpose: str
    model: str
    classes: int
    draw: int
    lr: float | None


class Runs:
    """Makes the runs of several models, each once: a run whose scores the journal has is not made again.

    The processes of `group` make one run each at a time, and the first writes down what all of them found.

    Args:
        journal: of rank 0; None in the other processes.
        make: gives the meta-test of a model on a split of the data, `evaluation` or `background`.
    """

    def __init__(
        self,
        args: Evaluation,
        run: Run,
        journal: Journal | None,
        models: Sequence[Model],
        make: Callable[[Model, str], MetaTest],
        group: Group,
    ) -> None:
        self.args, self.run, self.journal, self.models, self.group = args, run, journal, models, group
        self.known: dict[Key, Score] = dict(group.gather(journal.known if journal else {})[0])
        # Two are kept, since frozen outputs take memory: with one model the meta-tests of both splits.
        self._meta_test = lru_cache(maxsize=2)(lambda position, split: make(models[position], split))

    def scores(self, purpose: Purpose, jobs: Sequence[Job]) -> Iterator[dict[int, Score]]:
        """The scores of each job, by class count, in the order of the jobs."""
        for start in range(0, len(jobs), self.group.size):
            together = jobs[start : start + self.group.size]
            for part in self.group.gather([self._make(purpose, job) for job in self.group.shard(together)]):
                for found, tracked in part:
                    for classes, rows in tracked.items() if is_first() else ():
                        _write_forgetting(self.run, classes, rows)
                    for key, score in found.items():
                        self.known[key] = score
                        if self.journal:
                            self.journal.add(key, score)
            yield from ({n: self.known[self._key(purpose, job, n)] for n in job.stops} for job in together)

    def _key(self, purpose: Purpose, job: Job, classes: int) -> Key:
        return Key(purpose, self.models[job.draw.model].name, classes, job.draw.number, job.lr)

    def _make(self, purpose: Purpose, job: Job) -> tuple[dict[Key, Score], dict[int, list[Row]]]:
        """The scores of a run at stops that have none yet, and of a run that is tracked the accuracies by
        class until each of these stops."""
        stops = {n for n in job.stops if self._key(purpose, job, n) not in self.known}
        if not stops:
            return {}, {}
        every = self.args.track_every if (purpose, job.draw) == ("report", Draw(0, 0)) else 0
        on_the_way = set(range(every, max(stops), every)) if every else set()
        split = self.args.lr_search_split if purpose == "search" else "evaluation"
        tester = self._meta_test(job.draw.model, split)
        found: dict[Key, Score] = {}
        rows: list[Row] = []
        tracked: dict[int, list[Row]] = {}
        for answers in tester.walk(
            sorted(stops | on_the_way),
            job.lr,
            purpose,
            # No two models have a draw in common: their runs are independent.
            job.draw.number * len(self.models) + job.draw.model,
            drawn=len(tester.images) if self.args.nested else job.stops[-1],
        ):
            seen = len(answers.classes)
            if seen in stops:
                found[self._key(purpose, job, seen)] = answers.score()
                if every:
                    tracked[seen] = [*rows, *by_class(answers)]
            if seen in on_the_way:
                rows += by_class(answers)
        return found, tracked


def by_class(answers: Answers) -> list[Row]:
    """One row per class: `seen` (classes learned by then), `position` (in the order of learning, from 0),
    `class` (id), and the accuracy on its images of `train` and `test`, 0 to 1."""
    train, test = (right.double().mean(1).tolist() for right in (answers.train, answers.test))
    rows = enumerate(zip(answers.classes.tolist(), train, test, strict=True))
    seen = len(answers.classes)
    return [{"seen": seen, "position": k, "class": c, "train": a, "test": b} for k, (c, a, b) in rows]


def _write_forgetting(run: Run, classes: int, rows: Sequence[Row]) -> None:
    """Write what a run of `classes` classes remembered on its way: a table, a picture, and to TensorBoard."""
    write_table(run.folder / f"forgetting_{classes}.csv", rows)
    pixels = save_png(forgetting_figure(rows), run.folder / f"forgetting_{classes}.png")
    run.image(f"meta_test/forgetting_{classes}", pixels, classes)


class Journal:
    """`scores.csv` of a run folder, open for more scores.

    One line is appended per score and put on disk before the next run begins. Rewriting a whole file each
    time would be as safe, but would cost more with every score, of which a search makes thousands. A process
    killed at any moment, or a full disk, can at worst tear the last line: it lacks its end, is cut off when
    the file is next opened, and its score is computed again. Numbers are written with all their digits.

    Attributes:
        known: scores by key.

    Raises:
        UserError: the file cannot be read or written, or holds something else.
    """

    def __init__(self, path: Path) -> None:
        self.path = path
        columns = [*Key._fields, *MEASURES]
        with refusing(f"write {path}"):
            content = path.read_bytes() if path.exists() else b""
            whole = content.rfind(b"\n") + 1
            self.known = self._parsed(content[:whole], columns) if whole else {}
            self._file = path.open("ab", buffering=0)
            self._file.truncate(whole)
        if not whole:
            self._append(columns)

    def _parsed(self, content: bytes, columns: list[str]) -> dict[Key, Score]:
        known: dict[Key, Score] = {}
        try:
            for cells in read_table(self.path, columns, content.decode("utf-8-sig")):
                purpose, model, classes, draw, lr = (cells[name] for name in Key._fields)
                if purpose not in PURPOSES:
                    raise ValueError(f"{purpose!r} is none of {', '.join(PURPOSES)}")
                key = Key(purpose, model, int(classes), int(draw), float(lr) if lr else None)
                known[key] = {name: m.read(cells[name], key.classes) for name, m in MEASURES.items()}
        except ValueError as error:
            raise UserError(f"{self.path}, after {len(known)} scores: {error}") from error
        return known

    def add(self, key: Key, score: Score) -> None:
        """Write a score down.

        Raises:
            UserError: it cannot be written.
        """
        self._append([*key, *score.values()])
        self.known[key] = score

    def _append(self, values: Sequence[object]) -> None:
        line = io.StringIO()
        csv.writer(line, lineterminator="\n").writerow(values)
        data = line.getvalue().encode()
        with refusing(f"write {self.path}"):
            if self._file.write(data) < len(data):
                raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))
            sync(self._file.fileno())

    def close(self) -> None:
        """Close the file."""
        self._file.close()
