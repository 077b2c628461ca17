"""What an evaluation found: one row per run in `results.csv`, everything in `results.json`."""

from __future__ import annotations

import csv
import io
import json
import math
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
from numpy.typing import NDArray

from model.scores import ACCURACY, MEASURES, RUNS, Measure, Score, accuracies
from utils.errors import UserError
from utils.files import read_text, write_text

FEW = 10  # values, from which on a bootstrap says how far off their mean may be

METRICS = ("step", "loss", "accuracy_trajectory", "accuracy_remember")
"""The columns of a training's `metrics.csv` that are drawn."""

Row = Mapping[str, Any]
"""One run: `model` (its file), `classes`, `run`, `lr` and the measures of `model.scores`.

`lr` is None of a learner that takes no steps. A measure is None, or not there, where the file is older
than it.
"""


@dataclass(frozen=True)
class Results:
    """What a results file holds.

    Attributes:
        rows: one per run; `model` is empty in files that do not say.
        about: what `results.json` says beside the runs and their summary; empty without one.
    """

    rows: list[dict[str, Any]]
    about: dict[str, Any]


def read_results(path: Path) -> Results:
    """Read and check what :func:`write_results` wrote.

    Args:
        path: a run folder; its `results.csv`, or another CSV of the same columns (a JSON of the same
            name beside it tells `about`); or its `results.json`.

    Raises:
        UserError: no such file, or it is not a table of runs: wrong columns, a value of the wrong
            kind or out of its range, a run twice, no runs at all. Measures may be missing.
    """
    path = _table(path, "results.csv", "evaluate_classification.py")
    if path.suffix == ".json":
        about = _read_json(path)
        found = about.get("runs")
        if not isinstance(found, list) or not all(isinstance(row, dict) for row in found):
            raise UserError(f"{path} is not a results.json: it holds no list of runs")
        numbered = [(f"run {k}", row) for k, row in enumerate(found)]
    else:
        beside = path.with_suffix(".json")
        about = _read_json(beside) if beside.is_file() else {}
        reader = csv.DictReader(io.StringIO(_read(path)), strict=True)
        try:
            numbered = [(f"line {reader.line_num}", row) for row in reader]
            short = next((where for where, row in numbered if None in row.values()), None)
        except csv.Error as error:
            raise UserError(f"{path} is not a CSV file: {error}") from error
        if short is not None:
            raise UserError(f"{path}, {short}: fewer fields than columns")
    rows = [_checked(row, f"{path}, {where}") for where, row in numbered]
    if not rows:
        raise UserError(f"{path} holds no runs")
    seen = set()
    for row, (where, _) in zip(rows, numbered, strict=True):
        run = (row["model"], row["classes"], row["run"])
        if run in seen:
            raise UserError(f"{path}, {where}: run {row['run']} of {row['classes']} classes is there twice")
        seen.add(run)
    return Results(rows, {key: value for key, value in about.items() if key not in ("runs", "summary")})


def read_metrics(path: Path) -> dict[str, NDArray[np.float64]]:
    """The columns of what a training run measured, `METRICS` for each of its steps.

    Args:
        path: a run folder, or its `metrics.csv`. What a running training has written of its next row is
            passed over.

    Raises:
        UserError: no such file, or no such columns of numbers, or no steps at all.
    """
    path = _table(path, "metrics.csv", "mrcl_classification.py")
    lines = _read(path).splitlines(keepends=True)
    rows = list(csv.DictReader(line for line in lines if line.endswith("\n")))
    try:
        columns = {name: np.array([row[name] for row in rows], dtype=np.float64) for name in METRICS}
    except (LookupError, ValueError):
        raise UserError(f"{path} is not the metrics.csv of a training: {', '.join(METRICS)}") from None
    if not rows:
        raise UserError(f"{path} holds no steps")
    return columns


def _table(path: Path, name: str, writer: str) -> Path:
    """The file `name` of a run folder, or `path` itself where that is no folder."""
    path = Path(path)
    if not path.is_dir():
        return path
    if not (path / name).is_file():
        raise UserError(f"{path} holds no {name}; {writer} writes one")
    return path / name


def _read(path: Path) -> str:
    try:
        return read_text(path)
    except OSError as error:
        raise UserError(f"cannot read the results {path}: {error.strerror or error}") from error
    except ValueError as error:
        raise UserError(f"{path} is not a results file: it is not text") from error


def _read_json(path: Path) -> dict[str, Any]:
    try:
        content = json.loads(_read(path))
    except (ValueError, RecursionError) as error:
        raise UserError(f"{path} is not a JSON file: {error}") from error
    if not isinstance(content, dict):
        raise UserError(f"{path} is not a results.json: it holds a {type(content).__name__}")
    return content


def _number(kind: Callable[[str], float], low: float, high: float) -> Callable[[str], float]:
    def read(text: str) -> float:
        number = kind(text)
        if not low <= number <= high:  # also false for NaN
            raise ValueError
        return number

    return read


def _rate(text: str) -> float | None:
    return _number(float, math.ulp(0.0), 1e300)(text) if text else None


_COLUMNS: dict[str, tuple[Callable[[str], Any], str]] = {
    "model": (str, "text"),
    "classes": (_number(int, 1, math.inf), "a whole number of 1 or more"),
    "run": (_number(int, 0, math.inf), "a whole number of 0 or more"),
    "lr": (_rate, "a finite number above 0, or nothing"),
}
"""How each column but the measures is read, and what it must hold."""


def _checked(row: Mapping[Any, Any], where: str) -> dict[str, Any]:
    """One row with its values read; texts from a CSV and values from a JSON pass the same checks."""
    row = {"model": "", **row}
    columns = [*_COLUMNS, *MEASURES]
    if not _COLUMNS.keys() < row.keys() <= set(columns):
        given = ", ".join(sorted(str(key) for key in row if key is not None))
        raise UserError(f"{where}: the columns should be {', '.join(columns)}; they are {given}")
    values = {}
    for name, (read, kind) in _COLUMNS.items():
        try:
            values[name] = read("" if row[name] is None else str(row[name]))
        except ValueError:
            raise UserError(f"{where}: {name} is {row[name]!r}, not {kind}") from None
    try:
        return {**values, **Score.read(row, values["classes"])}
    except ValueError as error:
        raise UserError(f"{where}: {error}") from None


class Interval(NamedTuple):
    """95% interval of a mean accuracy, 0 to 1, and how it was found."""

    low: float
    high: float
    method: str


def interval(groups: Sequence[Sequence[float]]) -> Interval | None:
    """95% interval of the mean of all values, over models or, of one model, over its runs.

    Fewer than `FEW` of them have Student's t interval, since resampling as few gives one that is far too
    narrow. One run alone has no interval.

    Args:
        groups: the values of each model; none is empty.
    """
    of = "models" if len(groups) > 1 else "runs"
    units = groups if len(groups) > 1 else [[value] for value in groups[0]]
    if len(units) < 2:
        return None
    if len(units) < FEW:
        return Interval(*t_interval(units), f"Student's t over {of}")
    within = " and runs" if max(map(len, units)) > 1 else ""
    return Interval(*cluster_interval(groups), f"bootstrap over {of}{within}")


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


def bootstrap_interval(values: Sequence[float], seed: int = 0) -> tuple[float, float]:
    """95% interval of the mean by resampling `values` (percentiles of 9,999 bootstrap means).

    One value, or values that are all equal, give an interval of no width.
    """
    if len(set(values)) < 2:
        return float(values[0]), float(values[0])
    from scipy import stats  # a second to import, which only this function needs

    interval = stats.bootstrap(
        (np.asarray(values),), np.mean, method="percentile", rng=np.random.default_rng(seed)
    ).confidence_interval
    return float(interval.low), float(interval.high)


def cluster_interval(groups: Sequence[Sequence[float]], seed: int = 0) -> tuple[float, float]:
    """95% interval of the mean of all values by resampling groups, then values within each drawn group.

    Runs of one model resemble each other, so that they say less of the treatment than as many runs
    of different models would: the interval is one over models and trajectories (percentiles of 9,999
    means). One group alone, or groups of one value, are resampled as in :func:`bootstrap_interval`.

    Args:
        groups: the values of each model; none is empty.
    """
    if len(groups) == 1:
        return bootstrap_interval(groups[0], seed)
    sizes = np.array([len(group) for group in groups])
    if sizes.max() == 1 or len({value for group in groups for value in group}) < 2:
        return bootstrap_interval([value for group in groups for value in group], seed)
    values = np.zeros((len(groups), sizes.max()))
    for row, group in zip(values, groups, strict=True):
        row[: len(group)] = group
    rng = np.random.default_rng(seed)
    means = []
    # In parts, since all resamples at once would take gigabytes.
    for part in np.array_split(np.arange(9999), 1 + 9999 * values.size // 10**6):
        drawn = rng.integers(len(groups), size=(len(part), len(groups), 1))
        within = rng.random((len(part), *values.shape)) * sizes[drawn]
        counted = np.arange(sizes.max()) < sizes[drawn]
        picked = values[drawn, within.astype(int)] * counted
        means.append(picked.sum((1, 2)) / counted.sum((1, 2)))
    low, high = np.percentile(np.concatenate(means), (2.5, 97.5))
    return float(low), float(high)


def summarise(rows: Sequence[Row]) -> list[dict[str, Any]]:
    """Mean and 95% interval over the models and runs of each class count, in order of class count.

    Returns:
        mappings with `classes`, `models`, `runs` (of all models), `lr` (that of the first run),
        and each measure as its mean over the runs that have it, or as the number of runs that it is
        true of (`diverged`); None if no run has it. A run that diverged has nothing right, which counts;
        where all have, there is no mean. An accuracy such as `test` has `test_low`, `test_high` and
        `test_interval` as well, which names the method of its :func:`interval`; None where there is none.
    """
    summary = []
    for classes in sorted({row["classes"] for row in rows}):
        runs = [row for row in rows if row["classes"] == classes]
        models = list(dict.fromkeys(row.get("model", "") for row in runs))
        line: dict[str, Any] = {"classes": classes, "models": len(models), "runs": len(runs)}
        line["lr"] = runs[0]["lr"]
        all_diverged = all(row.get("diverged") for row in runs)
        for name, measure in MEASURES.items():
            groups = [known(name, (row for row in runs if row.get("model", "") == model)) for model in models]
            groups = [group for group in groups if group]
            if measure.kind is RUNS:
                line[name] = sum(map(sum, groups)) if groups else None
                continue
            if all_diverged:
                groups = []
            line[name] = float(np.mean([value for group in groups for value in group])) if groups else None
            if measure.kind is ACCURACY:
                found = interval(groups) if groups else None
                ends = ("low", "high", "interval")
                line |= {f"{name}_{end}": value for end, value in zip(ends, found or [None] * 3, strict=True)}
        summary.append(line)
    return summary


def known(name: str, rows: Iterable[Row]) -> list[float]:
    """The values of a measure, without those that are missing."""
    return [row[name] for row in rows if row.get(name) is not None]


def table(rows: Sequence[Row]) -> str:
    """The summary as lines for the terminal; accuracies in percent, 95% intervals in brackets."""
    lines = [["classes", "lr", "runs", *(measure.heading for measure in MEASURES.values())]]
    summary = summarise(rows)
    for line in summary:
        cells = [_cell(line, measure) for measure in MEASURES.values()]
        lr = "-" if line["lr"] is None else f"{line['lr']:.6g}"
        lines.append([str(line["classes"]), lr, str(line["runs"]), *cells])
    widths = [max(map(len, column)) for column in zip(*lines, strict=True)]
    texts = ["  ".join(cell.rjust(width) for cell, width in zip(line, widths, strict=True)) for line in lines]
    methods = {line[f"{measure.name}_interval"] for line in summary for measure in accuracies()} - {None}
    if methods:
        texts.append(f"[ ] 95% interval: {', '.join(sorted(methods))}")
    return "\n".join(texts)


def _cell(line: Mapping[str, Any], measure: Measure) -> str:
    """One measure of a line of the summary as the table shows it."""
    value = line[measure.name]
    if value is None:
        return "diverged" if measure.kind is ACCURACY and line["diverged"] == line["runs"] else "-"
    if measure.kind is not ACCURACY:
        return str(value) if measure.kind is RUNS else f"{value:.1f}"
    low, high = line[f"{measure.name}_low"], line[f"{measure.name}_high"]
    span = "-" if low is None else f"[{100 * low:5.1f}, {100 * high:5.1f}]"
    return f"{100 * value:5.1f} {span}"


def compare(a: Sequence[Row], b: Sequence[Row]) -> list[dict[str, Any]]:
    """Two-sided Mann-Whitney U test between two results at each class count that both have.

    The paper's test. It takes all runs of all models of a result for independent.

    Returns:
        mappings with `classes`, `runs_a`, `runs_b`, and for each accuracy `key` that runs of both have:
        `key_a` and `key_b` (means, 0 to 1), `key_u` (U of `a`: pairs of runs in which `a` is better,
        ties counting half) and `key_p` (probability of such a U, or one further from the middle,
        if both were alike). In order of class count; empty if they have none in common.
    """
    from scipy import stats  # a second to import

    lines = []
    for classes in sorted({row["classes"] for row in a} & {row["classes"] for row in b}):
        runs = [[row for row in rows if row["classes"] == classes] for rows in (a, b)]
        line: dict[str, Any] = {"classes": classes, "runs_a": len(runs[0]), "runs_b": len(runs[1])}
        for key in (measure.name for measure in accuracies()):
            of_a, of_b = (known(key, rows) for rows in runs)
            if not (of_a and of_b):
                continue
            line |= {f"{key}_a": float(np.mean(of_a)), f"{key}_b": float(np.mean(of_b))}
            found = stats.mannwhitneyu(of_a, of_b, alternative="two-sided")
            line |= {f"{key}_u": float(found.statistic), f"{key}_p": float(found.pvalue)}
        lines.append(line)
    return lines


def write_results(folder: Path, rows: Sequence[Row], about: Mapping[str, Any]) -> None:
    """Write `results.csv` and `results.json` into `folder`, each whole or not at all.

    Args:
        rows: every run so far, equal keys.
        about: what else `results.json` should say (model, treatment, search).

    Raises:
        UserError: a file cannot be written.
    """
    write_table(folder / "results.csv", rows)
    content = {**about, "summary": summarise(rows), "runs": list(rows)}
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
