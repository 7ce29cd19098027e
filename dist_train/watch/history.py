"""The records of a run that another process writes: followed as the file grows, added up in bounded memory."""

from __future__ import annotations

import math
import os
from collections import deque
from collections.abc import Iterable, Sequence
from dataclasses import astuple, dataclass
from itertools import pairwise
from pathlib import Path

from dist_train.monitoring.wording import Pace
from dist_train.rundir.atomic import open_regular
from dist_train.rundir.records import EvaluationRecord, EventRecord, Record, TrainRecord, from_json

_REMEMBERED = 256


@dataclass(frozen=True)
class News:
    """Whole lines since the last look, without their ends; `anew` where all that was read before is void."""

    lines: tuple[bytes, ...] = ()
    anew: bool = False


class Follower:
    """Reads `path` from where the last look ended; a torn last line waits until it is whole.

    A file that is another one now, has become shorter, or holds other bytes where the last look ended, is read anew.
    """

    def __init__(self, path: Path) -> None:
        self._path = path
        self._file: tuple[int, int] | None = None
        self._offset = 0
        self._before = b""
        """The last bytes before `_offset`, to tell this file from another one."""

    def look(self) -> News:
        """Return what is new. Raises OSError where the file is there but cannot be read."""
        try:
            with open_regular(self._path) as file:
                state = os.fstat(file.fileno())
                identity = (state.st_dev, state.st_ino)
                before = os.pread(file.fileno(), len(self._before), self._offset - len(self._before))
                known = (identity, self._before) if state.st_size >= self._offset else None
                anew = self._file is not None and known != (self._file, before)
                if anew:
                    self._forget()
                self._file = identity
                file.seek(self._offset)
                content = file.read()
        except FileNotFoundError:
            had_something = self._offset > 0
            self._forget()
            return News(anew=had_something)
        whole = content[: content.rfind(b"\n") + 1]
        self._offset += len(whole)
        self._before = (self._before + whole[-_REMEMBERED:])[-_REMEMBERED:]
        return News(tuple(whole.split(b"\n")[:-1]), anew)

    def _forget(self) -> None:
        self._file, self._offset, self._before = None, 0, b""


_MOST_POINTS = 2_048
_PARSED_AT_ONCE = 8_192
"""Of more lines than these at once, every so many training records, and the latest, are read: a curve needs no more."""
_LATEST = 60
_EVENTS = 50
_TRAIN_MARK = b'{"kind": "train"'


@dataclass(frozen=True)
class Point:
    """Means over one training record or several successive ones; NaN where one of them is not finite."""

    step: float
    loss: float
    accuracy: float
    epoch: float = math.nan


class ThinnedCurve:
    """A curve of at most `most` points: once there are twice as many, each two become one."""

    def __init__(self, most: int = _MOST_POINTS) -> None:
        self._most = most
        self._size = 1
        self._points: list[Point] = []
        self._open: list[Point] = []

    def append(self, point: Point) -> None:
        """Add a point at the end."""
        self._open.append(point)
        if len(self._open) == self._size:
            self._points.append(_mean(self._open))
            self._open.clear()
        if len(self._points) >= 2 * self._most:
            self._points = [_mean(self._points[at : at + 2]) for at in range(0, len(self._points), 2)]
            self._size *= 2

    def points(self) -> list[Point]:
        """Return the points in order."""
        return [*self._points, _mean(self._open)] if self._open else list(self._points)


class History:
    """The records so far: curves, the latest training records of this launch, events."""

    def __init__(self) -> None:
        self.clear()

    def clear(self) -> None:
        """Forget everything: the file has been rewound or replaced."""
        self.batches = ThinnedCurve()
        self.evaluations: dict[str, list[EvaluationRecord]] = {}
        self.latest: deque[TrainRecord] = deque(maxlen=_LATEST)
        self.events: deque[EventRecord] = deque(maxlen=_EVENTS)
        self.checkpoints: deque[EventRecord] = deque(maxlen=_EVENTS)
        self.steps_per_epoch: float | None = None
        self.moments: deque[float] = deque(maxlen=_LATEST)
        """When the latest records of this launch were made, in seconds since 1970."""

    def take(self, lines: Sequence[bytes]) -> None:
        """Take in lines of `metrics.jsonl`; those that are torn or not understood are passed over."""
        stride = max(1, math.ceil(len(lines) / _PARSED_AT_ONCE))
        latest = len(lines) - 2 * _LATEST
        for at, line in enumerate(lines):
            is_read = at % stride == 0 or at >= latest or not line.startswith(_TRAIN_MARK)
            if is_read and (record := from_json(line)) is not None:
                self._add(record)

    def evaluated(self, split: str) -> EvaluationRecord | None:
        """Return the latest evaluation of `split`."""
        return next(reversed(self.evaluations.get(split, [])), None)

    def best_accuracy(self) -> float | None:
        """Return the highest accuracy on the test split."""
        accuracies = [record.accuracy for record in self.evaluations.get("test", ())]
        return max(filter(math.isfinite, accuracies), default=None)

    def longest_gap(self) -> float | None:
        """Return the longest time between two of the latest records, in seconds; None for fewer than three."""
        if len(self.moments) < 3:
            return None
        return max(later - earlier for earlier, later in pairwise(self.moments))

    def _add(self, record: Record) -> None:
        if not isinstance(record, EventRecord) and record.step and record.epoch > 0:
            self.steps_per_epoch = record.step / record.epoch
        match record:
            case TrainRecord():
                self.batches.append(Point(record.step, record.loss, record.accuracy, record.epoch))
                self.latest.append(record)
            case EvaluationRecord():
                self.evaluations.setdefault(record.split, []).append(record)
            case EventRecord(event="checkpoint"):
                self.checkpoints.append(record)
            case EventRecord():
                self.events.append(record)
                if record.event == "resumed":
                    # the time between two launches says nothing about the pace of either
                    self.latest.clear()
                    self.moments.clear()
        self.moments.append(record.time)


def seconds_left(latest: Iterable[TrainRecord], total_steps: int) -> float | None:
    """Return the time up to `total_steps` at the pace of the latest records; None while it is not known."""
    pace = Pace()
    for record in latest:
        pace.mark(record.step, record.time)
    return pace.seconds_left(total_steps)


def _mean(points: Sequence[Point]) -> Point:
    return Point(*(sum(values) / len(points) for values in zip(*map(astuple, points), strict=True)))
