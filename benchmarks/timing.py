"""Two things timed against each other: in turn, in one process, so that the machine's moods hit both."""

from __future__ import annotations

import statistics
import time
from collections.abc import Callable
from dataclasses import dataclass


@dataclass(frozen=True)
class Ratio:
    """How long `ours` takes for each second of `theirs`: median and quartiles of the ratios of `pairs` pairs."""

    row: str
    ours: str
    theirs: str
    median: float
    lower: float
    upper: float
    pairs: int
    seconds_ours: float
    seconds_theirs: float
    bar: float | None
    """What the median must not exceed; None: only stated."""

    @property
    def holds(self) -> bool:
        """Whether the bar is reached."""
        return self.bar is None or self.median <= self.bar


def compare(
    row: str,
    ours: tuple[str, Callable[[], object]],
    theirs: tuple[str, Callable[[], object]],
    *,
    pairs: int,
    bar: float | None,
    warm_up: int = 2,
) -> Ratio:
    """Time both sides in turn, the first one alternating, after `warm_up` untimed calls of each."""
    for _ in range(warm_up):
        ours[1]()
        theirs[1]()
    seconds: list[tuple[float, float]] = []
    for pair in range(pairs):
        if pair % 2 == 0:
            mine = timed(ours[1])
            other = timed(theirs[1])
        else:
            other = timed(theirs[1])
            mine = timed(ours[1])
        seconds.append((mine, other))
    return ratio_of(row, ours[0], theirs[0], seconds, bar)


def ratio_of(row: str, ours: str, theirs: str, seconds: list[tuple[float, float]], bar: float | None) -> Ratio:
    """Return the ratio of pairs of seconds (ours, theirs)."""
    ratios = [mine / other for mine, other in seconds]
    lower, median, upper = statistics.quantiles(ratios, n=4, method="inclusive")
    return Ratio(
        row=row,
        ours=ours,
        theirs=theirs,
        median=median,
        lower=lower,
        upper=upper,
        pairs=len(seconds),
        seconds_ours=statistics.median(mine for mine, _ in seconds),
        seconds_theirs=statistics.median(other for _, other in seconds),
        bar=bar,
    )


def timed(call: Callable[[], object]) -> float:
    """Return the seconds that `call` takes."""
    begun = time.perf_counter()
    call()
    return time.perf_counter() - begun
