"""The global batch of each update, and which of its micro-batches each rank computes: an even share, or by its speed.

Sums over micro-batches are exact, so the result does not depend on which rank computes which micro-batch.
"""

from __future__ import annotations

import logging
from collections.abc import Callable, Iterator, Sequence
from functools import lru_cache, partial
from heapq import heapify, heapreplace

from dist_train.cluster.communicator import Communicator, Counters
from dist_train.config import Config
from dist_train.config.combinations import may_deal_unevenly
from dist_train.data.images import BatchRequest
from dist_train.data.plan import BatchPlan, MicroBatch, batch_indices, epoch_order
from dist_train.rundir.epochs import Epochs
from dist_train.training.measuring import StepTimes
from dist_train.training.micro_batches import shares_micro_batches
from dist_train.training.step import GlobalBatch

_logger = logging.getLogger("dist_train.training")

_PROBE_EVERY = 64
"""Every so many updates, a rank without micro-batches gets one, to be measured again."""
_FEW = 4
"""With fewer micro-batches per rank, shares can hardly follow the ranks' speed."""
_MANY = 16
"""With as many per rank, one or two micro-batches, for which the others may wait, are a small part of an update."""


def deal(times: Sequence[int], micro_batches: int) -> tuple[int, ...]:
    """Return how many of `micro_batches` each rank computes so that the last one finishes as early as possible.

    `times` are those of one micro-batch, by rank, in any unit. 0 means unknown and counts as the shortest known time,
    so that the rank gets work and is measured. A slower rank never has more than a faster one; the shares of equally
    fast ranks differ by at most one.
    """
    times = _without_unknown(times)
    ends = [(time, rank) for rank, time in enumerate(times)]
    heapify(ends)
    counts = [0] * len(times)
    for _ in range(micro_batches):
        # The rank that would finish it first gets it.
        end, rank = ends[0]
        counts[rank] += 1
        heapreplace(ends, (end + times[rank], rank))
    return tuple(counts)


def deal_if_faster(counts: Sequence[int], times: Sequence[int]) -> tuple[int, ...]:
    """Return what `deal` returns if that makes the slowest rank at least a sixteenth faster, else `counts`."""
    best = deal(times, sum(counts))
    return best if 16 * _slowest(best, times) <= 15 * _slowest(counts, times) else tuple(counts)


def smooth(average: int, measured: int) -> int:
    """Return the exponential average after `measured`, in integers, so that ranks agree; 0 means unknown.

    Values above twice the average count as twice the average: a single slow step does not make a slow rank.
    """
    if not average or not measured:
        return measured or average
    return (3 * average + min(measured, 2 * average)) // 4


def with_probes(counts: Sequence[int]) -> tuple[int, ...]:
    """Return `counts` with one micro-batch for each rank that has none, taken from the ranks that have most."""
    probed = list(counts)
    for rank, count in enumerate(counts):
        if count == 0 and max(probed) > 1:
            probed[probed.index(max(probed))] -= 1
            probed[rank] = 1
    return tuple(probed)


def _without_unknown(times: Sequence[int]) -> list[int]:
    """Return `times` with each 0 replaced by the shortest known time."""
    shortest = min(filter(None, times), default=1)
    return [time or shortest for time in times]


def _slowest(counts: Sequence[int], times: Sequence[int]) -> int:
    """Return the time of the slowest rank."""
    return max(count * time for count, time in zip(counts, _without_unknown(times), strict=True))


class Dealing:
    """An even share, the same in every update."""

    pace = 0
    """Microseconds per micro-batch, which this rank reports to the others; 0 if it does not."""

    def __init__(self, mine: tuple[MicroBatch, ...]) -> None:
        self._mine = mine

    def share(self, step: int) -> tuple[MicroBatch, ...]:
        """Return the micro-batches of this rank in `step`: the next update or the one after it."""
        return self._mine

    def claim_in(self, step: int) -> Callable[[], MicroBatch | None] | None:
        """Return how this rank claims further micro-batches in `step`, the next update: see `GlobalBatch.claim`."""
        return None

    def note(self, step: int, times: StepTimes, paces: Sequence[int]) -> tuple[int, ...] | None:
        """Note this rank's `times` of `step`, the last update, and the paces that all ranks reported in it.

        Return the number of micro-batches of each rank if it changes.
        """
        return None


class MeasuredDealing(Dealing):
    """Shares that follow the paces that ranks report; all ranks compute the same shares from them.

    A rank reports what it measures in a step in the next step: by then a GPU has reached the end of the measured step,
    so that reading its timers causes no wait. New shares apply from the step after that, since samples of the step in
    between are already being read. Shares are even at first, also when a run resumes.
    """

    def __init__(self, plan: BatchPlan, rank: int, size: int) -> None:
        self._plan = plan
        self._rank = rank
        self._averages = (0,) * size
        self._counts = deal(self._averages, len(plan.micro_batches))
        self._dealt: dict[int, tuple[int, ...]] = {}
        self._is_warm = False

    def share(self, step: int) -> tuple[MicroBatch, ...]:
        return self._plan.dealt(self._dealt.get(step, self._counts), self._rank)

    def note(self, step: int, times: StepTimes, paces: Sequence[int]) -> tuple[int, ...] | None:
        # The first update is not measured: it also allocates, tunes and compiles.
        samples = sum(micro_batch.size for micro_batch in self.share(step)) if self._is_warm else 0
        self._is_warm = True
        seconds = times.seconds_of("data_wait") + times.seconds_of("forward_backward")
        self.pace = round(1e6 * seconds * self._plan.micro_size / samples) if samples else 0
        self._averages = tuple(
            # The average of a rank that had no micro-batches is old, and replaced by a new pace.
            smooth(average, pace) if count else pace or average
            for average, pace, count in zip(self._averages, paces, self._counts, strict=True)
        )
        before, self._counts = self._counts, deal_if_faster(self._counts, self._averages)
        after_next = self._counts if (step + 2) % _PROBE_EVERY else with_probes(self._counts)
        self._dealt = {step + 1: self._dealt.get(step + 1, before), step + 2: after_next}
        return None if self._counts == before else self._counts


class DynamicDealing(Dealing):
    """First half of an even share, whose samples can be read early; then each rank takes the next when it is ready."""

    def __init__(self, plan: BatchPlan, rank: int, size: int, counters: Counters) -> None:
        first = size * max(1, len(plan.micro_batches) // (2 * size))
        super().__init__(plan.micro_batches[:first][rank::size])
        self._common = plan.micro_batches[first:]
        self._size = size
        self._counters = counters
        self._micro_size = plan.micro_size

    def claim_in(self, step: int) -> Callable[[], MicroBatch | None] | None:
        return partial(self._claim, step) if self._common else None

    def _claim(self, step: int) -> MicroBatch | None:
        """Return the next micro-batch that no rank has claimed; None, once for each rank, if there is none."""
        # An update that ran out of memory is repeated with smaller micro-batches, which are counted separately.
        name = f"micro-batches of {self._micro_size}, step {step}"
        index = self._counters.fetch_and_add(name)
        if index == len(self._common) + self._size - 1:
            # All ranks know that none is left. If the gradient is computed again, all are claimed again.
            self._counters.delete(name)
        return self._common[index] if index < len(self._common) else None


def build_dealing(config: Config, plan: BatchPlan, comm: Communicator) -> Dealing:
    """Return how the micro-batches of `plan` are dealt to the ranks of `comm`; nothing is measured yet.

    Raises UsageError if ranks that claim micro-batches cannot connect to rank 0.
    """
    rank, size, count = comm.rank, comm.size, len(plan.micro_batches)
    dealing = config.batch.dealing
    if dealing == "auto":
        # On one node all CPUs are of one kind, and round alike.
        is_near = comm.has_counters and comm.local_size == size and config.run.device == "cpu"
        dealing = "dynamic" if is_near and 1 < size <= count // _MANY and may_deal_unevenly(config) else "even"
    if dealing == "even":
        return Dealing(plan.slices(rank, size) if shares_micro_batches(config.model) else plan.share(rank, size))
    if rank == 0 and size > 1 and count < _FEW * size:
        _logger.warning(
            f"batch.dealing: {count} micro-batches are too few to deal to {size} ranks by their speed: set a smaller "
            f"batch.micro_size, for at least {_FEW * size} of them"
        )
    if dealing == "measured":
        return MeasuredDealing(plan, rank, size)
    return DynamicDealing(plan, rank, size, comm.open_counters())


class Batches:
    """The global batches of a run of `steps` updates in `epochs` over `samples` samples. Call `deal` first."""

    def __init__(self, config: Config, epochs: Epochs, samples: int, steps: int) -> None:
        self._config = config
        self._epochs = epochs
        self._steps = steps
        self._order = lru_cache(2)(partial(epoch_order, samples, config.run.seed))
        self._plans: tuple[BatchPlan, ...] = ()
        self._dealings: tuple[Dealing, ...] = ()

    def deal(self, micro_size: int, comm: Communicator) -> None:
        """Cut batches into micro-batches of `micro_size` and deal these to the ranks of `comm`, which all call this.

        Earlier measurements of the ranks' speed are discarded.
        """
        self._plans = tuple(BatchPlan(stage.global_size, micro_size) for stage in self._epochs.stages)
        self._dealings = tuple(build_dealing(self._config, plan, comm) for plan in self._plans)

    def plan(self, step: int) -> BatchPlan:
        """Return how the batch of update `step` is cut into micro-batches."""
        return self._plans[self._epochs.number(step)]

    def dealing(self, step: int) -> Dealing:
        """Return how the micro-batches of update `step` are dealt to ranks."""
        return self._dealings[self._epochs.number(step)]

    def changed(self, step: int) -> int | None:
        """Return the previous batch size if update `step` is the first with another one, else None."""
        number = self._epochs.number(step)
        is_first = number > 0 and step == self._epochs.stages[number].step
        return self._plans[number - 1].global_size if is_first else None

    def batch(self, step: int) -> GlobalBatch:
        """Return the global batch of update `step`: the next update or the one after it."""
        epoch, index = self._epochs.place(step)
        dealing = self.dealing(step)
        return GlobalBatch(
            step=step,
            epoch=epoch,
            indices=batch_indices(self._order(epoch), index, self.plan(step).global_size),
            micro_batches=dealing.share(step),
            claim=dealing.claim_in(step),
            following=partial(self._unclaimed, step + 1),
            partners=int(self._config.regularization.mixes),
            pace=dealing.pace,
        )

    def requests(self, step: int) -> Iterator[BatchRequest]:
        """Yield the known requests of this rank in update `step` and, if no more can follow, in the next one."""
        yield from self._unclaimed(step)
        if self.batch(step).claim is None:
            yield from self._unclaimed(step + 1)

    def _unclaimed(self, step: int) -> Iterator[BatchRequest]:
        """Yield the requests of the micro-batches that this rank need not claim in `step`; none after the last one."""
        if step < self._steps:
            batch = self.batch(step)
            yield from map(batch.request, batch.micro_batches)
