"""Checkpoints written while training continues.

Weights and the optimizer's state, which nothing touches before the next update (noise lies in a buffer of its
own), are copied on a thread, as is all the rest done; `wait_until_copied` must be called before that update.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Mapping
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass, replace
from pathlib import Path
from threading import Event
from typing import Any

import torch

from dist_train.checkpoint.files import CheckpointFile, Contents, prune, write_checkpoint
from dist_train.config.sections import CheckpointSettings

_YIELD_SECONDS = 0.001


@dataclass(frozen=True)
class Written:
    """A checkpoint that is on disk: `stall_seconds` held up the training, `seconds` it took in all."""

    file: CheckpointFile
    stall_seconds: float
    seconds: float


@dataclass(frozen=True)
class NotWritten:
    """A checkpoint that could not be written, and why."""

    step: int
    error: Exception


class CheckpointWriter:
    """Writes into one directory, one checkpoint at a time."""

    def __init__(self, directory: Path, settings: CheckpointSettings, before_publishing: Callable[[], None]) -> None:
        """Write into `directory`; `before_publishing` runs on the thread, before a checkpoint gets its name."""
        self._directory = directory
        self._settings = settings
        self._before_publishing = before_publishing
        self._copies: dict[str, torch.Tensor] = {}
        # One thread that stays: starting one makes the training wait until it has had its first turn.
        self._thread = ThreadPoolExecutor(max_workers=1, thread_name_prefix="checkpoint-writer")
        self._thread.submit(lambda: None).result()
        self._copied = Event()
        self._copied.set()
        self._pending: Future[Written | NotWritten] | None = None
        self._results: list[Written | NotWritten] = []

    def submit(self, contents: Contents, best_step: int | None) -> None:
        """Write `contents` as they are now, in the background where the settings say so.

        Their tensors must stay as they are until `wait_until_copied` returns.
        """
        begun = time.perf_counter()
        self.wait()
        stall = time.perf_counter() - begun
        self._copied.clear()
        self._pending = self._thread.submit(self._write, contents, best_step, begun, stall)
        if not self._settings.background:
            self.wait()

    def wait_until_copied(self) -> None:
        """Wait until weights and the optimizer's state may change."""
        self._copied.wait()

    def results(self) -> list[Written | NotWritten]:
        """Return what has become of checkpoints since the last call; does not wait."""
        if self._pending is not None and self._pending.done():
            self.wait()
        done, self._results = self._results, []
        return done

    def wait(self) -> None:
        """Wait until nothing is being written."""
        if self._pending is not None:
            self._results.append(self._pending.result())
            self._pending = None

    def close(self) -> None:
        """Wait until nothing is being written, and end the thread."""
        self.wait()
        self._thread.shutdown()

    def _write(self, contents: Contents, best_step: int | None, begun: float, stall: float) -> Written | NotWritten:
        # Sleeping gives the interpreter back to the training, which is about to begin its next step.
        time.sleep(_YIELD_SECONDS)
        try:
            try:
                contents = replace(
                    contents,
                    model=self._copy("model", contents.model),
                    optimizer=self._copy("optimizer", contents.optimizer),
                )
            finally:
                self._copied.set()
            if torch.cuda.is_initialized():
                torch.cuda.synchronize()
            file = write_checkpoint(self._directory, contents, self._before_publishing)
            prune(self._directory, keep=self._settings.keep, best_step=best_step)
        except Exception as error:
            return NotWritten(contents.step, error)
        seconds = time.perf_counter() - begun
        return Written(file, stall if self._settings.background else seconds, seconds)

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
