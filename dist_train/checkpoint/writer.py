"""Checkpoints written while training continues.

Weights and the optimizer's state, which nothing touches before the next update (noise lies in a buffer of its
own), are copied on a thread, as is all the rest done; `wait_until_copied` must be called before that update.
"""

from __future__ import annotations

import logging
import time
from collections.abc import Callable, Mapping
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import suppress
from dataclasses import dataclass, replace
from pathlib import Path
from queue import Empty, SimpleQueue
from threading import Event
from typing import Any

import torch

from dist_train.checkpoint.files import CheckpointFile, Contents, prune, remove_checkpoint, write_checkpoint
from dist_train.config.sections import CheckpointSettings

_YIELD_SECONDS = 0.001
_FIRST_PAUSE_SECONDS = 1.0
_LONGEST_PAUSE_SECONDS = 60.0
_logger = logging.getLogger("dist_train.checkpoints")


@dataclass(frozen=True)
class Written:
    """A checkpoint that is on disk: `stall_seconds` held up the training, `seconds` it took in all."""

    file: CheckpointFile
    stall_seconds: float
    seconds: float


@dataclass(frozen=True)
class NotWritten:
    """A checkpoint that the run directory's disk refused, and why; `fallback` is where it lies instead, if anywhere.

    It is tried again, with growing pauses, until the next one is there: a `Written` of the same step may follow.
    """

    step: int
    error: Exception
    fallback: Path | None = None


class CheckpointWriter:
    """Writes into one directory, one checkpoint at a time."""

    def __init__(
        self,
        directory: Path,
        settings: CheckpointSettings,
        before_publishing: Callable[[], None],
        fallback: Path | None = None,
    ) -> None:
        """Write into `directory`, into `fallback` what its disk refuses.

        `before_publishing` runs on the thread, before a checkpoint gets its name.
        """
        self._directory = directory
        self._fallback = fallback
        self._settings = settings
        self._before_publishing = before_publishing
        self._copies: dict[str, torch.Tensor] = {}
        # One thread that stays: starting one makes the training wait until it has had its first turn.
        self._thread = ThreadPoolExecutor(max_workers=1, thread_name_prefix="checkpoint-writer")
        self._thread.submit(lambda: None).result()
        self._copied = Event()
        self._copied.set()
        self._pending: Future[None] | None = None
        self._results: SimpleQueue[Written | NotWritten] = SimpleQueue()
        # Ends the pauses between tries: another checkpoint waits, or everybody does.
        self._awaited = Event()

    def submit(self, contents: Contents, best_step: int | None) -> None:
        """Write `contents` as they are now, in the background where the settings say so.

        Their tensors must stay as they are until `wait_until_copied` returns.
        """
        begun = time.perf_counter()
        self.wait()
        stall = time.perf_counter() - begun
        self._copied.clear()
        self._awaited.clear()
        self._pending = self._thread.submit(self._write, contents, best_step, begun, stall)
        if not self._settings.background:
            self.wait()

    def wait_until_copied(self) -> None:
        """Wait until weights and the optimizer's state may change."""
        self._copied.wait()

    def results(self) -> list[Written | NotWritten]:
        """Return what has become of checkpoints since the last call; does not wait."""
        done = []
        with suppress(Empty):
            while True:
                done.append(self._results.get_nowait())
        return done

    def wait(self) -> None:
        """Wait until nothing is being written; what was refused is tried once more."""
        if self._pending is not None:
            self._awaited.set()
            self._pending.result()
            self._pending = None

    def close(self) -> None:
        """Wait until nothing is being written, and end the thread."""
        self.wait()
        self._thread.shutdown()

    def _write(self, contents: Contents, best_step: int | None, begun: float, stall: float) -> None:
        # Sleeping gives the interpreter back to the training, which is about to begin its next step.
        time.sleep(_YIELD_SECONDS)
        try:
            try:
                contents = replace(
                    contents,
                    model=self._copy("model", contents.model),
                    optimizer=self._copy("optimizer", contents.optimizer),
                    average=self._copy("average", contents.average),
                    noise=self._copy("noise", contents.noise),
                )
            finally:
                self._copied.set()
            if torch.cuda.is_initialized():
                torch.cuda.synchronize()
            file = self._try_to_write(contents)
            if file is None:
                return
            prune(self._directory, keep=self._settings.keep, best_step=best_step)
        except Exception as error:
            self._results.put(NotWritten(contents.step, error))
            return
        seconds = time.perf_counter() - begun
        self._results.put(Written(file, stall if self._settings.background else seconds, seconds))

    def _try_to_write(self, contents: Contents) -> CheckpointFile | None:
        """Write; on a disk that refuses again and again, until somebody waits. None where it has refused to the end."""
        pause = _FIRST_PAUSE_SECONDS
        is_last = not self._settings.background
        refused: NotWritten | None = None
        while True:
            try:
                file = write_checkpoint(self._directory, contents, self._before_publishing)
            except OSError as error:
                if refused is None:
                    refused = NotWritten(contents.step, error, self._write_to_fallback(contents))
                    self._results.put(refused)
                if is_last:
                    return None
                is_last = self._awaited.wait(pause)
                pause = min(2 * pause, _LONGEST_PAUSE_SECONDS)
                continue
            if refused is not None and refused.fallback is not None:
                remove_checkpoint(refused.fallback)
            return file

    def _write_to_fallback(self, contents: Contents) -> Path | None:
        if self._fallback is None:
            return None
        try:
            self._fallback.mkdir(mode=0o700, parents=True, exist_ok=True)
            file = write_checkpoint(self._fallback, contents, self._before_publishing)
            prune(self._fallback, keep=1, best_step=None)
        except OSError as error:
            _logger.warning(
                "the checkpoint of step %d cannot be written to %s either: %s", contents.step, self._fallback, error
            )
            return None
        return file.path

    def _copy(self, name: str, value: Any) -> Any:
        """Return `value` with its tensors copied to the CPU, into buffers that are used again each time."""
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
