"""What an evaluation found: one row per run in `results.csv`, what it was and a summary in `results.json`."""

from __future__ import annotations

import csv
import io
import json
import math
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
from numpy.typing import NDArray

from model.scores import ACCURACY, MEASURES, RUNS, accuracies
from utils.errors import UserError, refusing
from utils.files import read_text, write_text

FEW = 10  # fewer values than these have Student's t interval; as many or more have a bootstrap interval
RESAMPLES = 9999  # of a bootstrap

COLUMNS = ("model", "classes", "run", "lr")  # of `results.csv`, the measures follow
METRICS = ("step", "loss", "accuracy_trajectory", "accuracy_remember")
"""The columns of a training's `metrics.csv` that are drawn."""

Row = Mapping[str, Any]
"""One run: `model` (its file), `classes`, `run`, `lr` (None of a learner that takes no steps), and its score,
a value for each of `model.scores.MEASURES`."""


class Results(NamedTuple):
    """What an evaluation left: its rows, and what `results.json` says beside their summary (empty without
    that file)."""

    rows: list[dict[str, Any]]
    about: dict[str, Any]


def write_results(folder: Path, rows: Sequence[Row], about: Mapping[str, Any]) -> None:
    """Write `results.csv` and `results.json` into `folder`, each whole or not at all.

    Args:
        rows: every run so far.
        about: what else `results.json` should say: treatment, models, plan, search.

    Raises:
        UserError: a file cannot be written.
    """
    write_table(folder / "results.csv", rows)
    content = {**about, "summary": summarise(rows)}
    write_text(folder / "results.json", json.dumps(content, indent=2) + "\n")


def write_table(path: Path, rows: Sequence[Row]) -> None:
    """Write rows of equal keys as a CSV file, whole or not at all.

    Raises:
        UserError: the file cannot be written.
    """
    text = io.StringIO()
    writer = csv.DictWriter(text, fieldnames=list(rows[0]), lineterminator="\n")
    writer.writeheader()
    writer.writerows(rows)
    write_text(path, text.getvalue())


def read_results(path: Path) -> Results:
    """The results that :func:`write_results` wrote.

    Args:
        path: a run folder, or a CSV file or the JSON file of the same name beside it.

    Raises:
        UserError: no such file, or the CSV file is no table of runs: other columns, a value of the wrong
            kind or out of its range, a run twice, no runs at all.
    """
    path = _file(path, "results.csv", "evaluate_classification.py")
    path = path.with_suffix(".csv") if path.suffix == ".json" else path
    beside = path.with_suffix(".json")
    about = read_json(beside) if beside.is_file() else {}
    rows: dict[tuple[object, ...], dict[str, Any]] = {}
    for number, cells in enumerate(read_table(path, [*COLUMNS, *MEASURES]), start=2):
        try:
            row = _run(cells)
        except ValueError as error:
            raise UserError(f"{path}, line {number}: {error}") from None
        key = tuple(row[name] for name in COLUMNS[:3])
        if key in rows:
            raise UserError(f"{path}, line {number}: the same model, classes and run as a line above")
        rows[key] = row
    if not rows:
        raise UserError(f"{path} holds no runs")
    return Results(list(rows.values()), {key: about[key] for key in about if key != "summary"})


def read_metrics(path: Path) -> dict[str, NDArray[np.float64]]:
    """The columns `METRICS` of what a training run measured, a value for each of its steps.

    Args:
        path: a run folder, or its `metrics.csv`. A last line without its end is passed over: a training may
            be writing it.

    Raises:
        UserError: no such file, or no such columns of numbers, or no steps at all.
    """
    path = _file(path, "metrics.csv", "mrcl_classification.py")
    lines = text_of(path).splitlines(keepends=True)
    rows = list(csv.DictReader(line for line in lines if line.endswith("\n")))
    try:
        columns = {name: np.array([row[name] for row in rows], dtype=np.float64) for name in METRICS}
    except (LookupError, ValueError):
        raise UserError(f"{path} is not the metrics.csv of a training: {', '.join(METRICS)}") from None
    if not rows:
        raise UserError(f"{path} holds no steps")
    return columns


def read_table(path: Path, columns: Sequence[str], text: str | None = None) -> list[dict[str, str]]:
    """The rows of a CSV file that has exactly these columns.

    Args:
        text: the file's content where it is read already.

    Raises:
        UserError: the file cannot be read, has other columns, or a row with too few or too many fields.
    """
    text = text_of(path) if text is None else text
    try:
        lines = [line for line in csv.reader(io.StringIO(text), strict=True) if line]
    except csv.Error as error:
        raise UserError(f"{path} is not a CSV file: {error}") from None
    if not lines or lines[0] != list(columns):
        raise UserError(f"{path} does not begin with the columns {','.join(columns)}")
    for number, line in enumerate(lines, start=1):
        if len(line) != len(columns):
            raise UserError(f"{path}, line {number}: {len(line)} fields instead of {len(columns)}")
    return [dict(zip(columns, line, strict=True)) for line in lines[1:]]


def read_json(path: Path) -> dict[str, Any]:
    """The object in a JSON file.

    Raises:
        UserError: the file cannot be read or holds something else.
    """
    try:
        content = json.loads(text_of(path))
    except (ValueError, RecursionError) as error:
        raise UserError(f"{path} is not a JSON file: {error}") from None
    if not isinstance(content, dict):
        raise UserError(f"{path} holds a {type(content).__name__}, not an object")
    return content


def _file(path: Path, name: str, writer: str) -> Path:
    """The file `name` of a run folder, or `path` itself where it is no folder."""
    if not path.is_dir():
        return path
    if not (path / name).is_file():
        raise UserError(f"{path} holds no {name}; {writer} writes one")
    return path / name


def text_of(path: Path) -> str:
    """The text in a file; raises UserError where the file cannot be read or is not text."""
    try:
        with refusing(f"read {path}"):
            return read_text(path)
    except ValueError:
        raise UserError(f"{path} is not text") from None


def _run(cells: Mapping[str, str]) -> dict[str, Any]:
    """One row of `results.csv`; raises ValueError with what is wrong in it."""
    classes, run = int(cells["classes"]), int(cells["run"])
    lr = float(cells["lr"]) if cells["lr"] else None
    if classes < 1 or run < 0 or not (lr is None or 0 < lr < math.inf):
        raise ValueError(f"{classes} classes, run {run} or lr {lr} is out of its range")
    score = {name: measure.read(cells[name], classes) for name, measure in MEASURES.items()}
    return {"model": cells["model"], "classes": classes, "run": run, "lr": lr, **score}


def interval(groups: Sequence[Sequence[float]]) -> tuple[float, float, str] | None:
    """95% interval of the mean of accuracies over models or, of one model, over its runs: its ends, and how
    they were found. None for one run.

    Of fewer than `FEW` models or runs it is Student's t interval: resampling so few gives one that is far too
    narrow.

    Args:
        groups: the values of each model; none is empty.
    """
    of = "models" if len(groups) > 1 else "runs"
    units = groups if len(groups) > 1 else [[value] for value in groups[0]]
    if len(units) < 2:
        return None
    if len(units) < FEW:
        return *t_interval(units), f"Student's t over {of}"
    within = " and runs" if max(map(len, units)) > 1 else ""
    return *bootstrap_interval(units), f"bootstrap over {of}{within}"


def t_interval(units: Sequence[Sequence[float]]) -> tuple[float, float]:
    """95% interval of the mean of all values by Student's t over the units they belong to, within 0 to 1.

    The values of a unit may depend on each other in any way: with equally many in each it is the t interval
    of the units' means.

    Args:
        units: two or more; none is empty.
    """
    from scipy.special import stdtrit  # half a second to import

    sizes = np.array([len(unit) for unit in units])
    sums = np.array([sum(unit) for unit in units])
    mean = sums.sum() / sizes.sum()
    count = len(units)
    error = math.sqrt(count / (count - 1) * ((sums - sizes * mean) ** 2).sum()) / sizes.sum()
    half = stdtrit(count - 1, 0.975) * error
    return max(float(mean - half), 0.0), min(float(mean + half), 1.0)


def bootstrap_interval(units: Sequence[Sequence[float]], seed: int = 0) -> tuple[float, float]:
    """95% interval of the mean of all values by resampling units, then values within each drawn unit.

    It is one over models and runs: runs of one model resemble each other, and say less of the treatment than
    as many runs of different models.

    Args:
        units: the values of each model, or each run of one model as a unit of its own.

    Returns:
        percentiles of `RESAMPLES` bootstrap means.
    """
    sizes = np.array([len(unit) for unit in units])
    values = np.zeros((len(units), sizes.max()))
    for row, unit in zip(values, units, strict=True):
        row[: len(unit)] = unit
    if len({value for unit in units for value in unit}) == 1:  # their means differ by rounding
        return float(values[0, 0]), float(values[0, 0])
    rng = np.random.default_rng(seed)
    if sizes.max() == 1:
        drawn = rng.integers(len(units), size=(RESAMPLES, len(units)))
        means = [values[:, 0][drawn].mean(1)]
    else:
        means = []
        # In parts, since all resamples at once would take gigabytes.
        for part in np.array_split(np.arange(RESAMPLES), 1 + RESAMPLES * values.size // 10**6):
            drawn = rng.integers(len(units), size=(len(part), len(units), 1))
            within = rng.random((len(part), *values.shape)) * sizes[drawn]
            counted = np.arange(sizes.max()) < sizes[drawn]
            picked = values[drawn, within.astype(int)] * counted
            means.append(picked.sum((1, 2)) / counted.sum((1, 2)))
    low, high = np.percentile(np.concatenate(means), (2.5, 97.5))
    return float(low), float(high)


def summarise(rows: Sequence[Row]) -> list[dict[str, Any]]:
    """Mean and 95% interval over the models and runs of each class count, in order of class count.

    Returns:
        mappings with `classes`, `models`, `runs` (of all models), `lr` (that of the first run), and each
        measure as its mean over the runs, or as the number of runs that it is true of (`diverged`). A run
        that diverged has nothing right, which counts; where all runs did, a mean is None. An accuracy such as
        `test` has `test_low`, `test_high` and `test_interval` as well, which names the method of its
        :func:`interval`; None where there is no interval.
    """
    summary = []
    for classes in sorted({row["classes"] for row in rows}):
        runs = [row for row in rows if row["classes"] == classes]
        models = list(dict.fromkeys(row["model"] for row in runs))
        line: dict[str, Any] = {"classes": classes, "models": len(models), "runs": len(runs)}
        line["lr"] = runs[0]["lr"]
        all_diverged = all(row["diverged"] for row in runs)
        for name, measure in MEASURES.items():
            groups = [[row[name] for row in runs if row["model"] == model] for model in models]
            if measure.kind is RUNS:
                line[name] = sum(map(sum, groups))
                continue
            line[name] = (
                None if all_diverged else float(np.mean([value for group in groups for value in group]))
            )
            if measure.kind is ACCURACY:
                found = None if all_diverged else interval(groups)
                ends = ("low", "high", "interval")
                line |= {f"{name}_{end}": value for end, value in zip(ends, found or [None] * 3, strict=True)}
        summary.append(line)
    return summary


def table(rows: Sequence[Row]) -> str:
    """The summary as lines for the terminal; accuracies in percent, 95% intervals in brackets."""
    headings = [m.kind.heading.format(name.replace("_", " ")) for name, m in MEASURES.items()]
    lines = [["classes", "lr", "runs", *headings]]
    summary = summarise(rows)
    for line in summary:
        lr = "-" if line["lr"] is None else f"{line['lr']:.6g}"
        lines.append([str(line["classes"]), lr, str(line["runs"]), *(_cell(line, name) for name in MEASURES)])
    text = aligned(lines)
    methods = {line[f"{name}_interval"] for line in summary for name in accuracies()} - {None}
    return f"{text}\n[ ] 95% interval: {', '.join(sorted(methods))}" if methods else text


def _cell(line: Mapping[str, Any], name: str) -> str:
    """A measure of a line of the summary as the table shows it."""
    value, kind = line[name], MEASURES[name].kind
    if value is None:
        return "diverged" if kind is ACCURACY else "-"
    if kind is not ACCURACY:
        return str(value) if kind is RUNS else f"{value:.1f}"
    low, high = line[f"{name}_low"], line[f"{name}_high"]
    span = "-" if low is None else f"[{100 * low:5.1f}, {100 * high:5.1f}]"
    return f"{100 * value:5.1f} {span}"


def aligned(lines: Sequence[Sequence[str]]) -> str:
    """Lines of equally many cells as text, each column as wide as its widest cell and aligned to the
    right."""
    widths = [max(map(len, column)) for column in zip(*lines, strict=True)]
    return "\n".join(
        "  ".join(cell.rjust(width) for cell, width in zip(line, widths, strict=True)) for line in lines
    )


def compare(a: Sequence[Row], b: Sequence[Row]) -> list[dict[str, Any]]:
    """Two-sided Mann-Whitney U test between two results at each class count that both have.

    It is the paper's test, and takes all runs of all models of a result for independent.

    Returns:
        mappings with `classes`, `runs_a`, `runs_b`, and for each accuracy `key`: `key_a` and `key_b` (means,
        0 to 1), `key_u` (U of `a`: pairs of runs in which `a` is better, ties counting half) and `key_p`
        (probability of such a U, or one further from the middle, if both were alike). In order of class
        count; empty if the results have none in common.
    """
    from scipy import stats  # a second to import

    lines = []
    for classes in sorted({row["classes"] for row in a} & {row["classes"] for row in b}):
        runs = [[row for row in rows if row["classes"] == classes] for rows in (a, b)]
        line: dict[str, Any] = {"classes": classes, "runs_a": len(runs[0]), "runs_b": len(runs[1])}
        for key in accuracies():
            of_a, of_b = ([row[key] for row in rows] for rows in runs)
            line |= {f"{key}_a": float(np.mean(of_a)), f"{key}_b": float(np.mean(of_b))}
            found = stats.mannwhitneyu(of_a, of_b, alternative="two-sided")
            line |= {f"{key}_u": float(found.statistic), f"{key}_p": float(found.pvalue)}
        lines.append(line)
    return lines
