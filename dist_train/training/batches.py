"""The global batch of each update: its samples, its micro-batches, and which of these this rank computes."""

from __future__ import annotations

from collections.abc import Iterator
from functools import lru_cache, partial

from dist_train.config import Config
from dist_train.data.images import BatchRequest
from dist_train.data.plan import BatchPlan, batch_indices, epoch_order
from dist_train.rundir.records import Epochs
from dist_train.training.dealing import Dealing, build_dealing
from dist_train.training.step import GlobalBatch


class Batches:
    """The global batches of a run of `epochs` over `samples` samples. Call `deal` before anything else."""

    def __init__(self, config: Config, epochs: Epochs, samples: int) -> None:
        self._config = config
        self._epochs = epochs
        self._order = lru_cache(2)(partial(epoch_order, samples, config.run.seed))
        self._plans: tuple[BatchPlan, ...] = ()
        self._dealings: tuple[Dealing, ...] = ()

    def deal(self, micro_size: int, rank: int, size: int) -> None:
        """Cut batches into micro-batches of `micro_size` and deal these to `rank` of `size`; all ranks call it at once.

        What was measured of the ranks' speed is dropped.

        Raises UsageError if ranks share every micro-batch, and one has fewer samples than there are ranks.
        """
        self._plans = tuple(BatchPlan(stage.global_size, micro_size) for stage in self._epochs.stages)
        self._dealings = tuple(build_dealing(self._config, plan, rank, size) for plan in self._plans)

    def plan(self, step: int) -> BatchPlan:
        """Return how the batch of update `step` is cut into micro-batches."""
        return self._plans[self._epochs.number(step)]

    def dealing(self, step: int) -> Dealing:
        """Return how the micro-batches of update `step` are dealt to ranks."""
        return self._dealings[self._epochs.number(step)]

    def changed(self, step: int) -> int | None:
        """Return the previous batch size if update `step` is the first of another size, else None."""
        number = self._epochs.number(step)
        is_first = number > 0 and step == self._epochs.stages[number].step
        return self._plans[number - 1].global_size if is_first else None

    def batch(self, step: int) -> GlobalBatch:
        """Return the global batch of update `step`: the next update or the one after it."""
        epoch, index = self._epochs.place(step)
        indices = batch_indices(self._order(epoch), index, self.plan(step).global_size)
        partners, dealing = int(self._config.regularization.mixes), self.dealing(step)
        return GlobalBatch(step, epoch, indices, dealing.share(step), partners, dealing.pace)

    def requests(self, step: int, end: int) -> Iterator[BatchRequest]:
        """Yield the requests of this rank's micro-batches, for the updates from `step` to `end` (exclusive)."""
        for batch in map(self.batch, range(step, end)):
            yield from map(batch.request, batch.micro_batches)
