"""The measures of a meta-test run, and the learning rate that they choose.

One more measure is one more line of `MEASURES`, which files, tables, curves and figures follow.
"""

from __future__ import annotations

from collections.abc import Callable, Collection, Mapping, Sequence
from dataclasses import dataclass, field
from fractions import Fraction
from itertools import product
from statistics import fmean
from typing import TYPE_CHECKING, NamedTuple

from utils.flag import Reader, number, whole

if TYPE_CHECKING:  # a second to import, which tools that only read results do without
    from torch import Tensor

LOST = -1.0  # stands for the accuracy of a run that diverged, and is less than any

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

    read: Reader  # of one value
    heading: str  # pattern of the heading in tables
    tag: str  # pattern of the TensorBoard tag, below `meta_test/`


ACCURACY = Kind(number(0, 1), "meta-test {} %", "accuracy_{}")  # has an interval
CLASSES = Kind(whole(0), "{}", "classes_{}")  # the number of classes that it is true of
RUNS = Kind(whole(0, 1), "{}", "{}")  # 1 for a run that it is true of, else 0


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


class Draw(NamedTuple):
    """One draw of classes for one of the models that are tested together: the numbers of both."""

    model: int
    number: int


class Job(NamedTuple):
    """A run to make: a draw, learned at a rate (None for a learner that takes no steps) and tested at each of
    `stops`, class counts in ascending order."""

    draw: Draw
    lr: float | None
    stops: tuple[int, ...]


def best_rate(values: Mapping[Draw, Mapping[float, float]]) -> float:
    """The learning rate that wins most draws (paper and released code: the mode of the winners).

    Rates that are equal on a draw share its win. Of rates with equally many wins the one with the best mean
    over all draws is chosen, and of equal means the smallest rate. So the order of the rates does not matter,
    and no rate is chosen that is nowhere better than another rate and somewhere worse. Several models share
    one rate: the draws of all models count alike.

    Args:
        values: for every draw, the value of every rate: an accuracy, or `LOST`.
    """
    wins, _ = _wins(values, next(iter(values.values())))
    return max(wins, key=lambda lr: (wins[lr], fmean(of_draw[lr] for of_draw in values.values()), -lr))


def _wins(
    values: Mapping[Draw, Mapping[float, float]], rates: Collection[float]
) -> tuple[dict[float, Fraction], dict[float, Fraction]]:
    """The least and the most draws that each rate wins, whatever the tries give that are missing."""
    least = dict.fromkeys(rates, Fraction())
    most = dict(least)
    for of_draw in values.values():
        winners = _winners(of_draw)
        for lr in rates:
            share = Fraction(lr in winners, len(winners) or 1)
            most[lr] += share if lr in of_draw else 1
            least[lr] += share if len(of_draw) == len(rates) else 0
    return least, most


def _winners(values: Mapping[float, float]) -> list[float]:
    """The rates with the largest value on a draw."""
    best = max(values.values(), default=None)
    return [lr for lr, value in values.items() if value == best]


@dataclass
class RateSearch:
    """A search that asks for tries, each of a rate on a draw, as long as a try may change the best rate.

    A try that is not made yet leaves the number of wins of a rate between two bounds: the rate wins the draw,
    or it does not. A rate is a candidate as long as its upper bound reaches the largest lower bound of all
    rates. A missing try of any other rate matters only on a draw that a candidate leads, since it may take
    that win away. When no missing try matters, every candidate has all its tries, and its wins are certain:
    the best rate is that of a full search, whatever the missing tries would give.

    Attributes:
        rates: the rates to choose from.
        draws: the draws that each rate is tried on.
        objective: the measure to maximise, `train` (as released) or `test`.
        full: ask for every try.
        scores: of the tries made, in their order.
    """

    rates: Sequence[float]
    draws: Sequence[Draw]
    objective: str
    full: bool = False
    scores: dict[tuple[Draw, float | None], Score] = field(default_factory=dict, init=False)

    @property
    def decided(self) -> bool:
        """Whether one candidate is left: the search asks for no more tries."""
        return not self.full and len(self._candidates()) == 1

    def wanted(self, *, rivals: bool) -> dict[Draw, list[float]]:
        """The rates that each draw misses: of the candidates, and with `rivals`, on draws that a candidate
        leads, of all rates."""
        candidates = self.rates if self.full else self._candidates()
        wanted = {}
        for draw, values in self._values().items():
            contested = rivals and any(lr in candidates for lr in _winners(values))
            missing = [lr for lr in (self.rates if contested else candidates) if lr not in values]
            if missing:
                wanted[draw] = missing
        return wanted

    def best(self) -> float:
        """The best rate, after the last try that the search asks for."""
        lost = dict.fromkeys(self.rates, LOST)
        return best_rate({draw: lost | values for draw, values in self._values().items()})

    def _values(self) -> dict[Draw, dict[float, float]]:
        """The value of each rate that was tried, by draw. A run that diverged is worse than any other."""
        values: dict[Draw, dict[float, float]] = {draw: {} for draw in self.draws}
        for draw, lr in product(self.draws, self.rates):
            if score := self.scores.get((draw, lr)):
                values[draw][lr] = LOST if score["diverged"] else score[self.objective]
        return values

    def _candidates(self) -> list[float]:
        """The rates that may still become the best."""
        least, most = _wins(self._values(), self.rates)
        return [lr for lr in self.rates if most[lr] >= max(least.values())]


def next_tries(searches: Mapping[int, RateSearch], number: int = 1) -> list[Job]:
    """The tries to make next; empty when all searches are decided.

    The search of the largest of a try's class counts asks for the try. The searches of the others are not
    decided either, and get its score as well: they may ask for it later.

    Args:
        searches: by class count, of the same rates and draws. A run of so many classes passes smaller counts.
        number: tries that are made at the same time. Where one draw has fewer, the next draws' are added.
    """
    open_counts = sorted(classes for classes, search in searches.items() if not search.decided)
    for rivals in (False, True):
        wanted: dict[Draw, dict[float, int]] = {}
        for classes in open_counts:
            for draw, rates in searches[classes].wanted(rivals=rivals).items():
                wanted.setdefault(draw, {}).update(dict.fromkeys(rates, classes))
        tries: list[Job] = []
        for draw, longest in sorted(wanted.items()):
            if len(tries) >= number:
                break
            # The longest tries first, so that tries made at the same time take about as long.
            for lr, most in sorted(longest.items(), key=lambda item: -item[1]):
                tries.append(Job(draw, lr, tuple(classes for classes in open_counts if classes <= most)))
        if tries:
            return tries
    return []
