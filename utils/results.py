"""What an evaluation found: one row per run in `results.csv`, everything in `results.json`."""

from __future__ import annotations

import csv
import io
import json
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np

from utils.files import write_text

Row = Mapping[str, Any]
"""One run: `classes`, `run`, `lr`, `test`, `train` (0 to 1), `above_chance` (classes)."""


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


def summarise(rows: Sequence[Row]) -> list[dict[str, Any]]:
    """Mean and 95% interval over the runs of each class count, in order of class count.

    Returns:
        mappings with `classes`, `runs`, `lr` (that of the first run), `test`, `test_low`,
        `test_high`, the same for `train`, and `above_chance` (mean number of classes whose test
        accuracy is above chance).
    """
    summary = []
    for classes in sorted({row["classes"] for row in rows}):
        runs = [row for row in rows if row["classes"] == classes]
        line: dict[str, Any] = {"classes": classes, "runs": len(runs), "lr": runs[0]["lr"]}
        for key in ("test", "train"):
            values = [row[key] for row in runs]
            line[key] = float(np.mean(values))
            line[f"{key}_low"], line[f"{key}_high"] = bootstrap_interval(values)
        line["above_chance"] = float(np.mean([row["above_chance"] for row in runs]))
        summary.append(line)
    return summary


def table(rows: Sequence[Row]) -> str:
    """The summary as lines for the terminal; accuracies in percent, 95% intervals in brackets."""
    lines = [
        f"{'classes':>7}  {'lr':>8}  {'runs':>4}  {'meta-test test %':>20}  "
        f"{'meta-test train %':>20}  {'above chance':>12}"
    ]
    for line in summarise(rows):
        cells = [
            f"{100 * line[key]:5.1f} [{100 * line[f'{key}_low']:5.1f}, {100 * line[f'{key}_high']:5.1f}]"
            for key in ("test", "train")
        ]
        lines.append(
            f"{line['classes']:7d}  {line['lr']:8.6g}  {line['runs']:4d}  {cells[0]:>20}  "
            f"{cells[1]:>20}  {line['above_chance']:12.1f}"
        )
    return "\n".join(lines)


def write_results(folder: Path, rows: Sequence[Row], about: Mapping[str, Any]) -> None:
    """Write `results.csv` and `results.json` into `folder`, each whole or not at all.

    Args:
        rows: every run so far, equal keys.
        about: what else `results.json` should say (model, treatment, search).

    Raises:
        UserError: a file cannot be written.
    """
    text = io.StringIO()
    writer = csv.DictWriter(text, fieldnames=list(rows[0]), lineterminator="\n")
    writer.writeheader()
    writer.writerows(rows)
    write_text(folder / "results.csv", text.getvalue())
    content = {**about, "summary": summarise(rows), "runs": list(rows)}
    write_text(folder / "results.json", json.dumps(content, indent=2) + "\n")
