"""A run as it looks from its directory, at one moment after the other."""

from __future__ import annotations

import socket
import time
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path

from dist_train.monitoring import wording
from dist_train.outcome import UsageError
from dist_train.rundir.paths import BrokenFileError, RunDirectory
from dist_train.rundir.status import RanksReading, Status, read_ranks, read_status
from dist_train.watch.history import Follower, History, seconds_left
from dist_train.watch.run_table import ALIVE, Settings, process_is_gone, process_runs, read_settings, seconds_of

_SILENT_AFTER = 60.0
"""Seconds without a sign of life that are worth no word, however fast the run is."""
_SILENT_GAPS = 5.0
"""Silence is long when it is so many times the longest of the latest gaps between records."""
_SILENT_UNKNOWN = 180.0
"""Seconds of silence that are long for a run that has not shown its pace yet."""
_GONE_AFTER = 10.0
"""A process that this host does not know may run in a container: only one that is silent too is gone."""


@dataclass(frozen=True)
class Snapshot:
    """All that is shown of a run. `state` is status.json's, or `lost` or `unknown`; times are in seconds.

    None stands for what is not known yet. `silence` is the time since the last sign of life, `silent` whether that is
    long for this run, `checkpoints` the steps of those that are there. `problem` says what cannot be read at the
    moment, and why. `now` is in seconds since 1970.
    """

    run: RunDirectory
    state: str
    reason: str
    status: Status | None
    settings: Settings
    history: History
    ranks: RanksReading | None
    step: int
    total_steps: int | None
    epoch: float
    epochs: float | None
    seconds_left: float | None
    silence: float | None
    silent: bool
    checkpoints: tuple[int, ...]
    problem: str
    now: float

    @property
    def name(self) -> str:
        """The directory's own name."""
        return self.run.root.resolve().name

    @property
    def is_over(self) -> bool:
        """Whether nothing more is to be expected of this launch."""
        return self.state not in ALIVE | {"unknown"}


def find_run(name: Path) -> Path:
    """Return the directory of the run `name`: a directory, or a folder below runs/. Raises UsageError."""
    below = Path("runs") / name
    root = next((folder for folder in (name, below) if folder.is_dir()), None)
    if root is None:
        raise UsageError(f"there is no run {name}: neither {name} nor {below} is a folder", code="run-missing")
    run = RunDirectory(root)
    if not run.status.exists() and not run.metrics.exists():
        raise UsageError(
            f"{root} holds no run: it has no {run.status.name}; name a run's own directory "
            f"(`dist-train runs {root}` lists those below a folder)",
            code="no-run-here",
        )
    return root


class WatchedRun:
    """Looks at a run directory again and again, and reads what is new in it."""

    def __init__(self, directory: Path) -> None:
        self._run = RunDirectory(directory)
        self._follower = Follower(self._run.metrics)
        self._history = History()
        self._status: Status | None = None
        self._settings = Settings()
        self._planned_epochs: float | None = None
        """Where the batch changes along the way, so that updates do not tell them."""
        self._ranks: RanksReading | None = None
        self._stamps: dict[Path, tuple[int, int, int] | None] = {}
        self._changed_at: float | None = None
        """When a look, but the first, found something new (monotonic)."""

    def look(self, now: float | None = None) -> Snapshot:
        """Return the run as it is at `now` (seconds since 1970; else at this moment)."""
        first = not self._stamps
        problem, news = self._follow()
        if self._has_changed(self._run.status):
            news = True
            self._status = read_status(self._run.status) or self._status
        if self._has_changed(self._run.ranks):
            news = True
            self._ranks = read_ranks(self._run.ranks) or self._ranks
        if self._has_changed(self._run.config):
            with suppress(BrokenFileError):
                settings = read_settings(self._run.config)
                self._settings = Settings.of(settings)
                epochs = settings.get("run.epochs") if settings.get("batch.schedule") else None
                self._planned_epochs = epochs if isinstance(epochs, int) else None
        if news and not first:
            self._changed_at = time.monotonic()
        return self._snapshot(problem, time.time() if now is None else now)

    def _follow(self) -> tuple[str, bool]:
        """Read the new records; return what prevents it, and whether there were any."""
        try:
            news = self._follower.look()
        except OSError as error:
            return f"{self._run.metrics.name} cannot be read: {error.strerror}", False
        if news.anew:
            self._history.clear()
        self._history.take(news.lines)
        return "", bool(news.lines or news.anew)

    def _has_changed(self, path: Path) -> bool:
        stamp = None
        with suppress(OSError):
            state = path.stat()
            stamp = (state.st_ino, state.st_size, state.st_mtime_ns)
        before, self._stamps[path] = self._stamps.get(path), stamp
        return stamp is not None and stamp != before

    def _snapshot(self, problem: str, now: float) -> Snapshot:
        status, history, ranks = self._status, self._history, self._ranks
        silence = self._silence(now)
        state, reason = _state(self._run, status, silence, now)
        total_steps, per_epoch = status.total_steps if status else None, history.steps_per_epoch
        step = max(status.step if status else 0, history.latest[-1].step if history.latest else 0)
        alive = state in ALIVE
        gap = history.longest_gap()
        patience = _SILENT_UNKNOWN if gap is None else max(_SILENT_AFTER, _SILENT_GAPS * gap)
        of_this_launch = ranks and (status is None or ranks.time >= seconds_of(status.started) - 1.0)
        return Snapshot(
            run=self._run,
            state=state,
            reason=reason,
            status=status,
            settings=self._settings,
            history=history,
            ranks=ranks if of_this_launch else None,
            step=step,
            total_steps=total_steps,
            epoch=step / per_epoch if per_epoch else (status.epoch if status else 0.0),
            epochs=self._planned_epochs or (total_steps / per_epoch if total_steps and per_epoch else None),
            seconds_left=seconds_left(history.latest, total_steps) if alive and total_steps else None,
            silence=silence,
            silent=alive and silence is not None and silence > patience,
            checkpoints=self._run.checkpoint_steps(),
            problem=problem,
            now=now,
        )

    def _silence(self, now: float) -> float | None:
        """Return the time since the run was last heard of.

        Clocks of two machines may differ: what this process saw change counts, where that is later.
        """
        signs = [self._history.moments[-1]] if self._history.moments else []
        if self._status is not None:
            signs.append(seconds_of(self._status.updated))
        if not signs:
            return None
        silence = max(0.0, now - max(signs))
        return silence if self._changed_at is None else min(silence, time.monotonic() - self._changed_at)


def _state(run: RunDirectory, status: Status | None, silence: float | None, now: float) -> tuple[str, str]:
    if status is None:
        return "unknown", f"{run.status.name} is not there, or not of this version"
    is_here = status.state in ALIVE and status.host == socket.gethostname()
    is_silent = silence is not None and silence > _GONE_AFTER
    if is_here and is_silent and not process_runs(status.pid, now - (silence or 0.0)):
        return process_is_gone(status)
    return status.state, status.reason


def silence_in_words(seconds: float) -> str:
    """Return a length of time as people say it: 12 s, 3 min, 2:05:00."""
    if seconds < 60:
        return f"{seconds:.0f} s"
    return f"{seconds / 60:.0f} min" if seconds < 3_600 else wording.duration(seconds)
