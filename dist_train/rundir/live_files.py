"""`events.json` and `ranks.json`: counts of events, and the latest step on every rank, rewritten as a run proceeds."""

from __future__ import annotations

import json
import logging
import math
import time
from collections import Counter
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated

from pydantic import Field, TypeAdapter, ValidationError

from dist_train.rundir.atomic import RewrittenFile, json_text, read_regular
from dist_train.rundir.records import EventRecord, Measurement, Observer, Outcome, RankMeasurement, Record

_logger = logging.getLogger(__name__)


class EventCounts(Observer):
    """Counts every event record into `path`, on top of what it holds; a resume does not rewind it."""

    def __init__(self, path: Path) -> None:
        """Read what is there; a broken file is reported, and the counts begin anew."""
        self._file = RewrittenFile(path)
        try:
            self._counts = Counter(read_counts(path))
        except (OSError, ValueError) as error:
            _logger.warning("%s cannot be used, the counts of events begin anew: %s", path, error)
            self._counts = Counter()
            self._write()

    def record(self, record: Record) -> None:
        """Count an event, in memory and in the file."""
        if isinstance(record, EventRecord):
            self._counts[record.event] += 1
            self._write()

    def end(self, outcome: Outcome) -> None:
        """Try once more to write what the disk refused."""
        if self._file.is_refused:
            self._write()

    def _write(self) -> None:
        self._file.write(json.dumps(dict(sorted(self._counts.items())), indent=2) + "\n")


def read_counts(path: Path) -> Mapping[str, int]:
    """Return the counts in `path`, none where it is not there. Raises OSError or ValueError where it is broken."""
    try:
        content = read_regular(path)
    except FileNotFoundError:
        return {}
    try:
        return _COUNTS.validate_json(content)
    except ValidationError as error:
        raise ValueError(f"it does not hold counts of events: {error.errors()[0]['msg']}") from error


_PACE_SECONDS = 1.0


@dataclass(frozen=True)
class RanksReading:
    """What `ranks.json` holds: `ranks` by rank, as they were at `step`; `time` in seconds since 1970."""

    step: int
    time: float
    ranks: tuple[RankMeasurement, ...]


class RanksFile(Observer):
    """An observer that rewrites the file at a measurement, at most once a second, and at the end."""

    def __init__(self, path: Path) -> None:
        self._file = RewrittenFile(path)
        self._due = -math.inf
        self._pending: Measurement | None = None

    def measurement(self, measurement: Measurement) -> None:
        """Write `measurement` down, where the last one was written long enough ago."""
        self._pending = measurement
        if time.monotonic() >= self._due:
            self._write()

    def end(self, outcome: Outcome) -> None:
        """Write the last measurement, unless it is there."""
        self._write()

    def _write(self) -> None:
        if self._pending is None:
            return
        self._due = time.monotonic() + _PACE_SECONDS
        ranks = [rank._asdict() for rank in self._pending.ranks]
        self._file.write(json_text({"step": self._pending.step, "time": self._pending.time, "ranks": ranks}) + "\n")
        if not self._file.is_refused:
            self._pending = None


def read_ranks(path: Path) -> RanksReading | None:
    """Return what the file at `path` holds, null as NaN; None where there is none that can be read."""
    try:
        return _RANKS.validate_json(read_regular(path))
    except (OSError, ValidationError):
        return None


_COUNTS = TypeAdapter(dict[str, Annotated[int, Field(strict=True, ge=0)]])
_RANKS = TypeAdapter(RanksReading)
