"""What the ranks of an elastic launch do once they have met anew: share out the work, and rank 0's place."""

from __future__ import annotations

import socket
from collections.abc import Sequence
from contextlib import ExitStack
from dataclasses import dataclass, field, replace

from dist_train.cluster.communicator import Generation, gather_str, run_on_all_ranks
from dist_train.config import Config
from dist_train.launching.assembly import build_writer, own_norms, set_up_reduction
from dist_train.launching.session import Session
from dist_train.monitoring.console import open_logs
from dist_train.rundir.paths import LEASE_SECONDS, PATIENCE_SECONDS, LockRequest, RunDirectory
from dist_train.rundir.records import Observer, rewind
from dist_train.training.micro_batches import sum_over
from dist_train.training.stopping import job_time_limit
from dist_train.training.trainer import Trainer

_EVERY_STEP = 2**62


@dataclass
class Regrouping:
    """Called with a trainer whose ranks have just met, and hold one state."""

    config: Config
    directory: RunDirectory
    session: Session
    stack: ExitStack
    """Of the run: what is opened here is closed with it."""
    observers: Sequence[Observer] = ()
    """Rank 0's, beside those that the settings name."""
    _logs: ExitStack = field(default_factory=ExitStack)
    _logs_of: int | None = None

    def __post_init__(self) -> None:
        self.stack.callback(self._logs.close)

    def open_logs(self, rank: int) -> None:
        """Write this process's log as that of `rank`."""
        if rank != self._logs_of:
            self._logs.close()
            self._logs.enter_context(open_logs(self.directory.logs, rank))
            self._logs_of = rank

    def __call__(self, trainer: Trainer, generation: Generation) -> None:
        """Deal the micro-batches out anew; on a rank that has become rank 0, take over what it writes."""
        comm, step = trainer.comm, trainer.take_step
        self.open_logs(comm.rank)
        step.reduction.close()
        step.noise.rank = comm.rank
        # What a broken group may still write to is not used again: sums have fresh memory.
        trainer.take_step = replace(
            step,
            reduction=set_up_reduction(trainer.config, step.weights, step.noise, comm, trainer.progress),
            sum_over_ranks=sum_over(trainer.config.model, comm, step.clock),
        )
        takes_over = comm.rank == 0 and trainer.writer is None

        def take_over() -> None:
            if takes_over:
                self._take_over(trainer)

        run_on_all_ranks(comm, take_over, "take over the run directory")
        nodes = gather_str(comm, socket.gethostname(), "nodes")
        self.session.note_generation(trainer, nodes)
        if takes_over:
            for record in trainer.recent.all():
                trainer.observers.record(record)

    def _take_over(self, trainer: Trainer) -> None:
        """Become who writes: the lock of the run directory, records, status, checkpoints."""
        # The lost rank's node may be cut off, not yet aware of it, or its lock known to the file server alone.
        wish = LockRequest(self.directory.root, self.directory.lock, patience=LEASE_SECONDS)
        lock = wish.wait(LEASE_SECONDS + PATIENCE_SECONDS)
        assert lock is not None, "it waits, or refuses"
        self.stack.callback(lock.release)
        rewind(self.directory.metrics, _EVERY_STEP)
        self.session.take_over(self.config, lock, self.observers)
        trainer.observers, trainer.status = self.session.observers, self.session.status
        trainer.writer = build_writer(self.config, self.directory, self.session)
        trainer.take_step = replace(trainer.take_step, wait_for_checkpoint_copy=trainer.writer.wait_until_copied)
        trainer.time_limit = job_time_limit()
        if trainer.measuring:
            trainer.measuring.norms = own_norms(self.config, trainer.take_step.weights)
