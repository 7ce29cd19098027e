"""Times two sides against each other, in turn and in one process, so that disturbances affect both."""

from __future__ import annotations

import statistics
import time
from collections.abc import Callable
from dataclasses import dataclass

import torch


@dataclass(frozen=True)
class Ratio:
    """Our amount divided by theirs: median and quartiles of the ratios of `pairs` pairs."""

    row: str
    ours: str
    theirs: str
    median: float
    lower: float
    upper: float
    pairs: int
    amount_ours: float
    amount_theirs: float
    """Medians of the measured amounts, in `unit`."""
    bar: float | None
    """The largest allowed median; None: the row is only stated."""
    unit: str = "s"
    images: int = 0
    """Images per timing; 0: not applicable."""

    @property
    def holds(self) -> bool:
        """Whether the median is within the bar."""
        return self.bar is None or self.median <= self.bar

    @property
    def images_per_second(self) -> float | None:
        """Images per second on our side; None if not applicable."""
        return self.images / self.amount_ours if self.images else None


def compare(
    row: str,
    ours: tuple[str, Callable[[], object]],
    theirs: tuple[str, Callable[[], object]],
    *,
    pairs: int,
    bar: float | None,
    warm_up: int = 2,
    images: int = 0,
) -> Ratio:
    """Time both sides in turn, alternating which is first, after `warm_up` untimed calls of each."""
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
    return ratio_of(row, ours[0], theirs[0], seconds, bar, images=images)


def ratio_of(
    row: str,
    ours: str,
    theirs: str,
    amounts: list[tuple[float, float]],
    bar: float | None,
    *,
    unit: str = "s",
    images: int = 0,
) -> Ratio:
    """Return the ratio of one or more pairs of amounts (ours, theirs)."""
    ratios = [mine / other for mine, other in amounts]
    lower, median, upper = statistics.quantiles(ratios, n=4, method="inclusive") if ratios[1:] else ratios * 3
    return Ratio(
        row=row,
        ours=ours,
        theirs=theirs,
        median=median,
        lower=lower,
        upper=upper,
        pairs=len(amounts),
        amount_ours=statistics.median(mine for mine, _ in amounts),
        amount_theirs=statistics.median(other for _, other in amounts),
        bar=bar,
        unit=unit,
        images=images,
    )


def timed(call: Callable[[], object]) -> float:
    """Return the seconds of `call`, including the work that it queued on the GPU."""
    _synchronize()
    started = time.perf_counter()
    call()
    _synchronize()
    return time.perf_counter() - started


def _synchronize() -> None:
    if torch.cuda.is_initialized():
        torch.cuda.synchronize()
