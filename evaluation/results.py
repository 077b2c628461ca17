"""The files of an evaluation: `scores.csv` gets every score at once, `results.csv` one row per run of the
report, `results.json` settings and a summary."""

import csv
import errno
import io
import json
import logging
import math
import os
from argparse import ArgumentTypeError
from collections.abc import Mapping, Sequence
from contextlib import suppress
from functools import cache
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
from numpy.typing import NDArray

from model.scores import CHANGE, MEASURES, RUNS, TENTH, Score, optional
from utils.errors import UserError, load_library, refusing
from utils.files import read_json, read_text, sync, write_text
from utils.flag import Reader, positive, whole

METRICS = ("step", "loss", "accuracy_trajectory", "accuracy_remember")
"""The columns of a training's `metrics.csv` that figures show."""

Row = Mapping[str, Any]
"""One run: `model` (file name), `classes` (count), `run` (draw number), `lr` (None for a learner
without steps), and a value for each of `model.scores.MEASURES`, None for a measure that the file lacks.
Columns of unknown measures are kept as texts."""

log = logging.getLogger("anml")


class Results(NamedTuple):
    """An evaluation's rows, and the content of `results.json` (if there) without the summary."""

    rows: list[dict[str, Any]]
    about: dict[str, Any]


def write_results(folder: Path, rows: Sequence[Row], about: Mapping[str, Any]) -> None:
    """Write `results.csv` and `results.json` into a folder, or raise UserError; `about` is the content of
    `results.json` beside the summary: treatment, models, plan, search."""
    write_table(folder / "results.csv", rows)
    content = {**about, "summary": summarise(rows)}
    write_text(folder / "results.json", json.dumps(content, indent=2) + "\n")


def write_table(path: Path, rows: Sequence[Row]) -> None:
    """Write rows as a CSV file, whole or not at all, with a column for each key; raises UserError where that
    fails."""
    text = io.StringIO()
    columns = {key: None for row in rows for key in row}
    writer = csv.DictWriter(text, columns, lineterminator="\n")
    writer.writeheader()
    writer.writerows(rows)
    write_text(path, text.getvalue())


def read_results(path: Path) -> Results:
    """The results that :func:`write_results` wrote.

    Args:
        path: a run folder, its CSV file, or the JSON file of the same name beside the CSV file.

    Raises:
        UserError: the file is missing, or the CSV file is malformed: other columns, a value of the wrong kind
            or out of range, a run twice, no runs.
    """
    path = path / "results.csv" if path.is_dir() else path
    path = path.with_suffix(".csv") if path.suffix == ".json" else path
    beside = path.with_suffix(".json")
    about = read_json(beside) if beside.is_file() else {}
    columns: dict[str, Reader] = {
        "model": str,
        "classes": whole(1),
        "run": whole(0),
        "lr": optional(positive),
    }
    rows = read_table(path, columns, ("model", "classes", "run"), measures())
    if not rows:
        raise UserError(f"{path} holds no runs")
    rows = [row | dict.fromkeys(MEASURES.keys() - row.keys()) for row in rows]
    return Results(rows, {key: about[key] for key in about if key != "summary"})


def read_metrics(path: Path) -> dict[str, NDArray[np.float64]]:
    """The columns `METRICS` of a training's `metrics.csv`, a value for each step.

    Args:
        path: a run folder, or its `metrics.csv`. A last line without a line end is ignored, since a training
            may be writing that line.

    Raises:
        UserError: the file is missing, a column is missing or not numeric, or there are no steps.
    """
    path = path / "metrics.csv" if path.is_dir() else path
    whole_lines = [line for line in read_text(path).splitlines(keepends=True) if line.endswith("\n")]
    with suppress(csv.Error, LookupError, ValueError):
        if rows := list(csv.DictReader(whole_lines, quoting=csv.QUOTE_NONE)):
            return {name: np.array([row[name] for row in rows], np.float64) for name in METRICS}
    raise UserError(f"{path} holds no rows of a training on trajectories, with {', '.join(METRICS)}")


def read_table(
    path: Path,
    columns: Mapping[str, Reader],
    key: Sequence[str] = (),
    others: Mapping[str, Reader] | None = None,
) -> list[dict[str, Any]]:
    """The rows of a CSV file.

    Args:
        columns: readers of the cells by the heading of the column, in the order of the file.
        key: columns whose values together are unique.
        others: readers of columns that may follow. Cells of unknown columns are texts, and the log names the
            unknown columns.

    Raises:
        UserError: the file cannot be read, has other columns, a row with too few or too many fields, a cell
            that its reader refuses, or two rows with the same key.
    """
    lines = csv.reader(io.StringIO(read_text(path)), strict=True)
    rows: dict[object, dict[str, Any]] = {}
    try:
        heading = next(lines, [])
        readers = {**columns, **(others or {})}
        more = tuple(name for name in heading if name not in readers)
        fits = heading[: len(columns)] == list(columns) and len({*heading}) == len(heading)
        if not fits or (others is None and more):
            raise UserError(f"{path} does not begin with the columns {','.join(columns)}")
        if more:
            _note(path, more)
        for cells in filter(None, lines):
            place, row = f"{path}, line {lines.line_num}", {}
            if len(cells) != len(heading):
                raise UserError(f"{place}: {len(cells)} fields instead of {len(heading)}")
            for name, cell in zip(heading, cells, strict=True):
                try:
                    row[name] = readers.get(name, str)(cell)
                except (ValueError, LookupError, ArgumentTypeError) as error:
                    raise UserError(f"{place}: {name}: {error}") from None
            if rows.setdefault(tuple(row[name] for name in key) or len(rows), row) is not row:
                raise UserError(f"{place}: the same {', '.join(key)} as a line above")
    except csv.Error as error:
        raise UserError(f"{path} is not a CSV file: {error}") from None
    return list(rows.values())


@cache
def _note(path: Path, columns: Sequence[str]) -> None:
    log.warning("%s: %s is no measure here: kept as it is", path, ", ".join(columns))


class Key(NamedTuple):
    """The identity of a score within one run folder. `purpose` is `search` or `report`; `lr` is None for a
    learner without steps."""

    purpose: str
    model: str
    classes: int
    draw: int
    lr: float | None


def known_scores(path: Path) -> dict[Key, Score]:
    """The scores in `scores.csv`; a missing file is created.

    A killed process or a full disk can leave an incomplete last line. Such a line has no line end, is cut off
    here, and its score is computed again.

    Raises:
        UserError: the file cannot be read or written, or is malformed.
    """
    readers = (str, str, whole(1), whole(0), optional(positive))
    with refusing(f"write {path}"):
        path.touch()
        end = path.read_bytes().rfind(b"\n") + 1
        os.truncate(path, end)
    if not end:
        append(path, [*Key._fields, *MEASURES])
    rows = read_table(path, dict(zip(Key._fields, readers, strict=True)), others=measures())
    absent = dict.fromkeys(MEASURES.keys() - columns_of(path))
    if missing := sorted(name for name in absent if MEASURES[name].kind not in (CHANGE, TENTH)):
        raise UserError(f"{path} lacks the columns {', '.join(missing)}: start a new evaluation")
    return {Key(*map(row.pop, Key._fields)): absent | row for row in rows}


def columns_of(path: Path) -> list[str]:
    """The headings of a CSV file."""
    return next(csv.reader(io.StringIO(read_text(path))), [])


def append(path: Path, values: Sequence[object]) -> None:
    """Append a line to a CSV file and sync the file, or raise UserError; numbers are written with all digits.

    Rewriting the whole file would be as safe, but would take longer with every score; a search makes
    thousands of scores.
    """
    line = io.StringIO()
    csv.writer(line, lineterminator="\n").writerow(values)
    data = line.getvalue().encode()
    with refusing(f"write {path}"), path.open("ab", buffering=0) as file:
        if file.write(data) < len(data):
            raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))
        sync(file.fileno())


def measures() -> dict[str, Reader]:
    """The readers of all measures, by column."""
    return {name: measure.kind.read for name, measure in MEASURES.items()}


def interval(groups: Sequence[Sequence[float]]) -> tuple[float, float, str] | None:
    """The 95% interval of a mean accuracy over models, or over runs of a single model: the two ends, within 0
    to 1, and the method. None for a single run.

    The interval is Student's t: a bootstrap of ten runs is a quarter narrower and covers 89 %. Runs of one
    model may depend on each other, so that several models count whole.

    Args:
        groups: the values of each model, one or more.
    """
    of, units = ("models", groups) if len(groups) > 1 else ("runs", [[value] for value in groups[0]])
    count = len(units)
    if count < 2:
        return None
    sizes, sums = np.array([len(unit) for unit in units]), np.array([sum(unit) for unit in units])
    mean = sums.sum() / sizes.sum()
    error = math.sqrt(count / (count - 1) * ((sums - sizes * mean) ** 2).sum()) / sizes.sum()
    half = load_library("scipy.special").stdtrit(count - 1, 0.975) * error
    return max(float(mean - half), 0.0), min(float(mean + half), 1.0), f"Student's t over {of}"


def summarise(rows: Sequence[Row]) -> list[dict[str, Any]]:
    """Mean and 95% interval over the models and runs of each class count, in order of class count.

    Returns:
        mappings with `classes`, `models`, `runs` (of all models), `lr` (of the first run), and each measure
        that all runs have as its mean over the runs, or as the number of runs (`diverged`). A run that
        diverged counts as 0 %; where all runs diverged, a mean is None. A fraction such as `test` has its
        :func:`interval` as `test_low`, `test_high` and `test_interval` (the method); None where there is no
        interval.
    """
    summary = []
    for classes in sorted({row["classes"] for row in rows}):
        runs = [row for row in rows if row["classes"] == classes]
        models = dict.fromkeys(row["model"] for row in runs)
        line: dict[str, Any] = {"classes": classes, "models": len(models), "runs": len(runs)}
        line["lr"] = runs[0]["lr"]
        all_diverged = all(row["diverged"] for row in runs)
        for name, measure in MEASURES.items():
            values = [row[name] for row in runs]
            if None in values:
                continue
            if measure.kind is RUNS:
                line[name] = sum(values)
                continue
            line[name] = None if all_diverged else float(np.mean(values))
            if measure.kind.fraction:
                groups = [[row[name] for row in runs if row["model"] == model] for model in models]
                ends = (None if all_diverged else interval(groups)) or (None, None, None)
                line |= {f"{name}_{end}": x for end, x in zip(("low", "high", "interval"), ends, strict=True)}
        summary.append(line)
    return summary


def table(rows: Sequence[Row]) -> str:
    """The summary as a table for the terminal; accuracies in percent, ± the reach of their 95% intervals."""
    measures = {name: measure for name, measure in MEASURES.items() if measure.kind.heading}
    headings = [m.kind.heading.format(name.replace("_", " ")) for name, m in measures.items()]
    lines = [["classes", "lr", "runs", *headings]]
    summary = summarise(rows)
    for line in summary:
        cells = [line["classes"], "-" if line["lr"] is None else f"{line['lr']:.6g}", line["runs"]]
        for name, measure in measures.items():
            number = "-" if line.get(name) is None else f"{line[name]:.4g}"
            cells.append(shown(line, name) if measure.kind.fraction else number)
        lines.append([str(cell) for cell in cells])
    return aligned(lines) + "".join(f"\n± {text}" for text in intervals(summary))


def intervals(summary: Sequence[Mapping[str, Any]]) -> list[str]:
    """What the intervals of a summary are, in one text; without an interval none."""
    methods = {line[key] for line in summary for key in line if key.endswith("_interval")} - {None}
    return [f"95% interval: {', '.join(sorted(methods))}"] if methods else []


def shown(line: Mapping[str, Any], name: str) -> str:
    """The measure `name` of a summary's line as text: mean in percent, ± the reach of its 95% interval,
    and how many runs diverged. Missing parts are left out."""
    mean, low, high = (line.get(f"{name}{end}") for end in ("", "_low", "_high"))
    if mean is None:
        return "diverged" if line.get("diverged") else "-"
    text = f"{100 * mean:.1f}"
    if low is not None and high is not None:
        # An interval may be cut off at 0 or 100 %. Of equal values, the differences are rounding.
        reach = round(100 * max(mean - low, high - mean), 9)
        text += f" ± {reach:.1f}" if reach >= 0.05 else f" ± {reach:.1g}"  # shows no small reach as 0.0
    return f"{text} ({line['diverged']} diverged)" if line.get("diverged") else text


def aligned(lines: Sequence[Sequence[str]]) -> str:
    """Lines of equally many cells as text, in columns aligned to the right."""
    widths = [max(map(len, column)) for column in zip(*lines, strict=True)]
    return "\n".join("  ".join(map(str.rjust, line, widths)) for line in lines)
