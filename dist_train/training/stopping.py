"""What ends a run before its last step: signals, the end of the job's time, evaluations that get no better."""

from __future__ import annotations

import math
import signal
from collections.abc import Mapping
from types import FrameType
from typing import Any

from dist_train.checkpoint.state import Progress
from dist_train.cluster.launch import current_job, job_end

_ALWAYS = (signal.SIGTERM, signal.SIGINT, signal.SIGUSR2)


class StopRequests:
    """While the block lasts, SIGTERM, SIGINT and SIGUSR2 are noted instead of ending the process.

    A second SIGINT ends it as usual, for whoever does not want to wait. Where SIGINT is ignored already, as in what a
    script starts in the background, it stays ignored.
    """

    def __init__(self, stop_signal: str = "SIGUSR2") -> None:
        """Take in `stop_signal`, the signal of the site, too."""
        self.reason: str | None = None
        """The signal's name, or what else has asked for the stop."""
        self._signals = {*_ALWAYS, signal.Signals[stop_signal]}
        self._before: dict[int, Any] = {}

    def __enter__(self) -> StopRequests:
        for number in self._signals:
            if number != signal.SIGINT or signal.getsignal(number) != signal.SIG_IGN:
                self._before[number] = signal.signal(number, self._note)
        return self

    def __exit__(self, *_: object) -> None:
        for number, handler in self._before.items():
            signal.signal(number, handler)

    def requested(self) -> bool:
        """Whether this rank was asked to stop."""
        return self.reason is not None

    def request(self, reason: str) -> None:
        """Ask for a stop without a signal."""
        self.reason = self.reason or reason

    def _note(self, number: int, frame: FrameType | None) -> None:
        if number == signal.SIGINT:
            signal.signal(signal.SIGINT, signal.default_int_handler)
        self.reason = signal.Signals(number).name


_TO_END_SECONDS = 15.0
"""For the ranks to leave, and for the batch script to requeue the job."""


class TimeLimit:
    """Learns from the run how long before `end` it must be asked to stop."""

    def __init__(self, end: float | None) -> None:
        self.end = end
        """In seconds since 1970; None where there is no limit."""
        self._last: float | None = None
        self._longest = 0.0
        self._save = 0.0

    def note_saved(self, seconds: float) -> None:
        """Note that a checkpoint took `seconds` from its beginning until it was on disk."""
        self._save = max(self._save, seconds)

    def is_near(self, now: float) -> bool:
        """Note that a step is done, and return whether the run must be asked to stop now, since later is too late.

        All ranks learn of it in the next step, which may be as long as the longest so far, with its evaluation, as
        may the one before the next chance to ask; the checkpoint may take twice its longest time.
        """
        if self.end is None:
            return False
        if self._last is not None:
            self._longest = max(self._longest, now - self._last)
        self._last = now
        return now + 2 * self._longest + 2 * self._save + _TO_END_SECONDS >= self.end


class EarlyStopping:
    """Ends a run whose evaluations have not improved for long: a function of values that all ranks share."""

    def __init__(self, patience: int | None, min_delta: float, metric: str) -> None:
        """Watch `metric`, SPLIT.accuracy or SPLIT.loss; without `patience`, never end a run."""
        self.metric = metric
        self._patience = patience
        self._min_delta = min_delta

    def note(self, progress: Progress, values: Mapping[str, float]) -> None:
        """Take the evaluation that gave `values`, by metric, into `progress`, which a checkpoint holds.

        A value that is not finite is no improvement.
        """
        if self._patience is None:
            return
        value, best = values.get(self.metric, math.nan), progress.stopping_best
        sign = -1.0 if self.metric.endswith(".loss") else 1.0
        if math.isfinite(value) and (best is None or sign * (value - best) > self._min_delta):
            progress.stopping_best, progress.stopping_waited = value, 0
        else:
            progress.stopping_waited = (progress.stopping_waited or 0) + 1

    def reason(self, progress: Progress) -> str:
        """Return why the run ends where `progress` is, before its last step; empty where it continues."""
        waited = progress.stopping_waited or 0
        if self._patience is None or waited < self._patience:
            return ""
        best = "never finite" if progress.stopping_best is None else f"best {progress.stopping_best:.6g}"
        return (
            f"stopped early after step {progress.step}: {self.metric} has not improved in {waited} evaluations "
            f"({best}); raise early_stopping.patience to continue"
        )


def job_time_limit() -> TimeLimit:
    """Return the time limit of the Slurm job that this process belongs to; none outside of Slurm."""
    job = current_job()
    return TimeLimit(None if job is None else job.end or job_end(job.id))
