"""What further ranks cost: two against one, a core each, and more ranks than cores; one thread each, over MPI.

Strong: the same global batch on twice the ranks. Weak: twice the batch on twice the ranks. What the cores take
from each other, memory and clock, is in both; it is left out against two programs that run side by side, each on half
the batch, and know nothing of each other: the rest is what working together costs.
"""

from __future__ import annotations

from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from dataclasses import replace
from functools import partial
from statistics import fmean

from benchmarks.peers.comparison import OURS, seconds_of
from benchmarks.peers.work import Work
from benchmarks.timing import Ratio, ratio_of

BAR = 1 / 0.95
_MANY = (4, 8)


def efficiency_rows(work: Work, rounds: int) -> Iterator[Ratio]:
    """Yield the strong and the weak row of `work`, and that against two programs; a ratio of 1: an efficiency of 1."""
    two = replace(work, ranks=2)
    half = replace(work, batch=work.batch // 2)
    strong, weak, run_on_all_ranks = [], [], []
    for _ in range(rounds):
        on_two = seconds_of(OURS, two)
        strong.append((on_two, seconds_of(OURS, work) / 2))
        weak.append((on_two, seconds_of(OURS, half)))
        run_on_all_ranks.append((on_two, _side_by_side(half)))
    title = f"width {work.width:g}, batch {work.batch}"
    yield ratio_of(f"strong scaling, {title}", "2 ranks", "half of 1's", strong, BAR, images=work.batch)
    small = f"1 rank, batch {half.batch}"
    yield ratio_of(f"weak scaling, {title}", "2 ranks", small, weak, BAR, images=work.batch)
    apart = f"2 programs side by side, batch {half.batch} each"
    yield ratio_of(f"working together, {title}", "2 ranks", apart, run_on_all_ranks, BAR, images=work.batch)


def _side_by_side(work: Work) -> float:
    """Return the seconds of an update of two programs that each do `work` at the same time."""
    with ThreadPoolExecutor(2) as pool:
        return fmean(pool.map(partial(seconds_of, OURS), [work, work]))


def oversubscribed_rows(work: Work, rounds: int) -> Iterator[Ratio]:
    """Yield the time of `work` on more ranks over that on two; stated: cores beyond those of the machine are lent."""
    for many in _MANY:
        pairs = [
            (seconds_of(OURS, replace(work, ranks=many)), seconds_of(OURS, replace(work, ranks=2)))
            for _ in range(rounds)
        ]
        title = f"oversubscribed, width {work.width:g}, batch {work.batch}"
        yield ratio_of(title, f"{many} ranks", "2 ranks", pairs, None, images=work.batch)
