"""The published numbers in `results/targets.csv`, which results are put beside.

A row is one number in percent: which of our results it belongs to (`results/<result>.csv`, and the
step of `configs/paper.sh` that makes it), the treatment's name for people, the quantity, the class
count where there is one, the spread published with it, and how far from it ours may be.

Tolerances, in points: twice the spread published, at least 2; without one 3, and 5 for
what is measured of representations unless the number itself is small.
"""

from __future__ import annotations

import csv
import io
import math
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from model.scores import accuracies
from utils.errors import UserError
from utils.files import read_text

RESULTS = Path(__file__).resolve().parents[1] / "results"
TARGETS = RESULTS / "targets.csv"
COLUMNS = ("result", "treatment", "quantity", "classes", "published", "spread", "tolerance", "source")

ACCURACIES = {measure.name: f"{measure.name} accuracy" for measure in accuracies()}
REPRESENTATION = {
    "active_before": "active units before the gate",
    "active_after": "active units after the gate",
    "gate_mean": "mean gate",
    "dead": "dead units",
    "knn_before": "KNN on features before the gate",
    "knn_gate": "KNN on the gate",
    "knn_after": "KNN on features after the gate",
}
QUANTITIES = ACCURACIES | REPRESENTATION
"""Quantities by the name they have in files, as people call them. All are fractions, shown in percent."""


@dataclass(frozen=True)
class Target:
    """One published number, in percent.

    Attributes:
        sign: `<` for an upper limit, `~` for about, else empty.
        classes: the class count of an accuracy; None for what is measured of a representation.
        spread: as published (None if it was not).
        tolerance: points that ours may differ from it.
    """

    result: str
    treatment: str
    quantity: str
    classes: int | None
    sign: str
    published: float
    spread: float | None
    tolerance: float
    source: str

    def __str__(self) -> str:
        spread = "" if self.spread is None else f" ± {self.spread:g}"
        sign = "about " if self.sign == "~" else self.sign  # Markdown strikes out what is between ~
        return f"{sign}{self.published:g}{spread}"

    def met_by(self, percent: float) -> bool:
        """Whether `percent` is within the tolerance, or below an upper limit."""
        if self.sign == "<":
            return percent < self.published + self.tolerance
        return abs(percent - self.published) <= self.tolerance


def read_targets(path: Path = TARGETS) -> list[Target]:
    """All published numbers, in the order of the file.

    Raises:
        UserError: the file is missing or not as described above.
    """
    targets: list[Target] = []
    for line, row in enumerate(read_table(path, COLUMNS), start=2):
        try:
            target = _target(row)
        except ValueError as error:
            raise UserError(f"{path}, line {line}: {error}") from None
        if any(_key(target) == _key(other) for other in targets):
            raise UserError(f"{path}, line {line}: the same target as a line above")
        targets.append(target)
    return targets


def read_table(path: Path, columns: Sequence[str]) -> list[dict[str, str]]:
    """The rows of a CSV file that has exactly these columns.

    Raises:
        UserError: no such file, not UTF-8, other columns, or a row with too few or too many fields.
    """
    try:
        lines = [line for line in csv.reader(io.StringIO(read_text(path)), strict=True) if line]
    except OSError as error:
        raise UserError(f"cannot read {path}: {error.strerror or error}") from None
    except (ValueError, csv.Error) as error:
        raise UserError(f"{path} is not a CSV file: {error}") from None
    if not lines or lines[0] != list(columns):
        raise UserError(f"{path} does not begin with the columns {','.join(columns)}")
    for number, line in enumerate(lines, start=1):
        if len(line) != len(columns):
            raise UserError(f"{path}, line {number}: {len(line)} fields instead of {len(columns)}")
    return [dict(zip(columns, line, strict=True)) for line in lines[1:]]


def _target(row: dict[str, str]) -> Target:
    """Raises ValueError with what is wrong."""
    quantity, text = row["quantity"], row["published"]
    if quantity not in QUANTITIES:
        raise ValueError(f"{quantity!r} is not one of {', '.join(QUANTITIES)}")
    for column in ("result", "treatment", "source"):
        if not row[column].strip() or "|" in row[column]:
            raise ValueError(f"{row[column]!r} is no {column}: empty, or it breaks a table with |")
    classes = None
    if quantity in ACCURACIES:
        if not row["classes"].isdecimal() or int(row["classes"]) == 0:
            raise ValueError(f"{row['classes']!r} is no count of classes")
        classes = int(row["classes"])
    elif row["classes"]:
        raise ValueError(f"{quantity} has no count of classes")
    sign = text[:1] if text[:1] in ("<", "~") else ""
    return Target(
        row["result"],
        row["treatment"],
        quantity,
        classes,
        sign,
        _percent(text.removeprefix(sign)),
        _percent(row["spread"]) if row["spread"] else None,
        _percent(row["tolerance"]),
        row["source"],
    )


def _percent(text: str) -> float:
    try:
        number = float(text)
    except ValueError:
        number = math.nan
    if not 0 <= number <= 100:
        raise ValueError(f"{text!r} is not a percentage")
    return number


def _key(target: Target) -> tuple[str, str, int | None, str]:
    return target.result, target.quantity, target.classes, target.source
