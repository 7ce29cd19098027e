"""What the ranks of an elastic launch do when they have met again: distribute the work, and replace a lost rank 0."""

from __future__ import annotations

import socket
from collections.abc import Sequence
from contextlib import ExitStack
from dataclasses import dataclass, field, replace
from functools import partial

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

_KEEP_ALL_STEPS = 2**62


@dataclass
class Regrouping:
    """Called with a trainer whose ranks have just met and hold the same state."""

    config: Config
    directory: RunDirectory
    session: Session
    stack: ExitStack  # the run's exit stack: closes what is opened here when the run ends
    observers: Sequence[Observer] = ()  # rank 0's observers, besides those that the settings name
    _logs: ExitStack = field(default_factory=ExitStack)
    _logging_as: int | None = None

    def __post_init__(self) -> None:
        self.stack.callback(self._logs.close)

    def open_logs(self, rank: int) -> None:
        """Write this process's log to the file of `rank`."""
        if rank != self._logging_as:
            self._logs.close()
            self._logs.enter_context(open_logs(self.directory.logs, rank))
            self._logging_as = rank

    def __call__(self, trainer: Trainer, generation: Generation) -> None:
        """Redistribute the micro-batches; a rank that has become rank 0 takes over writing the run directory."""
        comm, step = trainer.comm, trainer.take_step
        self.open_logs(comm.rank)
        step.reduction.close()
        step.noise.rank = comm.rank
        # A broken group may still write to its buffers: sums get new ones.
        trainer.take_step = replace(
            step,
            reduction=set_up_reduction(trainer.config, step.weights, step.noise, comm, trainer.progress),
            sum_over_ranks=sum_over(trainer.config.model, comm, step.clock),
        )
        takes_over = comm.rank == 0 and trainer.writer is None
        take_over = partial(self._take_over, trainer) if takes_over else lambda: None
        run_on_all_ranks(comm, take_over, "take over the run directory")
        nodes = gather_str(comm, socket.gethostname(), "nodes")
        self.session.note_generation(trainer, nodes)
        if takes_over:
            for record in trainer.recent.all():
                trainer.observers.record(record)

    def _take_over(self, trainer: Trainer) -> None:
        # The lost rank's node may be cut off without having noticed, or the file server may still hold its lock.
        request = LockRequest(self.directory.root, self.directory.lock, patience=LEASE_SECONDS)
        lock = request.wait(LEASE_SECONDS + PATIENCE_SECONDS)
        assert lock is not None, "the request has either got the lock or raised UsageError"
        self.stack.callback(lock.release)
        rewind(self.directory.metrics, _KEEP_ALL_STEPS)
        self.session.take_over(self.config, lock, self.observers)
        trainer.observers, trainer.status = self.session.observers, self.session.status
        trainer.writer = build_writer(self.config, self.directory, self.session)
        trainer.take_step = replace(trainer.take_step, wait_for_checkpoint_copy=trainer.writer.wait_until_copied)
        trainer.time_limit = job_time_limit()
        if trainer.measuring:
            trainer.measuring.norms = own_norms(self.config, trainer.take_step.weights)
