"""A run followed through its directory: successive snapshots, and its records read as the file grows."""

from __future__ import annotations

import os
import time
from collections import deque
from collections.abc import Sequence
from contextlib import suppress
from dataclasses import dataclass
from functools import reduce
from itertools import pairwise
from pathlib import Path

from dist_train.outcome import UsageError
from dist_train.rundir.atomic import exists, open_regular
from dist_train.rundir.metrics_file import TRAIN_LINE, from_json
from dist_train.rundir.paths import BrokenFileError, RunDirectory, run_folder
from dist_train.rundir.records import EvaluationRecord, EventRecord, Record, TrainRecord, better
from dist_train.rundir.status import RanksReading, Status, read_ranks, read_settings, read_status
from dist_train.watch.run_state import ALIVE, has_gone, process_is_gone, seconds_of
from dist_train.watch.run_table import Settings, seconds_left

_REMEMBERED = 256


@dataclass(frozen=True)
class News:
    """Complete lines since the last look, without line ends; if `rewound`, everything read before is void."""

    lines: tuple[bytes, ...] = ()
    rewound: bool = False


_READ_AT_ONCE = 4 << 20  # bytes


class Follower:
    """Reads `path` from where the last look ended; an incomplete last line is left for the next look.

    A look at a long file returns a part of its lines, the next looks return the others. A file that was replaced, has
    become shorter, or has other bytes before that position is read from its start.
    """

    def __init__(self, path: Path) -> None:
        self._path = path
        self._reset()

    def _reset(self) -> None:
        self._file: tuple[int, int] | None = None
        self._offset = 0
        self._before = b""  # the last bytes before `_offset`, by which a replaced file is recognized

    def look(self) -> News:
        """Return the new lines. Raises OSError if the file exists but cannot be read."""
        try:
            with open_regular(self._path) as file:
                state = os.fstat(file.fileno())
                identity = (state.st_dev, state.st_ino)
                before = os.pread(file.fileno(), len(self._before), self._offset - len(self._before))
                is_same = identity == self._file and state.st_size >= self._offset and before == self._before
                rewound = self._file is not None and not is_same
                if rewound:
                    self._reset()
                self._file = identity
                file.seek(self._offset)
                content = file.read(_READ_AT_ONCE) + file.readline()
        except FileNotFoundError:
            was_read = self._offset > 0
            self._reset()
            return News(rewound=was_read)
        whole = content[: content.rfind(b"\n") + 1]
        self._offset += len(whole)
        self._before = (self._before + whole[-_REMEMBERED:])[-_REMEMBERED:]
        return News(tuple(whole.split(b"\n")[:-1]), rewound)


_MOST_POINTS = 2_048
_LATEST = 60
_EVENTS = 50


class History:
    """The records so far: curves, the latest training records of the current launch, events."""

    def __init__(self) -> None:
        self.train: list[TrainRecord] = []
        """Each `_stride`-th training record, at most 2 * _MOST_POINTS of them: curves need no more."""
        self._stride, self._count = 1, 0
        self.evaluations: dict[str, list[EvaluationRecord]] = {}
        self.latest: deque[TrainRecord] = deque(maxlen=_LATEST)
        self.events: deque[EventRecord] = deque(maxlen=_EVENTS)
        self.checkpoint: EventRecord | None = None  # the latest
        self.moments: deque[float] = deque(maxlen=_LATEST)
        """Times of the latest records of the current launch, in seconds since 1970."""

    def take(self, lines: Sequence[bytes]) -> None:
        """Add lines of `metrics.jsonl`; of many training records only the latest and some others are parsed.

        Incomplete or unknown ones are skipped.
        """
        latest = len(lines) - 2 * _LATEST
        for at, line in enumerate(lines):
            is_train = line.startswith(TRAIN_LINE)
            self._count += is_train
            is_kept = self._count % self._stride == 0
            if (is_kept or at >= latest or not is_train) and (record := from_json(line)) is not None:
                self._add(record, is_kept)

    def evaluated(self, split: str) -> EvaluationRecord | None:
        """Return the latest evaluation of `split`."""
        return next(reversed(self.evaluations.get(split, [])), None)

    def best_accuracy(self) -> float | None:
        """Return the highest accuracy on the test split."""
        return reduce(better, self.evaluations.get("test", ()), None)

    def longest_gap(self) -> float | None:
        """Return the longest time between successive latest records, in seconds; None for fewer than three records."""
        if len(self.moments) < 3:
            return None
        return max(later - earlier for earlier, later in pairwise(self.moments))

    def _add(self, record: Record, is_kept: bool) -> None:
        match record:
            case TrainRecord():
                self.latest.append(record)
                self.train += [record] if is_kept else []
                if len(self.train) >= 2 * _MOST_POINTS:
                    del self.train[::2]
                    self._stride *= 2
            case EvaluationRecord():
                self.evaluations.setdefault(record.split, []).append(record)
            case EventRecord(event="checkpoint"):
                self.checkpoint = record
            case EventRecord():
                self.events.append(record)
                if record.event == "resumed":
                    # The time between two launches says nothing about the pace of either.
                    self.latest.clear()
                    self.moments.clear()
        self.moments.append(record.time)


_SILENT_AFTER = 60.0  # silence shorter than this, in seconds, is never reported, however fast the run is
_SILENT_GAPS = 5.0  # a run is silent after this many times the longest recent gap between records
_SILENT_UNKNOWN = 180.0  # seconds of silence that are reported for a run whose pace is not known yet
_MOST_MISSES = 5  # looks without the run's directory after which the run is lost: it may come back before


@dataclass(frozen=True)
class Snapshot:
    """Everything the view shows of a run. `state` is status.json's, or `lost` or `unknown`; times are in seconds.

    None means not known yet. `silence` is the time since the last activity, and `silent` whether that is long for
    this run. `checkpoints` are the steps of the existing ones. `problem` says what cannot be read now, and why. `now`
    is in seconds since 1970.
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
    total_epochs: float | None
    seconds_left: float | None
    silence: float | None
    silent: bool
    checkpoints: tuple[int, ...]
    problem: str
    now: float

    @property
    def name(self) -> str:
        """The directory's name."""
        return self.run.root.resolve().name

    @property
    def is_over(self) -> bool:
        """Whether this launch has ended."""
        return self.state not in ALIVE | {"unknown"}


def find_run(name: Path) -> Path:
    """Return the directory of the run `name`: that directory, or runs/`name`. Raises UsageError if there is none."""
    root = run_folder(name)
    run = RunDirectory(root)
    if not run.status.exists() and not run.metrics.exists():
        raise UsageError(
            f"{root} is not a run directory: it has no {run.status.name}; name a run's directory "
            f"(`dist-train runs {root}` lists the runs below it)",
            code="no-run-here",
        )
    return root


class WatchedRun:
    """Reads a run directory repeatedly; of its records each time only the new ones."""

    def __init__(self, directory: Path) -> None:
        self._run = RunDirectory(directory)
        self._follower = Follower(self._run.metrics)
        self._history = History()
        self._status: Status | None = None
        self._settings = Settings()
        self._ranks: RanksReading | None = None
        self._checkpoints: tuple[int, ...] = ()
        self._is_known = False  # whether a look has found the directory
        self._misses = 0  # successive looks that have not found it
        self._first_look = time.monotonic()
        self._changed_at: float | None = None  # when a look other than the first last found something new (monotonic)

    def look(self, now: float | None = None) -> Snapshot:
        """Return a snapshot of the run at `now` (seconds since 1970; default: the current time).

        If the directory is gone, everything stays as it was; after a few such looks the run is lost.
        """
        now = time.time() if now is None else now
        is_gone = False
        with suppress(OSError):  # of a file server, which may pass
            is_gone = not exists(self._run.root)
        self._misses = self._misses + 1 if is_gone else 0
        if self._misses:
            return self._snapshot("the run's directory is gone", now)
        problem, is_changed = self._follow()
        before = self._status, self._ranks and self._ranks.time
        self._status = read_status(self._run.status) or self._status
        self._ranks = read_ranks(self._run.ranks) or self._ranks
        is_changed |= before != (self._status, self._ranks and self._ranks.time)
        with suppress(BrokenFileError):
            if settings := read_settings(self._run.config):
                self._settings = Settings.of(settings)
        try:
            self._checkpoints = self._run.checkpoint_steps()
        except OSError as error:
            problem = problem or f"{self._run.checkpoints.name} cannot be read: {error.strerror}"
        if is_changed and self._is_known:
            self._changed_at = time.monotonic()
        self._is_known = True
        return self._snapshot(problem, now)

    def _follow(self) -> tuple[str, bool]:
        """Read the new records; return the problem in reading them, and whether there were any."""
        is_changed = False
        try:
            while (news := self._follower.look()) != News():
                is_changed = True
                if news.rewound:
                    self._history = History()
                self._history.take(news.lines)
        except OSError as error:
            return f"{self._run.metrics.name} cannot be read: {error.strerror}", is_changed
        return "", is_changed

    def _snapshot(self, problem: str, now: float) -> Snapshot:
        status, history, ranks = self._status, self._history, self._ranks
        silence = self._silence(now)
        is_lost = self._misses >= _MOST_MISSES
        state, reason = ("lost", problem) if is_lost else _state(self._run, status, silence, now)
        places = [(status.step, status.epoch)] if status else []
        places += [(record.step, record.epoch) for record in (*history.latest,)[-1:]]
        step, epoch = max(places, default=(0, 0.0))
        total_epochs = status.total_epochs if status else None
        alive = state in ALIVE
        gap = history.longest_gap()
        patience = _SILENT_UNKNOWN if gap is None else max(_SILENT_AFTER, _SILENT_GAPS * gap)
        are_current = ranks and (status is None or ranks.time >= seconds_of(status.started) - 1.0)
        return Snapshot(
            run=self._run,
            state=state,
            reason=reason,
            status=status,
            settings=self._settings,
            history=history,
            ranks=ranks if are_current else None,
            step=step,
            total_steps=status.total_steps if status else None,
            epoch=epoch,
            total_epochs=total_epochs,
            seconds_left=seconds_left(history.latest, total_epochs) if alive and total_epochs else None,
            silence=silence,
            silent=alive and silence is not None and silence > patience,
            checkpoints=self._checkpoints,
            problem=problem,
            now=now,
        )

    def _silence(self, now: float) -> float | None:
        """Return the time since the last activity; a change that was seen counts, since clocks may differ."""
        if self._changed_at is not None:
            return time.monotonic() - self._changed_at
        signs = [self._history.moments[-1]] if self._history.moments else []
        if self._status is not None:
            signs.append(seconds_of(self._status.updated))
        return max(now - max(signs), time.monotonic() - self._first_look) if signs else None


def _state(run: RunDirectory, status: Status | None, silence: float | None, now: float) -> tuple[str, str]:
    if status is None:
        return "unknown", f"{run.status.name} is missing or of another version"
    if status.state in ALIVE and has_gone(status, now - (silence or 0.0), now):
        with suppress(OSError):  # `look` reports it
            return process_is_gone(status, run)
    return status.state, status.reason
