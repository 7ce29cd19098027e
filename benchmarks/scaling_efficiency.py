"""Rows of the cost of more ranks: two against one, a core each, and more ranks than cores; one thread each, over MPI.

Strong scaling: the same global batch on twice the ranks. Weak scaling: twice the batch on twice the ranks. Both include
the cores' competition for memory and clock, which `benchmarks/together.py` excludes.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import replace

from benchmarks.peers.comparison import OURS, seconds_of
from benchmarks.peers.work import Work
from benchmarks.timing import Ratio, ratio_of

BAR = 1 / 0.95
_MANY = (4, 8)


def efficiency_rows(work: Work, rounds: int) -> Iterator[Ratio]:
    """Yield the rows of `work`: strong and weak scaling. A ratio of 1 is an efficiency of 1."""
    two = replace(work, ranks=2)
    half = replace(work, batch=work.batch // 2)
    strong, weak = [], []
    for _ in range(rounds):
        on_two = seconds_of(OURS, two)
        strong.append((on_two, seconds_of(OURS, work) / 2))
        weak.append((on_two, seconds_of(OURS, half)))
    title = f"width {work.width:g}, batch {work.batch}"
    yield ratio_of(f"strong scaling, {title}", "2 ranks", "half of 1's", strong, BAR, images=work.batch)
    small = f"1 rank, batch {half.batch}"
    yield ratio_of(f"weak scaling, {title}", "2 ranks", small, weak, BAR, images=work.batch)


def oversubscribed_rows(work: Work, rounds: int) -> Iterator[Ratio]:
    """Yield the time of `work` on more ranks than cores over that on two ranks; without a bar."""
    for many in _MANY:
        pairs = [
            (seconds_of(OURS, replace(work, ranks=many)), seconds_of(OURS, replace(work, ranks=2)))
            for _ in range(rounds)
        ]
        title = f"oversubscribed, width {work.width:g}, batch {work.batch}"
        yield ratio_of(title, f"{many} ranks", "2 ranks", pairs, None, images=work.batch)
