"""Statistics of the measurements: a ratio of two things that were measured in turn, and growth by repetition."""

from __future__ import annotations

import math
import statistics
from collections.abc import Sequence
from dataclasses import dataclass

CONFIDENCE = 0.95


@dataclass(frozen=True)
class Ratio:
    """The median of the ratios of pairs, and the interval that has the true median in it with 95 %."""

    median: float
    low: float
    high: float
    pairs: int

    def __str__(self) -> str:
        return f"{self.median:.2f} ({self.low:.2f} to {self.high:.2f})"


def ratio(ours: Sequence[float], others: Sequence[float]) -> Ratio:
    """Of values measured in turn: the first of `ours` with the first of `others`, and so on.

    The interval comes from the order of the ratios alone (sign test), so one pair that something disturbed has no
    weight. With fewer than six pairs it goes from the least to the greatest ratio.
    """
    found = sorted(one / other for one, other in zip(ours, others, strict=True) if other > 0)
    if not found:
        raise ValueError("no pair whose second value is above 0")
    left_out = _outside(len(found))
    return Ratio(statistics.median(found), found[left_out], found[-1 - left_out], len(found))


def _outside(count: int) -> int:
    """How many of `count` ordered values may be left out at each end."""
    chance = 0.0
    for number in range(count):
        chance += math.comb(count, number) / 2**count
        if chance > (1 - CONFIDENCE) / 2:
            return max(0, number - 1)
    return 0


@dataclass(frozen=True)
class Slope:
    """A straight line through samples, by least squares."""

    per_step: float
    error: float
    """Standard error of `per_step`; grows when the samples are not on a line."""
    start: float
    """Its value at step 0."""

    @property
    def grows(self) -> bool:
        """Whether the growth is beyond what the samples' own variation makes (three standard errors)."""
        return self.per_step > 3 * self.error


def slope(steps: Sequence[float], values: Sequence[float]) -> Slope:
    """
    Args:
        steps: for example how many tasks had run; at least three different ones.
        values: what was sampled there.
    """
    count = len(steps)
    if count < 3 or len(set(steps)) < 3:
        raise ValueError("a slope needs at least three samples at different steps")
    fitted = statistics.linear_regression(steps, values)
    rest = sum((value - fitted.intercept - fitted.slope * at) ** 2 for at, value in zip(steps, values, strict=True))
    middle = statistics.fmean(steps)
    error = math.sqrt(rest / (count - 2) / sum((at - middle) ** 2 for at in steps))
    return Slope(fitted.slope, error, fitted.intercept)


def regresses(news: Sequence[float], olds: Sequence[float], agains: Sequence[float]) -> bool:
    """Whether new code takes more than old code, as far as these nodes show.

    It does where it surely takes more than two nodes of the old code together, by more than these differ.

    Args:
        news: measured in turn with the others.
        olds: of a node with the old code.
        agains: of another node with the old code.
    """
    differ = ratio(agains, olds).median
    return over_both(news, olds, agains).low > max(differ, 1 / differ)


def over_both(news: Sequence[float], olds: Sequence[float], agains: Sequence[float]) -> Ratio:
    """Of new code to both nodes of the old code."""
    return ratio(news, [math.sqrt(one * other) for one, other in zip(olds, agains, strict=True)])
