"""Rank correlations, plain and given a third quantity, with their intervals."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass

from scipy import stats


@dataclass(frozen=True)
class RankCorrelation:
    """Spearman's rho of `count` pairs, with Fisher's 95 % interval; its ends are NaN where there is none."""

    rho: float
    low: float
    high: float
    count: int


def spearman(first: Sequence[float], second: Sequence[float]) -> float | None:
    """Return the rank correlation; None for under three pairs, or where one side does not vary."""
    if len(first) < 3 or len(set(first)) < 2 or len(set(second)) < 2:
        return None
    return float(stats.spearmanr(first, second).statistic)


def partial_spearman(first: Sequence[float], second: Sequence[float], given: Sequence[float]) -> float | None:
    """Return the rank correlation of what `given`, linearly in ranks, does not explain of either; None without any."""
    pairs = ((first, second), (first, given), (second, given))
    plain, of_first, of_second = (spearman(one, other) for one, other in pairs)
    if plain is None or of_first is None or of_second is None:
        return None
    left = (1 - of_first**2) * (1 - of_second**2)
    return (plain - of_first * of_second) / math.sqrt(left) if left > 1e-12 else None


def rank_correlation(
    first: Sequence[float], second: Sequence[float], given: Sequence[float] | None = None
) -> RankCorrelation | None:
    """Return the rank correlation, partial where something is `given`, with its interval; None where there is none.

    tanh(atanh(rho) +- 1.96 sqrt((1 + rho^2 / 2) / (n - 3 - k))), k = 1 where something is given, else 0: Fisher's, with
    the variance for ranks of Bonett and Wright (Psychometrika 65, 2000). It takes the pairs for independent.
    """
    rho = spearman(first, second) if given is None else partial_spearman(first, second, given)
    if rho is None:
        return None
    freedom = len(first) - 3 - (given is not None)
    if freedom < 1 or abs(rho) >= 1 - 1e-12:
        return RankCorrelation(rho, math.nan, math.nan, len(first))
    half = float(stats.norm.ppf(0.975)) * math.sqrt((1 + rho**2 / 2) / freedom)
    return RankCorrelation(rho, math.tanh(math.atanh(rho) - half), math.tanh(math.atanh(rho) + half), len(first))
