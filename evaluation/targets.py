"""The published numbers in `results/targets.csv`, which results are put beside.

A row is one number in percent: which of our results it belongs to (`results/<result>.csv`, and the step of
`configs/paper.sh` that makes it), the treatment's name for people, the quantity, the class count where there
is one, the spread published with it, and how far from it ours may be.

Tolerances, in points: twice the spread published, at least 2; without a spread 3, and 5 for what is measured
of representations unless the number itself is small.
"""

from __future__ import annotations

import math
from pathlib import Path
from typing import NamedTuple

from evaluation.results import read_table
from model.scores import accuracies
from utils.errors import UserError

RESULTS = Path(__file__).resolve().parents[1] / "results"
TARGETS = RESULTS / "targets.csv"
COLUMNS = ("result", "treatment", "quantity", "classes", "published", "spread", "tolerance", "source")

ACCURACIES = {name: f"{name} accuracy" for name in accuracies()}
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


class Target(NamedTuple):
    """One published number, in percent.

    Attributes:
        classes: the class count of an accuracy; None for what is measured of a representation.
        sign: `<` for an upper limit, `~` for about, else empty.
        spread: as published; None where none was.
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
    targets: dict[tuple[object, ...], Target] = {}
    for line, cells in enumerate(read_table(path, COLUMNS), start=2):
        try:
            target = _target(cells)
        except ValueError as error:
            raise UserError(f"{path}, line {line}: {error}") from None
        if targets.setdefault((target.result, *target[2:4], target.source), target) is not target:
            raise UserError(f"{path}, line {line}: the same target as a line above")
    return list(targets.values())


def _target(cells: dict[str, str]) -> Target:
    """Raises ValueError with what is wrong."""
    quantity, classes, published = (cells[name] for name in ("quantity", "classes", "published"))
    if quantity not in QUANTITIES:
        raise ValueError(f"{quantity!r} is not one of {', '.join(QUANTITIES)}")
    for column in ("result", "treatment", "source"):
        if not cells[column].strip() or "|" in cells[column]:
            raise ValueError(f"{cells[column]!r} is no {column}: empty, or it breaks a table with |")
    if bool(classes) != (quantity in ACCURACIES) or (classes and not (classes.isdecimal() and int(classes))):
        raise ValueError(f"{classes!r} is no count of classes, which accuracies have, and nothing else")
    sign = published[:1] if published[:1] in ("<", "~") else ""
    return Target(
        *(cells["result"], cells["treatment"], quantity, int(classes) if classes else None),
        *(sign, _percent(published.removeprefix(sign))),
        *(_percent(cells["spread"]) if cells["spread"] else None, _percent(cells["tolerance"])),
        cells["source"],
    )


def _percent(text: str) -> float:
    try:
        number = float(text)
    except ValueError:
        number = math.nan
    if not 0 <= number <= 100:
        raise ValueError(f"{text!r} is not a percentage")
    return number
