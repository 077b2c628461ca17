"""The choice of a learning rate from the accuracy that each rate reaches on the draws of a search."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from fractions import Fraction
from statistics import fmean
from typing import NamedTuple

from model.scores import Score

LOST = -1.0  # stands for the accuracy of a run that diverged, and is less than any


class Draw(NamedTuple):
    """One draw of classes for one of the models that are tested together: the numbers of both."""

    model: int
    number: int


def best_rate(values: Mapping[Draw, Mapping[float, float]]) -> float:
    """The learning rate that wins most draws (paper and released code: the mode of the winners).

    Rates that are equal on a draw share its win. Of rates with equally many wins the one with the best mean
    over all draws is chosen, and of equal means the smallest rate. So the order of the rates does not matter,
    and no rate is chosen that is nowhere better than another rate and somewhere worse. Several models share
    one rate: the draws of all models count alike.

    Args:
        values: for every draw, the value of every rate: an accuracy, or `LOST`.
    """
    rates = next(iter(values.values()))
    wins = dict.fromkeys(rates, Fraction())
    for of_draw in values.values():
        winners = _winners(of_draw)
        for lr in winners:
            wins[lr] += Fraction(1, len(winners))

    def rank(lr: float) -> tuple[Fraction, float, float]:
        return wins[lr], fmean(of_draw[lr] for of_draw in values.values()), -lr

    return max(wins, key=rank)


class RateSearch:
    """A search that asks for tries, each of a rate on a draw, as long as a try may change the best rate.

    A try that is not made yet leaves the number of wins of a rate between two bounds: the rate wins the draw,
    or it does not. A rate is a candidate as long as its upper bound reaches the largest lower bound of all
    rates. A missing try of any other rate matters only on a draw that a candidate leads, since it may take
    that win away. When no missing try matters, every candidate has all its tries, and its wins are certain:
    the best rate is that of a full search, whatever the missing tries would give.

    Args:
        rates: the rates to choose from.
        draws: the draws that each rate is tried on.
        objective: the measure to maximise, `train` (as released) or `test`.
        full: ask for every try.

    Attributes:
        scores: of the tries made, in their order.
        most: the number of tries of a full search.
    """

    def __init__(
        self, rates: Sequence[float], draws: Sequence[Draw], objective: str, *, full: bool = False
    ) -> None:
        self.rates = rates
        self.objective = objective
        self.full = full
        self.most = len(rates) * len(draws)
        self.scores: dict[tuple[Draw, float], Score] = {}
        self._values: dict[Draw, dict[float, float]] = {draw: {} for draw in draws}

    def add(self, draw: Draw, lr: float, score: Score) -> None:
        """Take in a try; one that diverged is worse than any that did not."""
        self.scores[draw, lr] = score
        self._values[draw][lr] = LOST if score["diverged"] else score[self.objective]

    @property
    def decided(self) -> bool:
        """Whether one candidate is left: the search asks for no more tries."""
        return not self.full and len(self._candidates()) == 1

    def wanted(self, *, rivals: bool) -> dict[Draw, list[float]]:
        """The rates that each draw misses: of the candidates, and with `rivals`, on draws that a candidate
        leads, of all rates."""
        candidates = list(self.rates) if self.full else self._candidates()
        wanted = {}
        for draw, values in self._values.items():
            contested = rivals and any(lr in candidates for lr in _winners(values))
            missing = [lr for lr in (self.rates if contested else candidates) if lr not in values]
            if missing:
                wanted[draw] = missing
        return wanted

    def best(self) -> float:
        """The best rate, after the last try that the search asks for."""
        lost = dict.fromkeys(self.rates, LOST)
        return best_rate({draw: lost | values for draw, values in self._values.items()})

    def _candidates(self) -> list[float]:
        """The rates that may still become the best."""
        least = dict.fromkeys(self.rates, Fraction())
        most = dict(least)
        for values in self._values.values():
            winners = _winners(values)
            for lr in self.rates:
                if lr not in values:
                    most[lr] += 1
                elif lr in winners:
                    most[lr] += Fraction(1, len(winners))
                    if len(values) == len(self.rates):
                        least[lr] += Fraction(1, len(winners))
        return [lr for lr in self.rates if most[lr] >= max(least.values())]


def next_tries(
    searches: Mapping[int, RateSearch], number: int = 1
) -> list[tuple[Draw, float, tuple[int, ...]]]:
    """The tries to make next, each a draw, a rate and the class counts that the try serves, in ascending
    order; empty when all searches are decided.

    The search of the largest of these class counts asks for the try. The searches of the others are not
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
        tries: list[tuple[Draw, float, tuple[int, ...]]] = []
        for draw, longest in sorted(wanted.items()):
            if len(tries) >= number:
                break
            # The longest tries first, so that tries made at the same time take about as long.
            for lr, most in sorted(longest.items(), key=lambda item: -item[1]):
                tries.append((draw, lr, tuple(classes for classes in open_counts if classes <= most)))
        if tries:
            return tries
    return []


def _winners(values: Mapping[float, float]) -> list[float]:
    """The rates with the largest value on a draw."""
    best = max(values.values(), default=None)
    return [lr for lr, value in values.items() if value == best]
