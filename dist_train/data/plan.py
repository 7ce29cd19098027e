"""The global batch: cut into micro-batches, dealt out to any number of ranks."""

from __future__ import annotations

from dataclasses import dataclass
from functools import cached_property

from dist_train.outcome import UsageError


@dataclass(frozen=True)
class MicroBatch:
    """Samples `start` to `stop` (exclusive) of a global batch; `index` counts micro-batches in it."""

    index: int
    start: int
    stop: int

    @property
    def size(self) -> int:
        """The number of samples."""
        return self.stop - self.start


@dataclass(frozen=True)
class BatchPlan:
    """How `global_size` samples are cut into micro-batches of `micro_size` and dealt out.

    The cut does not depend on the number of ranks, so that neither do the gradients that are summed.
    """

    global_size: int
    micro_size: int

    def __post_init__(self) -> None:
        assert self.global_size >= 1
        assert self.micro_size >= 1

    @cached_property
    def micro_batches(self) -> tuple[MicroBatch, ...]:
        """All micro-batches in order; the last one is shorter where `micro_size` does not divide."""
        starts = range(0, self.global_size, self.micro_size)
        return tuple(
            MicroBatch(index, start, min(start + self.micro_size, self.global_size))
            for index, start in enumerate(starts)
        )

    def share(self, rank: int, size: int) -> tuple[MicroBatch, ...]:
        """Return what rank `rank` of `size` computes, round robin by index.

        Nobody holds more than one above another; with more ranks than micro-batches some hold none.
        """
        assert 0 <= rank < size
        return self.micro_batches[rank::size]

    def slices(self, rank: int, size: int) -> tuple[MicroBatch, ...]:
        """Return what rank `rank` of `size` computes where all share every micro-batch: an even part of each.

        Raises:
            UsageError: some micro-batch has fewer samples than there are ranks.
        """
        assert 0 <= rank < size
        smallest = self.micro_batches[-1]
        if smallest.size < size:
            raise UsageError(
                f"all ranks share every micro-batch, but one has only {smallest.size} samples for {size} ranks: "
                f"set batch.micro_size so that even the last micro-batch of batch.global_size {self.global_size} "
                f"has at least {size} samples, or start fewer ranks"
            )
        return tuple(
            MicroBatch(
                whole.index,
                whole.start + whole.size * rank // size,
                whole.start + whole.size * (rank + 1) // size,
            )
            for whole in self.micro_batches
        )

    def steps_per_epoch(self, samples: int) -> int:
        """Return the number of whole batches in `samples`; UsageError when there is not one."""
        if samples < self.global_size:
            raise UsageError(
                f"{samples} training samples are fewer than one global batch of {self.global_size}: "
                f"set batch.global_size to at most {samples}, or train on more samples (data.train_size)"
            )
        return samples // self.global_size
