"""The choice of a learning rate from what each rate reaches on the draws of a search."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from fractions import Fraction
from statistics import fmean
from typing import NamedTuple

from model.scores import Score

LOST = -1.0  # less than any accuracy


class Draw(NamedTuple):
    """One draw of classes, of one of the models that are tested together, by their numbers."""

    model: int
    number: int


def best_rate(values: Mapping[Draw, Mapping[float, float]]) -> float:
    """The learning rate that wins most draws (paper and released code: the mode of the winners).

    Rates that are equal on a draw share its win. Of rates that win equally often it is the one with the
    best mean over all draws, and then the smallest. So neither the order of the rates matters, nor does a
    rate win that is nowhere better than another one and somewhere worse. Several models share one rate:
    their draws count alike.

    Args:
        values: of every draw, the value of every rate: an accuracy, or `LOST`.
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
    """A search that asks for tries of rates on draws as long as they may change which is the best rate.

    A missing try leaves bounds. Its rate may win the draw, and then whoever is ahead there does not. A rate
    whose most possible wins are fewer than the least of another one is no candidate any more: its missing
    tries matter only on draws where a candidate is ahead. Once none matters, all candidates have every try
    and wins that are certain, so that the best rate is that of a full search whatever is missing.

    Args:
        rates: those to choose from.
        draws: those that each rate is tried on.
        objective: measure to maximise, `train` (as released) or `test`.
        full: ask for every try.

    Attributes:
        scores: of the tries made, in order.
        most: tries that there are.
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
        value = score[self.objective]
        self.scores[draw, lr] = score
        self._values[draw][lr] = LOST if score["diverged"] else value

    @property
    def decided(self) -> bool:
        """Whether one rate alone may be the best; nothing more is wanted, ever."""
        return not self.full and len(self._candidates()) == 1

    def wanted(self, *, rivals: bool) -> dict[Draw, list[float]]:
        """The rates to be tried on each draw: candidates, or, which is for later, their `rivals` as well."""
        candidates = list(self.rates) if self.full else self._candidates()
        wanted = {}
        for draw, values in self._values.items():
            contested = rivals and any(lr in candidates for lr in _winners(values))
            missing = [lr for lr in (self.rates if contested else candidates) if lr not in values]
            if missing:
                wanted[draw] = missing
        return wanted

    def best(self) -> float:
        """The best rate, when nothing is wanted any more."""
        lost = dict.fromkeys(self.rates, LOST)
        return best_rate({draw: lost | values for draw, values in self._values.items()})

    def _candidates(self) -> list[float]:
        """The rates that may still be the best."""
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
    """The tries to make next, each with the class counts that it is one of, ascending; none when all is
    decided. The largest of these wants it, and the others, not yet decided, may come to.

    Args:
        searches: by class count, of the same rates and draws: a sequence of so many classes is a try of all
            counts on its way.
        number: tries that are made at the same time: where one draw has fewer, the next draws' come along.
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
            # Longest first, so that what is done at the same time takes about as long.
            for lr, most in sorted(longest.items(), key=lambda item: -item[1]):
                tries.append((draw, lr, tuple(classes for classes in open_counts if classes <= most)))
        if tries:
            return tries
    return []


def _winners(values: Mapping[float, float]) -> list[float]:
    """The rates that are best on a draw."""
    best = max(values.values(), default=None)
    return [lr for lr, value in values.items() if value == best]
