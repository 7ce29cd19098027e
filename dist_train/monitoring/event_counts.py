"""`counts.json`: how often each kind of event has happened to the run, over all its launches."""

from __future__ import annotations

import json
import logging
from collections import Counter
from collections.abc import Mapping
from pathlib import Path

from dist_train import atomic
from dist_train.monitoring.records import EventRecord, Measurement, Outcome, Record, RunFacts

FILE_NAME = "counts.json"
"""In the run directory."""

_logger = logging.getLogger(__name__)


class EventCounts:
    """Counts every event record into `path`, on top of what it holds; a resume does not rewind it."""

    def __init__(self, path: Path) -> None:
        """Read what is there; a broken file is reported, and the counts begin anew."""
        self._path = path
        self._refused = False
        try:
            self._counts = Counter(read_counts(path))
        except (OSError, ValueError) as error:
            _logger.warning("%s cannot be used, the counts of events begin anew: %s", path, error)
            self._counts = Counter()
            self._write()

    def begin(self, facts: RunFacts) -> None:
        """Do nothing: the file is read already."""

    def record(self, record: Record) -> None:
        """Count an event, in memory and in the file."""
        if isinstance(record, EventRecord):
            self._counts[record.event] += 1
            self._write()

    def measurement(self, measurement: Measurement) -> None:
        """Do nothing: these are not events."""

    def progress(self, step: int) -> None:
        """Do nothing: these are not events."""

    def sync(self) -> None:
        """Do nothing: a count lost to a power failure is not worth the wait."""

    def end(self, outcome: Outcome) -> None:
        """Try once more to write what the disk refused."""
        if self._refused:
            self._write()

    def _write(self) -> None:
        try:
            atomic.swap_text(self._path, json.dumps(dict(sorted(self._counts.items())), indent=2) + "\n")
        except OSError as error:
            if not self._refused:
                _logger.warning("%s cannot be written; training continues: %s", self._path, error)
            self._refused = True
        else:
            self._refused = False


def read_counts(path: Path) -> Mapping[str, int]:
    """Return the counts in `path`, none where it is not there. Raises OSError or ValueError where it is broken."""
    try:
        content = path.read_text(encoding="utf-8")
    except FileNotFoundError:
        return {}
    counts = json.loads(content)
    if not isinstance(counts, dict):
        raise ValueError("it does not hold counts by kind of event")
    for event, count in counts.items():
        if isinstance(count, bool) or not isinstance(count, int) or count < 0:
            raise ValueError(f"the count of {event!r} is not a whole number: {count!r}")
    return counts
