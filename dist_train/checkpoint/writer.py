"""Writes checkpoints in a background thread while training continues, and tells all ranks what became of them.

The thread also copies the weights and the optimizer's state, which do not change until the next update (perturbed
weights have a buffer of their own). Call `wait_until_copied` before that update.
"""

from __future__ import annotations

import logging
import time
from collections import deque
from collections.abc import Callable, Iterator, Mapping
from concurrent.futures import Future, ThreadPoolExecutor, wait
from contextlib import contextmanager
from dataclasses import dataclass, replace
from pathlib import Path
from threading import Event
from typing import Any

import torch

from dist_train.checkpoint.files import (
    OTHER_FALLBACK,
    CheckpointFile,
    Contents,
    prune,
    records_in,
    remove_from_fallback,
    remove_others,
    write_checkpoint,
)
from dist_train.cluster.communicator import Communicator, await_on_all_ranks, run_on_all_ranks
from dist_train.config.sections import CheckpointSettings
from dist_train.outcome import FaultError, UsageError
from dist_train.rundir import atomic
from dist_train.rundir.paths import DISK_FULL, refuse_foreign

_YIELD_SECONDS = 0.001
_FIRST_PAUSE_SECONDS = 1.0
_LONGEST_PAUSE_SECONDS = 60.0
_logger = logging.getLogger("dist_train.checkpoints")


@dataclass(frozen=True)
class Written:
    """A checkpoint on disk: training was held up for `stall_seconds`; writing took `seconds`, attempts that failed and
    the pauses after them left out.
    """

    file: CheckpointFile
    stall_seconds: float
    seconds: float


@dataclass(frozen=True)
class NotWritten:
    """A checkpoint that could not be written to the run directory; `fallback` is its path in the fallback directory.

    Writing is retried with growing pauses until the next checkpoint: a `Written` of the same step may follow.
    """

    step: int
    error: Exception
    fallback: Path | None = None

    @property
    def why(self) -> str:
        """What failed, and where the checkpoint is instead."""
        cause = f"{type(self.error).__name__}: {self.error}"
        if isinstance(self.error, OSError) and self.error.strerror:
            cause = f"{self.error.strerror}: {self.error.filename}" if self.error.filename else self.error.strerror
        return f"{cause}; it was written to {self.fallback}" if self.fallback else cause

    def fault(self) -> FaultError:
        """Return the error that ends a run whose last checkpoint this is."""
        untouched = "" if self.fallback else "; earlier ones are untouched"
        fix = "Fix that"
        if isinstance(self.error, OSError) and self.error.errno in DISK_FULL:
            fix = "Free some space"
        elif isinstance(self.error, FileNotFoundError):  # without it, the same command would begin a new run
            fix = "Move the run directory back"
        return FaultError(
            f"the last checkpoint (step {self.step}) could not be written: {self.why}{untouched}. {fix} and run the "
            f"same command again",
            code="checkpoint-not-written",
        )


@contextmanager
def _warn_if_not_deleted(what: str) -> Iterator[None]:
    """Warn of an OSError in the block, which deletes `what`: the checkpoint that was just written is good."""
    try:
        yield
    except OSError as error:
        _logger.warning("%s cannot be deleted: %s", what, error)


@dataclass(eq=False)
class CheckpointWriter:
    """Writes checkpoints into `directory` or, if that fails, into `fallback`, one at a time.

    `before_publishing` runs in the thread, before a checkpoint is renamed to its final name.
    """

    directory: Path
    settings: CheckpointSettings
    before_publishing: Callable[[], None]
    fallback: Path | None = None
    waiting_records: Callable[[], bytes] = bytes
    """Returns the lines of `metrics.jsonl` that the disk may lack: `fallback` takes them, too."""

    def __post_init__(self) -> None:
        self._copies: dict[str, torch.Tensor] = {}
        # That of the thread which trains, so that copies wait for the update.
        self._stream = torch.cuda.current_stream() if torch.cuda.is_initialized() else None
        # One long-lived thread: starting one makes the training wait until the thread has run first.
        self._thread = ThreadPoolExecutor(max_workers=1, thread_name_prefix="checkpoint-writer")
        self._thread.submit(self._make_stream_current).result()
        self._copied = Event()
        self._copied.set()
        self._pending: Future[None] | None = None
        self._results = deque[Written | NotWritten]()
        self._in_fallback: Path | None = None  # until a checkpoint is written to `directory` again
        # Set when someone waits for the writer: ends the pauses between retries.
        self._awaited = Event()

    def _make_stream_current(self) -> None:
        """Let this thread, whose GPU is at first the first one, use that of `_stream`, and copy in that stream."""
        # For good: to go back to the first GPU would take memory there.
        if self._stream is not None:
            torch.cuda.set_stream(self._stream)

    def submit(self, contents: Contents, best_step: int | None) -> None:
        """Write `contents`, by default in the background: call `wait_until_copied` before the tensors change."""
        begun = time.perf_counter()
        self.wait()
        stall = time.perf_counter() - begun
        self._copied.clear()
        self._awaited.clear()
        self._pending = self._thread.submit(self._write, contents, best_step, begun, stall)
        if not self.settings.background:
            self.wait()

    def wait_until_copied(self) -> None:
        """Wait until the tensors of the last `submit` are copied and may change."""
        self._copied.wait()

    def results(self) -> list[Written | NotWritten]:
        """Return the results since the last call, without waiting."""
        return [self._results.popleft() for _ in range(len(self._results))]

    def wait(self, seconds: float | None = None) -> bool:
        """Wait, `seconds` at most, and return whether nothing is being written; what failed is retried once more."""
        if self._pending is not None:
            self._awaited.set()
            if not wait([self._pending], seconds).done:
                return False
            self._pending = None
        return True

    def close(self) -> None:
        """Wait until nothing is being written, then end the thread."""
        self.wait()
        self._thread.shutdown()

    def _write(self, contents: Contents, best_step: int | None, begun: float, stall: float) -> None:
        # Sleeping releases the GIL to the training thread, which is about to begin its next step.
        time.sleep(_YIELD_SECONDS)
        try:
            try:
                copies = {name: self._copy(name, value) for name, value in vars(contents).items()}
                contents = replace(contents, **copies)
                end = self._stream.record_event() if self._stream is not None else None
            finally:
                self._copied.set()
            if end is not None:
                # Not the whole device: that is an error while a CUDA graph is recorded. Nor the stream, in which the
                # next update is queued by now: its sums never end if a rank is lost.
                end.synchronize()
            written = self._write_with_retries(contents, begun)
            if written is None:
                return
            file, begun = written
            with _warn_if_not_deleted(f"checkpoints before that of step {contents.step}"):
                prune(self.directory, keep=self.settings.keep, best_step=best_step)
        except Exception as error:
            self._results.append(NotWritten(contents.step, error))
            return
        seconds = time.perf_counter() - begun
        self._results.append(Written(file, stall if self.settings.background else seconds, seconds))

    def _write_with_retries(self, contents: Contents, begun: float) -> tuple[CheckpointFile, float] | None:
        """Write, and retry on failure until someone waits for the writer; None if every attempt has failed.

        Returns also when the attempt began that succeeded, for the first: `begun`.
        """
        pause = _FIRST_PAUSE_SECONDS
        is_last_attempt = not self.settings.background
        failed: NotWritten | None = None
        while True:
            try:
                file = write_checkpoint(self.directory, contents, self.before_publishing)
            except OSError as error:
                if failed is None:
                    failed = NotWritten(contents.step, error, self._write_to_fallback(contents))
                    self._results.append(failed)
                if is_last_attempt:
                    return None
                is_last_attempt = self._awaited.wait(pause)
                pause = min(2 * pause, _LONGEST_PAUSE_SECONDS)
                begun = time.perf_counter()
                continue
            if self._in_fallback is not None:
                with _warn_if_not_deleted("the copy in the fallback directory"):
                    remove_from_fallback(self._in_fallback)
                    self._in_fallback = None
            return file, begun

    def _write_to_fallback(self, contents: Contents) -> Path | None:
        if self.fallback is None:
            return None
        records = records_in(self.fallback)

        def before_publishing() -> None:
            try:
                self.before_publishing()
            except OSError:  # of the run directory, which may be why this one goes elsewhere
                atomic.write_bytes(records, self.waiting_records())

        try:
            self.fallback.mkdir(mode=0o700, parents=True, exist_ok=True)
            refuse_foreign(self.fallback, OTHER_FALLBACK)
            file = write_checkpoint(self.fallback, contents, before_publishing)
        except (OSError, UsageError) as error:
            _logger.warning(
                "the checkpoint of step %d cannot be written to %s either: %s", contents.step, self.fallback, error
            )
            return None
        with _warn_if_not_deleted(f"checkpoints beside that of step {contents.step} in {self.fallback}"):
            remove_others(file)
        self._in_fallback = file.path
        return file.path

    def _copy(self, name: str, value: Any) -> Any:
        """Return `value` with its tensors copied to the CPU, into buffers that are reused for each checkpoint."""
        if isinstance(value, torch.Tensor):
            copy = self._copies.get(name)
            if copy is None or copy.shape != value.shape or copy.dtype != value.dtype:
                copy = torch.empty(value.shape, dtype=value.dtype, pin_memory=value.is_cuda)
                self._copies[name] = copy
            return copy.copy_(value.detach(), non_blocking=True)
        if isinstance(value, Mapping):
            return {key: self._copy(f"{name}.{key}", inner) for key, inner in value.items()}
        if isinstance(value, list | tuple):
            return [self._copy(f"{name}.{index}", inner) for index, inner in enumerate(value)]
        return value


@dataclass(eq=False)
class Saving:
    """Saves checkpoints on the rank that has a `writer`; all ranks of `comm` call `save`, `wait` and `finish`."""

    comm: Communicator
    event: Callable[..., None]
    """Records an event, given its name, step and details."""
    writer: CheckpointWriter | None = None
    note_seconds: Callable[[float], None] = lambda seconds: None
    """Is told how long writing a checkpoint took."""

    def __post_init__(self) -> None:
        self._submitted_step: int | None = None
        """The step of the last checkpoint that the writer was given."""
        self._not_written: NotWritten | None = None

    def save(self, step: int, contents: Callable[[], Contents], best_step: int | None) -> float:
        """Save the state of `step`, unless the writer has it already; return for how many seconds that stalled."""
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
                self.note_seconds(result.seconds)
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
