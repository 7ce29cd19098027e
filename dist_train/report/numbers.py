"""Means, spreads, rank correlation, and intervals of small samples."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from statistics import fmean, stdev
from typing import Literal

Sign = Literal["", "\u2265", "\u2264"]


@dataclass(frozen=True)
class Summary:
    """Mean of `count` values; `deviation` is their sample standard deviation, None for a single one.

    `censored` of the values are lower bounds: then the mean is one too, and the deviation is not known.
    """

    mean: float
    deviation: float | None
    count: int
    censored: int = 0


@dataclass(frozen=True)
class Interval:
    """A mean difference of `count` pairs with its 95 % confidence interval.

    In `censored` pairs a value is a lower bound. The difference is then at least, or at most, so much; `sign` is empty
    where it is exact, None where nothing is known. A bound has no interval: its ends are NaN.
    """

    difference: float
    low: float
    high: float
    count: int
    censored: int = 0
    sign: Sign | None = ""


def summary(values: Sequence[float], censored: int = 0) -> Summary | None:
    """Return the summary of the finite `values`, `censored` of them lower bounds; None where there are none."""
    finite = [value for value in values if math.isfinite(value)]
    if not finite:
        return None
    deviation = stdev(finite) if len(finite) > 1 and not censored else None
    return Summary(fmean(finite), deviation, len(finite), censored)


def spearman(first: Sequence[float], second: Sequence[float]) -> float | None:
    """Return the rank correlation; None for under three pairs, or where one side does not vary."""
    assert len(first) == len(second)
    if len(first) < 3:
        return None
    one, other = _ranks(first), _ranks(second)
    middle = (len(first) + 1) / 2
    spread = math.sqrt(sum((a - middle) ** 2 for a in one) * sum((b - middle) ** 2 for b in other))
    return sum((a - middle) * (b - middle) for a, b in zip(one, other, strict=True)) / spread if spread else None


def _ranks(values: Sequence[float]) -> list[float]:
    """Return the ranks from 1; equal values share the mean of theirs."""
    order = sorted(values)
    first = {value: order.index(value) + 1 for value in set(values)}
    count = {value: order.count(value) for value in first}
    return [first[value] + (count[value] - 1) / 2 for value in values]


def paired_difference(
    pairs: Sequence[tuple[float, float]], bounds: Sequence[tuple[bool, bool]] = ()
) -> Interval | None:
    """Return the mean of second minus first with Student's interval; None for under two pairs.

    `bounds` says of each pair which of the two are lower bounds.
    """
    differences = [after - before for before, after in pairs]
    if len(differences) < 2:
        return None
    mean, count = fmean(differences), len(differences)
    if any(map(any, bounds)):
        # a larger second lifts the mean and a larger first lowers it; either may widen the interval without limit
        at_most, at_least = (any(side) for side in zip(*bounds, strict=True))
        sign: Sign | None = None if at_most and at_least else "\u2265" if at_least else "\u2264"
        return Interval(mean, math.nan, math.nan, count, sum(map(any, bounds)), sign)
    half = student_quantile(0.975, count - 1) * stdev(differences) / math.sqrt(count)
    return Interval(mean, mean - half, mean + half, count)


def student_quantile(probability: float, freedom: int) -> float:
    """Return the quantile of Student's t for 0.5 < `probability` < 1 by bisection."""
    assert 0.5 < probability < 1
    assert freedom >= 1
    low, high = 0.0, 1.0
    while _student_above_zero(high, freedom) < probability - 0.5:
        high *= 2
    for _ in range(80):
        middle = (low + high) / 2
        if _student_above_zero(middle, freedom) < probability - 0.5:
            low = middle
        else:
            high = middle
    return (low + high) / 2


def _student_above_zero(value: float, freedom: int) -> float:
    """Return P(0 < t < value), by the finite series for whole degrees of freedom (Abramowitz and Stegun 26.7.3)."""
    angle = math.atan(value / math.sqrt(freedom))
    cosine = math.cos(angle)
    if freedom == 1:
        return angle / math.pi
    odd = freedom % 2
    term = total = cosine if odd else 1.0
    for index in range(3 if odd else 2, freedom - 1, 2):
        term *= cosine * cosine * (index - 1) / index
        total += term
    tail = math.sin(angle) * total
    return (angle + tail) / math.pi if odd else tail / 2
