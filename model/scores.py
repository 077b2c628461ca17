"""The measures of a meta-test run: one more is one more line of `MEASURES`, which files, tables, curves and
figures follow."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import TYPE_CHECKING, NamedTuple

if TYPE_CHECKING:  # a second to import, which tools that only read results do without
    from torch import Tensor

Score = Mapping[str, float]
"""The measures of one run by name. A score is read only."""


class Answers(NamedTuple):
    """What a run answered after a sequence of N classes."""

    test: Tensor  # [N, 5] bool, whether each test image of a class is classified right
    train: Tensor  # [N, 15] bool, the same for the images that were trained on
    diverged: bool  # whether weights or logits are not finite; nothing is right then
    classes: Tensor  # [N] class ids, in the order of learning

    def score(self) -> Score:
        """All measures of the run."""
        return {name: measure.compute(self) for name, measure in MEASURES.items()}


class Kind(NamedTuple):
    """What a measure counts."""

    number: type[int] | type[float]  # type of its values
    largest: int | None  # its largest value, None for the number of classes; the smallest is 0
    what: str  # one value in words, for messages
    heading: str  # pattern of the heading in tables
    tag: str  # pattern of the TensorBoard tag, below `meta_test/`


ACCURACY = Kind(float, 1, "an accuracy", "meta-test {} %", "accuracy_{}")  # has an interval
CLASSES = Kind(int, None, "a number of classes", "{}", "classes_{}")  # the classes that it is true of
RUNS = Kind(int, 1, "a whole number", "{}", "{}")  # 1 for a run that it is true of, else 0


class Measure(NamedTuple):
    """One number of a run: its column in files, its kind, its meaning in words, and how it is computed."""

    name: str
    kind: Kind
    meaning: str
    compute: Callable[[Answers], float]

    @property
    def title(self) -> str:
        """Title of its figures."""
        return f"meta-test {self.name} ({self.meaning})"

    def read(self, cell: str | None, classes: int) -> float:
        """Its value in a cell of a CSV file (None: no such cell), in the row of a run of `classes` classes.

        Raises:
            ValueError: it cannot have that value; the message says so.
        """
        largest = self.kind.largest or classes
        try:
            value = self.kind.number(cell or "")
        except ValueError:
            value = -1
        if not 0 <= value <= largest:  # also true for NaN
            raise ValueError(f"{self.name} is {cell!r}, not {self.kind.what} from 0 to {largest}")
        return value


MEASURES: dict[str, Measure] = {
    measure.name: measure
    for measure in (
        Measure("test", ACCURACY, "unseen images", lambda a: a.test.double().mean(1).mean().item()),
        Measure("train", ACCURACY, "forgetting", lambda a: a.train.double().mean().item()),
        Measure(
            *("above_chance", CLASSES, "classes with a test accuracy above 1 / N"),
            lambda a: int((a.test.double().mean(1) > 1 / len(a.test)).sum()),
        ),
        Measure("diverged", RUNS, "weights or logits not finite", lambda a: int(a.diverged)),
    )
}
"""All measures by name, in the order of the columns of files and tables."""


def accuracies() -> list[str]:
    """The names of the measures that are accuracies."""
    return [name for name, measure in MEASURES.items() if measure.kind is ACCURACY]
