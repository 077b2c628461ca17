"""The measures of a meta-test run, and the learning rate that they choose.

A new measure is one more line of `MEASURES`; files, tables, curves and figures follow.
"""

from collections.abc import Callable, Collection, Mapping, Sequence
from dataclasses import dataclass, field
from fractions import Fraction
from functools import partial
from itertools import product
from statistics import fmean
from typing import Any, NamedTuple

from torch import Tensor

from utils.flag import Reader, number, whole

LOST = -1.0  # accuracy of a run that diverged, less than any other

Score = Mapping[str, Any]
"""The measures of one run by name, read-only: numbers, None where a run has no value."""


class Answers(NamedTuple):
    """A run's answers after a sequence of N classes."""

    test: Tensor  # [N, 5] bool, whether each test image of a class is classified right
    train: Tensor  # [N, 15] bool, the same for the training images
    diverged: bool  # whether weights or logits are not finite; then no answer counts as right
    classes: Tensor  # [N] class ids, in the order of learning
    before: Tensor | None = None  # [M, 5] `test` at the stop before, after the first M classes

    def score(self) -> Score:
        """All measures of the run."""
        return {name: measure.compute(self) for name, measure in MEASURES.items()}


class Kind(NamedTuple):
    """How the values of a measure are read and shown."""

    read: Reader  # of one value
    heading: str  # pattern of the heading in tables; empty for what tables leave out
    tag: str  # pattern of the TensorBoard tag, below `meta_test/`
    fraction: bool = False  # whether it is a number from 0 to 1, shown in percent with its interval


def optional(read: Reader) -> Reader:
    """A reader that returns None for an empty text, and else the result of `read`."""
    return lambda text: read(text) if text else None


ACCURACY = Kind(number(0, 1), "meta-test {} %", "accuracy_{}", True)
CHANGE = Kind(optional(number(0, 1)), "{} %", "{}", True)  # of accuracies, since the stop before
TENTH = Kind(optional(number(0, 1)), "", "order/{}", True)  # accuracy on a tenth of the classes
CLASSES = Kind(whole(0), "{}", "classes_{}")  # a number of classes
RUNS = Kind(whole(0, 1), "{}", "{}")  # 1 where the measure is true of the run, else 0


class Measure(NamedTuple):
    """One number of a run: column name in files, kind, meaning in words, and how the number is computed."""

    name: str
    kind: Kind
    meaning: str
    compute: Callable[[Answers], float | None]

    @property
    def title(self) -> str:
        """The title of figures of the measure."""
        return f"meta-test {self.name} ({self.meaning})"


def volatility(answers: Answers) -> float | None:
    """Mean absolute change of a class's test accuracy since the stop before (*Scaling few-shot spoken word
    classification with generative meta-continual learning*, 2026); None at the first stop."""
    if answers.before is None:
        return None
    now = answers.test[: len(answers.before)]
    return (now.sum(1) - answers.before.sum(1)).abs().sum().item() / now.numel()


def tenth(answers: Answers, number: int) -> float | None:
    """Test accuracy on a tenth of the classes, 1 for those learned first to 10; None below ten classes. Of
    `10 k + r` classes the first r tenths have one more."""
    parts = answers.test.double().mean(1).tensor_split(10)
    return None if len(answers.test) < 10 else parts[number - 1].mean().item()


TENTHS = tuple(f"tenth_{number}" for number in range(1, 11))

MEASURES: dict[str, Measure] = {
    measure.name: measure
    for measure in (
        Measure("test", ACCURACY, "unseen images", lambda a: a.test.double().mean(1).mean().item()),
        Measure("train", ACCURACY, "forgetting", lambda a: a.train.double().mean().item()),
        Measure(
            *("above_chance", CLASSES, "classes with a test accuracy above 1 / N"),
            lambda a: int((a.test.double().mean(1) > 1 / len(a.test)).sum()),
        ),
        Measure("volatility", CHANGE, "change of a class since the stop before", volatility),
        *(
            Measure(name, TENTH, f"unseen images, {name} of the order", partial(tenth, number=k))
            for k, name in enumerate(TENTHS, 1)
        ),
        Measure("diverged", RUNS, "weights or logits not finite", lambda a: int(a.diverged)),
    )
}
"""All measures by name, in the order of the columns of files and tables."""


def accuracies() -> list[str]:
    """The names of the measures that are accuracies."""
    return [name for name, measure in MEASURES.items() if measure.kind is ACCURACY]


class Draw(NamedTuple):
    """One draw of classes for one model: the numbers of both."""

    model: int
    number: int


class Job(NamedTuple):
    """A run to make: a draw, its learning rate (None for a learner without steps), and the class counts
    `stops`, ascending, at which the run is tested."""

    draw: Draw
    lr: float | None
    stops: tuple[int, ...]


def best_rate(values: Mapping[Draw, Mapping[float, float]]) -> float:
    """The learning rate that wins most draws (paper and released code: the mode of the winners).

    Rates that tie on a draw share its win. Ties in wins go to the best mean over all draws, ties in means to
    the smallest rate. So the order of the rates does not matter, and a rate that is nowhere better and
    somewhere worse than another is not chosen. Several models share one rate: the draws of all models count
    alike.

    Args:
        values: for every draw, the value of every rate: an accuracy, or `LOST`.
    """
    wins, _ = _wins(values, next(iter(values.values())))
    return max(wins, key=lambda lr: (wins[lr], fmean(by_rate[lr] for by_rate in values.values()), -lr))


def _wins(
    values: Mapping[Draw, Mapping[float, float]], rates: Collection[float]
) -> tuple[dict[float, Fraction], dict[float, Fraction]]:
    """Lower and upper bounds of the draws that each rate wins, over all outcomes of the missing tries."""
    least = dict.fromkeys(rates, Fraction())
    most = dict(least)
    for by_rate in values.values():
        winners = _winners(by_rate)
        for lr in rates:
            share = Fraction(lr in winners, len(winners) or 1)
            most[lr] += share if lr in by_rate else 1
            least[lr] += share if len(by_rate) == len(rates) else 0
    return least, most


def _winners(values: Mapping[float, float]) -> list[float]:
    """The rates with the largest value on a draw."""
    best = max(values.values(), default=None)
    return [lr for lr, value in values.items() if value == best]


@dataclass
class RateSearch:
    """A search for the best rate, which stops when no further try (a rate on a draw) can change the result.

    A missing try leaves a rate's number of wins between two bounds: the rate wins the draw or loses it. A
    rate is a candidate as long as its upper bound reaches the largest lower bound of all rates. A missing try
    of another rate matters only on a draw that a candidate leads, whose win the try may take away. When no
    missing try matters, every candidate has all its tries, its wins are certain, and the best rate is that of
    a full search.

    Attributes:
        objective: the measure to maximise, `train` (as released) or `test`.
        full: whether every try is made.
        scores: of the tries made, in the order of the tries.
    """

    rates: Sequence[float]
    draws: Sequence[Draw]
    objective: str
    full: bool = False
    scores: dict[tuple[Draw, float | None], Score] = field(default_factory=dict, init=False)

    @property
    def decided(self) -> bool:
        """Whether one candidate is left and no more tries are wanted."""
        return not self.full and len(self._candidates()) == 1

    def wanted(self, *, rivals: bool) -> dict[Draw, list[float]]:
        """The missing rates of each draw, among the candidates; with `rivals` among all rates where a
        candidate leads the draw."""
        candidates = self.rates if self.full else self._candidates()
        wanted = {}
        for draw, values in self._values().items():
            contested = rivals and any(lr in candidates for lr in _winners(values))
            missing = [lr for lr in (self.rates if contested else candidates) if lr not in values]
            if missing:
                wanted[draw] = missing
        return wanted

    def best(self) -> float:
        """The best rate, once no more tries are wanted."""
        lost = dict.fromkeys(self.rates, LOST)
        return best_rate({draw: lost | values for draw, values in self._values().items()})

    def _values(self) -> dict[Draw, dict[float, float]]:
        """The value of each rate that was tried, by draw; `LOST` for a run that diverged."""
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

    A try is made for the search of its largest class count. Undecided searches of smaller counts get a score
    from the same run, which may save them a try.

    Args:
        searches: by class count, over the same rates and draws.
        number: tries that are made at the same time. Tries of later draws are added until there are so many.
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
