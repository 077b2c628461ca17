"""The paper's evaluation from top to bottom: models, search for a learning rate, report on fresh draws. A run
is made once, and its scores are on disk before the next run begins."""

import hashlib
import logging
from collections.abc import Callable, Iterator, Mapping, Sequence
from functools import lru_cache
from itertools import chain, product, starmap
from pathlib import Path
from typing import Any, NamedTuple

import torch
from torch import Tensor

from datasets import Source
from datasets.images import SIZE, Pool
from evaluation.plots import figure_pixels, forgetting_figure, gate_figure, or_warn, read_png, save_png
from evaluation.results import (
    Key,
    Row,
    append,
    columns_of,
    known_scores,
    summarise,
    write_results,
    write_table,
)
from flags.evaluation import Evaluation
from model.learner import LEARNERS
from model.meta_test import MetaTest, Purpose
from model.modelfactory import Network, build, fingerprint, restore
from model.representation import active_fraction, represent
from model.scores import MEASURES, Answers, Draw, Job, RateSearch, Score, accuracies, next_tries
from model.treatments import TABLE, Weights
from utils.command_line import read_config
from utils.distributed import Group, is_first
from utils.errors import UserError
from utils.files import load_checkpoint
from utils.jobs import models_below
from utils.run import Progress, Run

VALIDATION_LR = 0.001  # learning rate of a training's meta-tests: the best for most class counts
SHOWN = 10  # classes whose gates are drawn, for two images each

log = logging.getLogger("anml")


class Model(NamedTuple):
    """One model to test.

    Attributes:
        name: the file as it was typed, or `scratch`; the column `model` of the results.
        net: the network.
        weights: the origin of the weights.
        sha256: hexadecimal digest of the file; empty without a file.
        step: meta-steps of the training.
    """

    name: str
    net: Network
    weights: Weights
    sha256: str = ""
    step: int = 0


def models_to_test(args: Evaluation) -> list[Model]:
    """The models of `--model`, each once, on the CPU; for `--scratch` one new network, of the shape of
    `--model` if given.

    Raises:
        UserError: a file is unreadable, or models are of different treatments or not of the treatment of
            `--treatment-preset`.
    """
    models: list[Model] = []
    kinds: list[tuple[object, ...]] = []
    paths = [
        path for given in args.model or () for path in (models_below(given) if given.is_dir() else [given])
    ]
    for path in paths:
        saved = load_checkpoint(path)
        log.info("%s: %s after %d steps", path, saved.network, saved.step)
        net, sha256 = restore(saved, path), hashlib.sha256(path.read_bytes()).hexdigest()
        weights: Weights = "pretrained" if saved.arguments.get("weights") == "pretrained" else "meta-trained"
        models.append(Model(str(path), net, weights, sha256, saved.step))
        kinds.append((weights, net.network, net.widths, net.image_size, net.normalisation))
        if kinds[-1] != kinds[0]:
            held = f"{models[0].name} holds {kinds[0]}, {path} holds {kinds[-1]}"
            raise UserError(f"--model takes models of one treatment and data set: {held}")
        _warn_of_other_data(path, saved.arguments, args.source(net))
    if args.scratch:
        shape = models[0].net if models else None
        kind = args.treatment, args.constructor, args.size or SIZE
        network, widths, size = (shape.network, shape.widths, shape.image_size) if shape else kind
        net = build(network, widths, torch.Generator().manual_seed(args.seed), size)
        models = [Model("scratch", net, "random")]
    if args.treatment_preset is not None:
        row, model = TABLE[args.treatment_preset], models[0]
        if row.network not in (model.net.network, None) or row.weights != model.weights:
            raise UserError(
                f"--treatment-preset {row.name} tests {row.weights} {row.network}; "
                f"{model.name} holds {model.weights} {model.net.network}"
            )
    # Equal weights (say of a training's final model and its last kept model) would count twice, and narrow an
    # interval over models.
    kept: dict[str, Model] = {}
    for model in models:
        first = kept.setdefault(fingerprint(model.net), model)
        if first is not model:
            log.warning("%s holds the same weights as %s: it is left out", model.name, first.name)
    return list(kept.values())


def match_earlier(models: list[Model], decided: Mapping[str, Any], folder: Path) -> list[Model]:
    """The models under the names that they had in the evaluation of a run folder.

    Args:
        decided: other values that must equal those in `config.json`: the plan, and the images' identity.
        folder: the run folder of the evaluation that is resumed.

    Raises:
        UserError: the models' contents or a value of `decided` differ from the folder's.
    """
    config = read_config(folder)
    before = {**config, **config["plan"]}
    for key, value in decided.items():
        if before.get(key, value) != value:  # runs of commit d362890 have no data hash
            raise UserError(f"--resume {folder}: its {key} was {before.get(key)}, and is now {value}")
    try:
        earlier = [(str(known["name"]), known["sha256"]) for known in config["models"]]
    except (LookupError, TypeError):
        raise UserError(f"--resume {folder}: its config.json names no --model") from None
    if [model.sha256 for model in models] != [sha256 for _, sha256 in earlier]:
        raise UserError(
            f"--resume {folder}: it tests {', '.join(name for name, _ in earlier)}; --model "
            f"{' '.join(model.name for model in models)} are other files, or have changed since"
        )
    return [model._replace(name=name) for model, (name, _) in zip(models, earlier, strict=True)]


def _warn_of_other_data(path: Path, arguments: Mapping[str, Any], source: Source) -> None:
    """Warn where a model was trained on the same data set with other options: where a draw splits a folder's
    classes, the training may have used tested classes. `arguments` are those of the training."""
    for name, value in source.options.items() if arguments.get("dataset") == source.dataset else ():
        before = arguments.get(f"data_{name}", arguments.get(name, value))
        if before != value:
            other = f"{path} was trained with --{name} {before}, and this is {value}"
            log.warning("%s: make sure that no class tested here was trained on", other)


def search_and_report(
    args: Evaluation, schedule: Sequence[int], runs: "Runs", about: Mapping[str, Any]
) -> list[dict[str, Any]]:
    """The rows of the report: search and report each class count of `schedule`, with `--nested` all at once.

    `results.csv` and `results.json` (with `about`, search and summary) are written after each class count.
    """
    rows: list[dict[str, Any]] = []
    tries: list[dict[str, Any]] = []
    for counts in [sorted(schedule)] if args.nested else [[classes] for classes in schedule]:
        rates = dict.fromkeys(counts, args.lr)
        if args.lr is None and LEARNERS[args.learner].takes_steps:
            for classes, made in search(args, runs, counts).items():
                rates[classes] = made.best()
                start, most = len(tries), len(made.rates) * len(made.draws)
                decided = f"decided by {len(made.scores)} tries of {most}"
                log.info("%d classes: learning rate %g, %s", classes, made.best(), decided)
                for (draw, lr), score in made.scores.items():
                    name = runs.models[draw.model].name
                    tries.append({"model": name, "classes": classes, "draw": draw.number, "lr": lr, **score})
                _warn_of_diverged("tries", tries[start:])
        found = report(args, runs, rates)
        _warn_of_diverged("runs", found)
        rows += found
        for line in summarise(found):
            tags = {"lr": "lr"} | {name: m.kind.tag.format(name) for name, m in MEASURES.items()}
            known = {name: line[name] for name in tags if line.get(name) is not None}
            points = {f"meta_test/{tags[name]}": value for name, value in known.items()}
            runs.run.scalars(line["classes"], points)
            picture = runs.run.folder / f"forgetting_{line['classes']}.png"
            if is_first() and picture.exists():  # also of a run before this process, whose points go
                runs.run.image(f"meta_test/{picture.stem}", read_png(picture), line["classes"])
        if is_first():
            chosen = how_chosen(args, len(runs.models), rows)
            write_results(runs.run.folder, rows, {**about, "search": tries, "lr_chosen": chosen})
    return rows


def search(args: Evaluation, runs: "Runs", counts: Sequence[int]) -> dict[int, RateSearch]:
    """The finished search for a learning rate of each class count in `counts`, all from the same runs.

    Rates are tried on each draw of each model, as long as a try may change the best rate.
    """
    draws = list(starmap(Draw, product(range(len(runs.models)), range(args.lr_search_runs))))
    objective = "test" if args.test else "train"
    searches = {n: RateSearch(args.lrs, draws, objective, args.full_search) for n in counts}
    with Progress(len(draws) * len(args.lrs), every=len(args.lrs), unit="try") as bar:
        while tries := next_tries(searches, runs.group.size):
            for job, found in runs.scores("search", tries, bar):
                for classes, score in found.items():
                    searches[classes].scores[job.draw, job.lr] = score
    return searches


def report(args: Evaluation, runs: "Runs", rates: Mapping[int, float | None]) -> list[dict[str, Any]]:
    """One row for each class count of `rates`, at its rate, and each of `--runs` draws of each model.

    One run gives the rows of all class counts with the same rate.
    """
    stops = {lr: tuple(n for n, rate in rates.items() if rate == lr) for lr in rates.values()}
    draws = starmap(Draw, product(range(len(runs.models)), range(args.runs)))
    jobs = [Job(draw, lr, stops[lr]) for draw, lr in product(draws, stops)]
    rows: list[dict[str, Any]] = []
    with Progress(len(jobs), every=args.runs, unit="run") as bar:
        for job, found in runs.scores("report", jobs, bar):
            name, number = runs.models[job.draw.model].name, job.draw.number
            for classes, score in found.items():
                rows.append({"model": name, "classes": classes, "run": number, "lr": job.lr, **score})
    return sorted(rows, key=lambda row: row["classes"])


def _warn_of_diverged(of: str, rows: Sequence[Row]) -> None:
    """Warn where runs at a rate diverged, which accuracies alone do not show."""
    for classes, lr in dict.fromkeys((row["classes"], row["lr"]) for row in rows):
        diverged = [row["diverged"] for row in rows if (row["classes"], row["lr"]) == (classes, lr)]
        at = "" if lr is None else f" at the learning rate {lr:g}"
        found = f"{sum(diverged)} of {len(diverged)} {of} diverged{at}"
        if any(diverged):
            log.warning("%d classes: %s: weights or logits are not finite", classes, found)


def how_chosen(args: Evaluation, models: int, rows: Sequence[Row]) -> str:
    """One line on the origin of the learning rates of `rows`. The line names a search on reported classes,
    and class counts whose best rate is the smallest or largest tried."""
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


class Runs:
    """Makes the runs of several models; scores that are in `scores.csv` are not computed again.

    The processes of `group` make one run each at a time, and rank 0 writes all their scores.

    Args:
        make: returns the meta-test of a model on a split of the data, `evaluation` or `background`.
    """

    def __init__(
        self,
        args: Evaluation,
        run: Run,
        models: Sequence[Model],
        make: Callable[[Model, str], MetaTest],
        group: Group,
    ) -> None:
        self.args, self.run, self.models, self.group = args, run, models, group
        self.path = run.folder / "scores.csv"
        self.known = group.gather(known_scores(self.path) if is_first() else {})[0]
        self.columns = columns_of(self.path) if is_first() else []
        # Two meta-tests are kept (both splits of one model); more frozen outputs would take too much memory.
        self._meta_test = lru_cache(maxsize=2)(lambda position, split: make(models[position], split))

    def scores(
        self, purpose: Purpose, jobs: Sequence[Job], bar: Progress
    ) -> Iterator[tuple[Job, dict[int, Score]]]:
        """Each job and its scores by class count; `bar` counts the jobs."""
        for start in range(0, len(jobs), self.group.size):
            batch = jobs[start : start + self.group.size]
            made = [result for job in self.group.shard(batch) for result in self._make(purpose, job)]
            for key, score, remembered in chain(*self.group.gather(made)):
                self.known[key] = score
                if is_first() and remembered:
                    name = f"forgetting_{key.classes}"
                    write_table(self.run.folder / f"{name}.csv", remembered)
                    with or_warn(f"{name}.png"):
                        save_png(forgetting_figure(remembered), self.run.folder / f"{name}.png")
                if is_first():
                    cells = {**key._asdict(), **score}
                    append(self.path, [cells.get(name, "") for name in self.columns])
            for job in batch:
                found = {n: self.known[self._key(purpose, job, n)] for n in job.stops}
                if bar.advance(**{name: found[job.stops[-1]][name] for name in accuracies()}):
                    bar.report()
                yield job, found

    def _key(self, purpose: Purpose, job: Job, classes: int) -> Key:
        return Key(purpose, self.models[job.draw.model].name, classes, job.draw.number, job.lr)

    def _make(self, purpose: Purpose, job: Job) -> Iterator[tuple[Key, Score, list[Row]]]:
        """The score of a run at each stop without a score, and in a tracked run the accuracies by class up to
        that stop."""
        keys = {n: self._key(purpose, job, n) for n in job.stops}
        missing = {n for n, key in keys.items() if key not in self.known}
        if not missing:
            return
        stops = {n for n in job.stops if n <= max(missing)}  # volatility takes the stop before, known or not
        every = self.args.track_every if (purpose, job.draw) == ("report", Draw(0, 0)) else 0
        on_the_way = set(range(every, max(stops), every)) if every else set()
        split = self.args.lr_search_split if purpose == "search" else "evaluation"
        tester = self._meta_test(job.draw.model, split)
        rows: list[Row] = []
        before = None
        for answers in tester.walk(
            sorted(stops | on_the_way),
            job.lr,
            purpose,
            # Models have different draws, so that their runs are independent.
            job.draw.number * len(self.models) + job.draw.model,
            drawn=len(tester.images) if self.args.nested else job.stops[-1],
        ):
            seen = len(answers.classes)
            now = by_class(answers) if every else []
            if seen in missing:
                yield keys[seen], answers._replace(before=before).score(), [*rows, *now]
            before = answers.test if seen in stops else before
            if seen in on_the_way:
                rows += now


def by_class(answers: Answers) -> list[Row]:
    """One row per class: `seen` (classes learned so far), `position` (in the order of learning, from 0),
    `class` (id), and the accuracies `train` and `test` on the class's images, 0 to 1."""
    train, test = (right.double().mean(1).tolist() for right in (answers.train, answers.test))
    rows = enumerate(zip(answers.classes.tolist(), train, test, strict=True))
    seen = len(answers.classes)
    return [{"seen": seen, "position": k, "class": c, "train": a, "test": b} for k, (c, a, b) in rows]


def validate(run: Run, net: Network, images: Pool, step: int, classes: int, learner: str) -> None:
    """Log a small meta-test on meta-training classes, and a picture of gates.

    Of the 20 images of a class 15 are learned and 5 tested; of fewer images (2 or more), the same share. The
    picture shows the gates of two images of each of the first `SHOWN` classes.

    Args:
        learner: key of `model.learner.LEARNERS`.
    """
    smallest = min(20, *images.sizes)
    test_images = max(1, smallest // 4)
    test = MetaTest(
        net,
        images,
        net.default_meta_test_rln,
        seed=0,
        train_images=smallest - test_images,
        test_images=test_images,
        kind=LEARNERS[learner],
        background=images,
    )
    score = test.score(classes, VALIDATION_LR, "validation", draw=0)
    found = {name: score[name] for name in accuracies()}
    run.scalars(step, {f"meta_val/accuracy_{name}": value for name, value in found.items()})
    text = " ".join(f"{name} {value:.3f}" for name, value in found.items())
    text = "diverged" if score["diverged"] else text
    log.info("step %d meta-test on %d meta-training classes: %s", step, classes, text)
    pairs = [images[label][:2] for label in range(min(classes, SHOWN))]
    shown = Pool(torch.cat(pairs), tuple(map(len, pairs)))
    if gate := represent(net, shown).get("gate"):
        labels = torch.arange(len(shown)).repeat_interleave(2).tolist()
        with or_warn("meta_val/gate"):
            run.image("meta_val/gate", figure_pixels(gate_figure(gate.rows.cpu().numpy(), labels)), step)


def gate_statistics(net: Network, images: Tensor) -> dict[str, float]:
    """Mean gate and fractions of features active before and after the gate, on images [B, C, S, S]; the
    fraction of active features alone without a gate."""
    seen = represent(net, Pool(images, (len(images),)))
    if "gate" not in seen:
        return {"meta_train/active": active_fraction(seen["before"].rows)}
    return {
        "meta_train/gate_mean": seen["gate"].rows.mean().item(),
        "meta_train/active_before_gate": active_fraction(seen["before"].rows),
        "meta_train/active_after_gate": active_fraction(seen["after"].rows),
    }
