"""Which micro-batches each rank computes, update by update: an even share, or one by its measured speed.

Everything that is summed over micro-batches is summed exactly, so that it does not matter to the result who computes
which.
"""

from __future__ import annotations

import logging
from collections.abc import Sequence
from heapq import heapify, heapreplace

from dist_train.config import Config
from dist_train.data.plan import BatchPlan, MicroBatch
from dist_train.training.measuring import StepTimes
from dist_train.training.micro_batches import share_of

_logger = logging.getLogger("dist_train.training")

_TRY_EVERY = 64
"""Updates after which a rank without micro-batches has one again, to be measured."""
_FEW = 4
"""Micro-batches a rank below which there is little to deal."""


def deal(times: Sequence[int], micro_batches: int) -> tuple[int, ...]:
    """Return how many of `micro_batches` each rank computes for the slowest to be done as early as possible.

    `times` are those of one micro-batch, by rank, in any unit. 0, not known, is taken for the shortest, so that it
    becomes known. Of two ranks the slower never has more; equal ones differ by one at most.
    """
    times = _filled(times)
    ends = [(time, rank) for rank, time in enumerate(times)]
    heapify(ends)
    counts = [0] * len(times)
    for _ in range(micro_batches):
        # Whoever is done first with one more takes it.
        end, rank = ends[0]
        counts[rank] += 1
        heapreplace(ends, (end + times[rank], rank))
    return tuple(counts)


def deal_anew(counts: Sequence[int], times: Sequence[int]) -> tuple[int, ...]:
    """Return `counts` as they are, or as `deal` has them where that makes the slowest a sixteenth faster."""
    best = deal(times, sum(counts))
    return best if 16 * _longest(best, times) <= 15 * _longest(counts, times) else tuple(counts)


def smooth(average: int, measured: int) -> int:
    """Return an exponential average, in integers to be the same on all ranks; 0: not known, or not measured.

    What is more than twice the average counts as twice: one step that something held up is not a slow rank.
    """
    if not average or not measured:
        return measured or average
    return (3 * average + min(measured, 2 * average)) // 4


def with_a_try(counts: Sequence[int]) -> tuple[int, ...]:
    """Return `counts` with one micro-batch for each rank that has none, from those that have most."""
    tried = list(counts)
    for rank, count in enumerate(counts):
        if count == 0 and max(tried) > 1:
            tried[tried.index(max(tried))] -= 1
            tried[rank] = 1
    return tuple(tried)


def _filled(times: Sequence[int]) -> list[int]:
    shortest = min(filter(None, times), default=1)
    return [time or shortest for time in times]


def _longest(counts: Sequence[int], times: Sequence[int]) -> int:
    return max(count * time for count, time in zip(counts, _filled(times), strict=True))


class Dealing:
    """An even share, the same in every update."""

    pace = 0
    """Microseconds that a micro-batch took this rank, which it tells the others; 0: it does not say."""

    def __init__(self, mine: tuple[MicroBatch, ...]) -> None:
        self._mine = mine

    def share(self, step: int) -> tuple[MicroBatch, ...]:
        """Return what this rank computes in `step`, the next one or the one after."""
        return self._mine

    def note(self, step: int, times: StepTimes, paces: Sequence[int]) -> tuple[int, ...] | None:
        """Take in this rank's `times` of `step`, just made, and what the ranks told in it, by rank.

        Return the micro-batches of each rank where they change.
        """
        return None


class MeasuredDealing(Dealing):
    """Shares that follow the ranks' paces, the same on all ranks: a function of what they told one another.

    What was measured in a step is told in the next one, whose result also says that a GPU has come to the end of what
    was measured: nobody waits for it. The share that follows is that of the step after the next, since samples of the
    next are being read already. It begins even, also where a run resumes.
    """

    def __init__(self, plan: BatchPlan, rank: int, size: int) -> None:
        self._plan = plan
        self._rank = rank
        self._averages = (0,) * size
        self._counts = deal(self._averages, len(plan.micro_batches))
        self._dealt: dict[int, tuple[int, ...]] = {}
        self._is_warm = False
        self.pace = 0

    def share(self, step: int) -> tuple[MicroBatch, ...]:
        """Return what this rank computes in `step`, the next one or the one after."""
        return self._plan.dealt(self._dealt.get(step, self._counts), self._rank)

    def note(self, step: int, times: StepTimes, paces: Sequence[int]) -> tuple[int, ...] | None:
        """Take in the `times` and `paces` of `step`; return the counts where they change."""
        # The first update also allocates, tunes and compiles: its time says little.
        samples = sum(micro_batch.size for micro_batch in self.share(step)) if self._is_warm else 0
        self._is_warm = True
        seconds = times.seconds_of("data_wait") + times.seconds_of("forward_backward")
        self.pace = round(1e6 * seconds * self._plan.micro_size / samples) if samples else 0
        self._averages = tuple(
            # What is known of a rank that has had none is old: a new time takes its place.
            smooth(average, pace) if count else pace or average
            for average, pace, count in zip(self._averages, paces, self._counts, strict=True)
        )
        before, self._counts = self._counts, deal_anew(self._counts, self._averages)
        coming = self._counts if (step + 2) % _TRY_EVERY else with_a_try(self._counts)
        self._dealt = {step + 1: self._dealt.get(step + 1, before), step + 2: coming}
        return None if self._counts == before else self._counts


def build_dealing(config: Config, plan: BatchPlan, rank: int, size: int) -> Dealing:
    """Return how `plan` is dealt to `rank` of `size`, from an update on before which nothing was measured.

    Raises:
        UsageError: a micro-batch that all share has fewer samples than there are ranks.
    """
    if config.batch.dealing == "even":
        return Dealing(share_of(config.model, plan, rank, size))
    count = len(plan.micro_batches)
    if rank == 0 and size > 1 and count < _FEW * size:
        _logger.warning(
            "batch.dealing: %d micro-batches are few to deal to %d ranks by their speed; set a smaller "
            "batch.micro_size, for %d or more",
            count,
            size,
            _FEW * size,
        )
    return MeasuredDealing(plan, rank, size)
