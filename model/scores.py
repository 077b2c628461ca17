"""The measures of a meta-test run, each defined once: for files, tables, curves and figures alike.

One more measure is one more line of `MEASURES`. Files that were written before it was there lack its
column, and are read with that value missing.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, NamedTuple

if TYPE_CHECKING:  # a second to import, which scripts that only read results do without
    from torch import Tensor


class Answers(NamedTuple):
    """What a run answered after a sequence of N classes.

    Attributes:
        test: `[N, 5]` bool, which test images of each class are classified right.
        train: `[N, 15]` bool, the same for the images that were trained on.
        diverged: whether weights or logits are not finite. Nothing is right then.
        classes: `[N]` their ids, in the order of learning.
    """

    test: Tensor
    train: Tensor
    diverged: bool
    classes: Tensor

    def by_class(self) -> list[dict[str, float]]:
        """One row per class: `seen` (N), `position` (in the order of learning, from 0), `class` (its id), and
        its accuracy on `train` (15 images) and `test` (5), 0 to 1.
        """
        train, test = (right.double().mean(1).tolist() for right in (self.train, self.test))
        rows = zip(self.classes.tolist(), train, test, strict=True)
        return [
            {"seen": len(self.classes), "position": k, "class": c, "train": a, "test": b}
            for k, (c, a, b) in enumerate(rows)
        ]


def classify(logits: Tensor) -> Tensor:
    """The class of the largest of `logits` [B, K]: [B]; -1 where they are not all finite.

    Argmax takes NaN for the largest: without weights that are numbers every image would be of class 0.
    """
    return logits.argmax(1).where(logits.isfinite().all(1), -1)


@dataclass(frozen=True)
class Kind:
    """What a measure is a number of.

    Attributes:
        number: its type.
        limit: its largest value, the least being 0; None for the number of classes.
        what: what people call a value.
        heading: of the terminal's table; `{}` is the measure's name.
        tag: of its TensorBoard curve, likewise.
    """

    number: type[int] | type[float]
    limit: int | None
    what: str
    heading: str
    tag: str


ACCURACY = Kind(float, 1, "an accuracy", "meta-test {} %", "accuracy_{}")
"""A fraction from 0 to 1, shown in percent and with an interval."""
CLASSES = Kind(int, None, "a number of classes", "{}", "classes_{}")
"""How many of the classes."""
RUNS = Kind(int, 1, "a whole number", "{}", "{}")
"""1 for a run of which it is true, else 0; of several runs how many it is true of."""


@dataclass(frozen=True)
class Measure:
    """One number of a run.

    Attributes:
        name: its column in files.
        kind: what it is a number of.
        meaning: what tells it from others of its kind, for titles.
        compute: its value.
    """

    name: str
    kind: Kind
    meaning: str
    compute: Callable[[Answers], float]

    @property
    def heading(self) -> str:
        """Of its column in the terminal's table."""
        return self.kind.heading.format(self.name.replace("_", " "))

    @property
    def title(self) -> str:
        """Of its figures."""
        return f"meta-test {self.name} ({self.meaning})"

    @property
    def tag(self) -> str:
        """Of its TensorBoard curve, below `meta_test/`."""
        return self.kind.tag.format(self.name)

    def read(self, cell: object, classes: int) -> float:
        """The value that a file of a run of `classes` classes holds in a cell.

        Raises:
            ValueError: it is none; the message says what it should be, and is.
        """
        limit = self.kind.limit or classes
        try:
            value = self.kind.number(str(cell))
        except ValueError:
            value = -1
        if not 0 <= value <= limit:  # also true for NaN
            raise ValueError(f"{self.name} is {cell!r}, not {self.kind.what} from 0 to {limit}")
        return value


def _above_chance(answers: Answers) -> int:
    return int((answers.test.double().mean(1) > 1 / len(answers.test)).sum())


MEASURES: dict[str, Measure] = {
    measure.name: measure
    for measure in (
        Measure("test", ACCURACY, "unseen images", lambda a: a.test.double().mean(1).mean().item()),
        Measure("train", ACCURACY, "forgetting", lambda a: a.train.double().mean().item()),
        Measure("above_chance", CLASSES, "classes with a test accuracy above 1 / N", _above_chance),
        Measure("diverged", RUNS, "weights or logits not finite", lambda a: int(a.diverged)),
    )
}
"""By column, in the order in which files and tables have them."""


def accuracies() -> list[Measure]:
    """The measures that are accuracies."""
    return [measure for measure in MEASURES.values() if measure.kind is ACCURACY]


class Score(dict[str, float | None]):
    """The measures of one run by name, and as attributes: `score.test`.

    None stands for one that a file of an older version lacks.
    """

    @classmethod
    def of(cls, answers: Answers) -> Score:
        """All measures of a run."""
        return cls({name: measure.compute(answers) for name, measure in MEASURES.items()})

    @classmethod
    def read(cls, cells: Mapping[str, object], classes: int) -> Score:
        """The measures among what a file holds of a run of `classes` classes: texts of a CSV, where an empty
        one is missing, or values of a JSON.

        Raises:
            ValueError: a value that a measure cannot have; the message says which.
        """
        score = cls()
        for name, measure in MEASURES.items():
            cell = cells.get(name)
            score[name] = None if cell in (None, "") else measure.read(cell, classes)
        return score

    def accuracies(self) -> dict[str, float]:
        """The accuracies by name, NaN for one that is missing."""
        values = {measure.name: self[measure.name] for measure in accuracies()}
        return {name: math.nan if value is None else value for name, value in values.items()}

    def __getattr__(self, name: str) -> Any:
        try:
            return self[name]
        except KeyError:
            raise AttributeError(name) from None
