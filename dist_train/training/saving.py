"""Saving: what the writer of checkpoints was given, what became of it, and how all ranks learn of that."""

from __future__ import annotations

import logging
import time
from collections.abc import Callable
from dataclasses import dataclass, field

from dist_train.checkpoint.files import Contents
from dist_train.checkpoint.writer import CheckpointWriter, NotWritten
from dist_train.cluster.communicator import Communicator, await_on_all_ranks, run_on_all_ranks
from dist_train.training.stopping import TimeLimit

_logger = logging.getLogger("dist_train.training")


@dataclass(eq=False)
class Saving:
    """Saves checkpoints on the rank that has a `writer`; all ranks of `comm` call `save`, `wait` and `finish`."""

    comm: Communicator
    event: Callable[..., None]
    """Records an event, given its name, step and details."""
    writer: CheckpointWriter | None = None
    time_limit: TimeLimit = field(default_factory=lambda: TimeLimit(None))
    """Is told how long saving takes."""

    def __post_init__(self) -> None:
        self.saved_step: int | None = None
        """The step of the last `save`, the same on all ranks: they reset it after a recovery."""
        self._submitted_step: int | None = None
        """The step of the last checkpoint that the writer was given, never reset."""
        self._not_written: NotWritten | None = None

    def save(self, step: int, contents: Callable[[], Contents], best_step: int | None) -> float:
        """Save the state of `step`, unless the writer has it already; return for how many seconds that stalled."""
        self.saved_step = step
        if self.writer is None or self._submitted_step == step:
            return 0.0
        self._submitted_step = step
        begun = time.perf_counter()
        self.writer.submit(contents(), best_step)
        return time.perf_counter() - begun

    def report(self) -> None:
        """Record which checkpoints were written and which failed; a failed one does not end the run."""
        for result in self.writer.results() if self.writer else ():
            if isinstance(result, NotWritten):
                self._not_written = result
                _logger.error("the checkpoint of step %d could not be written: %s", result.step, result.why)
                self.event("checkpoint_failed", result.step, error=result.why)
            else:
                self._not_written = None
                self.time_limit.note_saved(result.seconds)
                seconds, stall_seconds = round(result.seconds, 4), round(result.stall_seconds, 4)
                what = {"path": result.file.path.name, "bytes": result.file.size}
                self.event("checkpoint", result.file.step, **what, seconds=seconds, stall_seconds=stall_seconds)

    def settle(self) -> None:
        """Wait for the checkpoint being written, if any, and record whether it was."""
        if self.writer is not None:
            self.writer.wait()
            self.report()

    def wait(self) -> None:
        """Wait on all ranks for the checkpoint being written, since launchers end a rank that the others have left."""
        await_on_all_ranks(self.comm, lambda: self.writer is None or self.writer.wait(1.0), "save")
        self.report()

    def finish(self) -> None:
        """Wait for the last checkpoint; raise FaultError if it could not be written, on other ranks PeerFailedError."""
        self.wait()
        if not self.comm.is_elastic:
            run_on_all_ranks(self.comm, self._check_written, "save the last checkpoint")
            return
        # On another node, the rank that takes over may be able to.
        self._check_written()
        self.comm.barrier()

    def close(self) -> None:
        """Wait for the checkpoint being written, ignoring failures, and end the writer."""
        if self.writer is not None:
            self.writer.close()

    def _check_written(self) -> None:
        if (failed := self._not_written) and failed.step == self._submitted_step:
            raise failed.fault() from failed.error
