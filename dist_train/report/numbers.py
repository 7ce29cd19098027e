"""Means, spreads, rank correlation, and intervals of small samples."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from statistics import fmean, stdev
from typing import Literal

from scipy import stats

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
    if len(first) < 3 or len(set(first)) < 2 or len(set(second)) < 2:
        return None
    return float(stats.spearmanr(first, second).statistic)


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
    half = float(stats.t.ppf(0.975, count - 1)) * stdev(differences) / math.sqrt(count)
    return Interval(mean, mean - half, mean + half, count)
