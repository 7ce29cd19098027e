"""A run as it looks from its directory, at one moment after the other."""

from __future__ import annotations

import os
import socket
import time
from contextlib import suppress
from dataclasses import dataclass
from datetime import UTC, datetime
from pathlib import Path

from dist_train.monitoring import wording
from dist_train.outcome import UsageError
from dist_train.rundir.live_files import RanksReading, read_ranks
from dist_train.rundir.status import Status, read_status
from dist_train.watch.history import Follower, History
from dist_train.watch.run_table import ALIVE, BrokenError, Settings, process_runs, read_settings

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
    """All that is shown of a run. `state` is status.json's, or `lost` or `unknown`; times are in seconds."""

    directory: Path
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
    """Planned; None while it is not known."""
    seconds_left: float | None
    silence: float | None
    """Since the last sign of life; None where there was none."""
    silent: bool
    """Whether that is long for this run."""
    checkpoints: tuple[int, ...]
    """Steps of the checkpoints that are there."""
    problem: str
    """What cannot be read at the moment, and why; else empty."""
    now: float
    """Seconds since 1970."""

    @property
    def name(self) -> str:
        """The directory's own name."""
        return self.directory.resolve().name

    @property
    def is_over(self) -> bool:
        """Whether nothing more is to be expected of this launch."""
        return self.state not in ALIVE | {"unknown"}


def find_run(name: Path) -> Path:
    """Return the directory of the run `name`: a directory, or a folder below runs/. Raises UsageError."""
    for directory in (name, Path("runs") / name):
        if directory.is_dir():
            break
    else:
        raise UsageError(f"there is no run {name}: neither {name} nor {Path('runs') / name} is a folder")
    if not any((directory / mark).exists() for mark in ("status.json", "metrics.jsonl")):
        raise UsageError(
            f"{directory} holds no run: it has no status.json; name a run's own directory "
            f"(`dist-train runs {directory}` lists those below a folder)"
        )
    return directory


class WatchedRun:
    """Looks at a run directory again and again, and reads what is new in it."""

    def __init__(self, directory: Path) -> None:
        self._directory = directory
        self._follower = Follower(directory / "metrics.jsonl")
        self._history = History()
        self._status: Status | None = None
        self._settings = Settings()
        self._ranks: RanksReading | None = None
        self._stamps: dict[str, tuple[int, int, int] | None] = {}
        self._changed_at: float | None = None
        """When a look, but the first, found something new (monotonic)."""

    def look(self, now: float | None = None) -> Snapshot:
        """Return the run as it is at `now` (seconds since 1970; else at this moment)."""
        first = not self._stamps
        problem, news = self._follow()
        if self._has_changed("status.json"):
            news = True
            self._status = read_status(self._directory / "status.json") or self._status
        if self._has_changed("ranks.json"):
            news = True
            self._ranks = read_ranks(self._directory / "ranks.json") or self._ranks
        if self._has_changed("config.yaml"):
            with suppress(BrokenError):
                self._settings = read_settings(self._directory / "config.yaml")
        if news and not first:
            self._changed_at = time.monotonic()
        return self._snapshot(problem, time.time() if now is None else now)

    def _follow(self) -> tuple[str, bool]:
        """Read the new records; return what prevents it, and whether there were any."""
        try:
            news = self._follower.look()
        except OSError as error:
            return f"metrics.jsonl cannot be read: {error.strerror}", False
        if news.anew:
            self._history.clear()
        self._history.take(news.lines)
        return "", bool(news.lines or news.anew)

    def _has_changed(self, name: str) -> bool:
        try:
            state = os.stat(self._directory / name)
        except OSError:
            stamp = None
        else:
            stamp = (state.st_ino, state.st_size, state.st_mtime_ns)
        before, self._stamps[name] = self._stamps.get(name), stamp
        return stamp is not None and stamp != before

    def _snapshot(self, problem: str, now: float) -> Snapshot:
        status, history = self._status, self._history
        silence = self._silence(now)
        state, reason = _state(status, silence, now)
        latest = history.latest[-1].step if history.latest else 0
        step = max(status.step if status else 0, latest)
        total_steps = status.total_steps if status else None
        per_epoch = history.steps_per_epoch
        alive = state in ALIVE
        return Snapshot(
            directory=self._directory,
            state=state,
            reason=reason,
            status=status,
            settings=self._settings,
            history=history,
            ranks=self._ranks if _is_of_this_launch(self._ranks, status) else None,
            step=step,
            total_steps=total_steps,
            epoch=step / per_epoch if per_epoch else (status.epoch if status else 0.0),
            epochs=total_steps / per_epoch if total_steps and per_epoch else None,
            seconds_left=history.seconds_left(total_steps) if alive and total_steps else None,
            silence=silence,
            silent=alive and silence is not None and silence > _patience(history),
            checkpoints=_checkpoints(self._directory / "checkpoints"),
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


def _state(status: Status | None, silence: float | None, now: float) -> tuple[str, str]:
    if status is None:
        return "unknown", "status.json is not there, or not of this version"
    here = status.host == socket.gethostname()
    if status.state in ALIVE and here and silence is not None and silence > _GONE_AFTER:
        seen = datetime.fromtimestamp(now - silence, UTC)
        if not process_runs(status.pid, seen):
            return "lost", f"its process {status.pid} is gone; start it again to resume"
    return status.state, status.reason


def silence_in_words(seconds: float) -> str:
    """Return a length of time as people say it: 12 s, 3 min, 2:05:00."""
    if seconds < 60:
        return f"{seconds:.0f} s"
    return f"{seconds / 60:.0f} min" if seconds < 3_600 else wording.duration(seconds)


def _patience(history: History) -> float:
    gap = history.longest_gap()
    return _SILENT_UNKNOWN if gap is None else max(_SILENT_AFTER, _SILENT_GAPS * gap)


def _is_of_this_launch(ranks: RanksReading | None, status: Status | None) -> bool:
    return ranks is not None and (status is None or ranks.time >= seconds_of(status.started) - 1.0)


def seconds_of(moment: str) -> float:
    """Return a time of `status.json` in seconds since 1970; 0 where it is not one."""
    try:
        return datetime.fromisoformat(moment).timestamp()
    except ValueError:
        return 0.0


def _checkpoints(folder: Path) -> tuple[int, ...]:
    """Return the steps of the checkpoints that are whole, that is: have their record."""
    steps = (path.stem.removeprefix("step-") for path in folder.glob("step-*.json"))
    return tuple(sorted(int(step) for step in steps if step.isdigit()))
