"""What ends a run before its last step: signals, the job's time limit, early stopping."""

from __future__ import annotations

import math
import signal
import threading
from collections.abc import Callable, Mapping
from contextlib import suppress
from functools import partial
from types import FrameType
from typing import Any

from dist_train.checkpoint.state import Progress
from dist_train.cluster.launch import current_job, job_end
from dist_train.config import Config
from dist_train.monitoring.wording import percent
from dist_train.outcome import UsageError, say_on_stderr
from dist_train.start_up import restore_handlers

_ALWAYS = frozenset({signal.SIGTERM, signal.SIGINT, signal.SIGHUP, signal.SIGUSR2})


class StopRequests:
    """Within the block, SIGTERM, SIGINT, SIGHUP and SIGUSR2 request a stop instead of ending the process.

    The first SIGINT, of a person who waits, is answered at once; a second one ends the process as usual. SIGINT and
    SIGHUP stay ignored if they were: SIGINT in background jobs of a shell script, SIGHUP under nohup, unless it is the
    `stop_signal`.
    """

    def __init__(self, stop_signal: str = "SIGUSR2") -> None:
        """`stop_signal`: another signal, by which the site's scheduler requests a stop."""
        self.reason: str | None = None
        """The name of the signal, or the other reason for the stop."""
        self._stop_signal = signal.Signals[stop_signal]
        self._before: dict[int, Any] = {}

    def __enter__(self) -> StopRequests:
        if threading.current_thread() is not threading.main_thread():
            raise UsageError("train() handles signals: call it in the main thread", code="not-the-main-thread")
        ignored = {each for each in (signal.SIGINT, signal.SIGHUP) if signal.getsignal(each) == signal.SIG_IGN}
        for number in _ALWAYS - ignored | {self._stop_signal}:
            self._before[number] = signal.signal(number, self._note)
        return self

    def __exit__(self, *_: object) -> None:
        restore_handlers(self._before)

    def requested(self) -> bool:
        """Whether this rank was asked to stop."""
        return self.reason is not None

    def request(self, reason: str) -> None:
        """Ask for a stop without a signal."""
        self.reason = self.reason or reason

    def _note(self, number: int, frame: FrameType | None) -> None:
        self.reason = signal.Signals(number).name
        if number == signal.SIGINT:
            signal.signal(signal.SIGINT, signal.default_int_handler)
            with suppress(RuntimeError):  # the signal has interrupted a write to the same stream
                say_on_stderr(
                    "dist-train: asked to stop: saves after the present update; Ctrl-C again ends it at once, unsaved"
                )


_EXIT_SECONDS = 15.0
"""Time for the ranks to exit and for the batch script to requeue the job."""
_ASK_SECONDS = 5.0
"""How long Slurm may take to say whether the job's time limit has been extended."""
_SUSPEND_SECONDS = 10.0
"""By how much a suspension of the job may be shorter for its processes than for Slurm."""


class TimeLimit:
    """Decides when a run must stop to be done by `end`, from how long its steps and checkpoints take."""

    def __init__(self, end: float | None, ask_end: Callable[[], float | None] | None = None) -> None:
        """`ask_end` returns the present end, which may have been moved, if known; called when `end` is near."""
        self.end = end
        """In seconds since 1970; None: no limit."""
        self._ask_end = ask_end
        self._last_step_end: float | None = None
        self._longest_steps = (0.0, 0.0)  # of all, and of the others
        self._longest_save = 0.0

    def note_saved(self, seconds: float) -> None:
        """Note that a checkpoint was on disk `seconds` after its beginning."""
        self._longest_save = max(self._longest_save, seconds)

    def take_over(self, other: TimeLimit) -> None:
        """Take over the longest steps that `other` has seen."""
        self._longest_steps = max(self._longest_steps, other._longest_steps)

    def interrupt(self) -> None:
        """Do not count what follows, such as a wait for a rank, towards the length of the step that ends next."""
        self._last_step_end = None

    def check(self, now: float, uptime: float) -> bool:
        """Note the end of a step, and return whether the run must be asked to stop now; may ask Slurm for the end.

        `now`: seconds since 1970; `uptime`: seconds of a clock that is never set. Ranks learn of a request in the
        next step, and this is next called a step later: hence room for two steps, each as long as the longest so far,
        its evaluation included. A checkpoint gets twice its longest time.
        """
        if self._last_step_end is not None:
            longest, second = self._longest_steps
            step = uptime - self._last_step_end
            self._longest_steps = max(longest, step), max(second, min(longest, step))
        self._last_step_end = uptime
        if self.end is None:
            return False
        if self._is_near(now, self.end) and self._ask_end:
            latest = self._ask_end()
            if latest is None or latest <= self.end:
                self._ask_end = None  # the run stops: there is no time to ask at each step
            else:
                longest, second = self._longest_steps
                rest = longest - (latest - self.end) + _SUSPEND_SECONDS
                if rest > 0:  # the longest step may contain a suspension, by which Slurm has moved the limit
                    self._longest_steps = max(rest, second), second
                self.end = latest
        return self._is_near(now, self.end)

    def _is_near(self, now: float, end: float) -> bool:
        needed = 2 * self._longest_steps[0] + 2 * self._longest_save + _ASK_SECONDS + _EXIT_SECONDS
        return now + needed >= end


def note_evaluation(config: Config, progress: Progress, values: Mapping[str, float]) -> None:
    """Update `progress`, which checkpoints hold, for early stopping by an evaluation: its `values` by metric.

    Ranks agree when to stop, since they share these. No value counts as an improvement if the loss on its split is not
    finite: the accuracy is then that of guessing.
    """
    settings, metric = config.early_stopping, config.stopping_metric
    if settings.patience is None:
        return
    value, best = values.get(metric, math.nan), progress.stopping_best
    loss = values.get(f"{metric.partition('.')[0]}.loss", value)
    sign = -1.0 if metric.endswith(".loss") else 1.0
    is_better = best is None or sign * (value - best) > settings.min_delta
    if math.isfinite(value) and math.isfinite(loss) and is_better:
        progress.stopping_best, progress.stopping_waited = value, 0
    else:
        progress.stopping_waited = (progress.stopping_waited or 0) + 1


def why_stop_early(config: Config, progress: Progress) -> str:
    """Return why early stopping ends the run at `progress`, before its last step; empty if it continues."""
    patience, metric, waited = config.early_stopping.patience, config.stopping_metric, progress.stopping_waited or 0
    if patience is None or waited < patience:
        return ""
    best = "never finite"
    if (value := progress.stopping_best) is not None:
        best = f"best {percent(value) if metric.endswith('.accuracy') else f'{value:.6g}'}"
    return (
        f"stopped early after step {progress.step}: {metric} has not improved in {waited} evaluations "
        f"({best}); raise early_stopping.patience to continue"
    )


def job_time_limit() -> TimeLimit:
    """Return the time limit of this process's Slurm job; no limit outside Slurm."""
    job = current_job()
    if job is None:
        return TimeLimit(None)
    # The environment keeps the end that the job was started with.
    return TimeLimit(job.end or job_end(job.name), partial(job_end, job.name, _ASK_SECONDS))
