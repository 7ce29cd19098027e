"""`ranks.json`: how the latest step went on every rank, for whoever looks at the run directory."""

from __future__ import annotations

import json
import logging
import math
import time
from collections.abc import Mapping
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from dist_train import atomic
from dist_train.json_text import json_text
from dist_train.monitoring.records import Measurement, Outcome, RankMeasurement, Record, RunFacts

_PACE_SECONDS = 1.0
_FIELDS = tuple(RankMeasurement.__dataclass_fields__)
_logger = logging.getLogger(__name__)


@dataclass(frozen=True)
class RanksReading:
    """What `ranks.json` holds: `ranks` by rank, as they were at `step`; `time` in seconds since 1970."""

    step: int
    time: float
    ranks: tuple[RankMeasurement, ...]


class RanksFile:
    """An observer that rewrites the file at a measurement, at most once a second, and at the end.

    A disk that refuses costs one warning; the next measurement is tried again.
    """

    def __init__(self, path: Path) -> None:
        self._path = path
        self._due = -math.inf
        self._refused = False
        self._pending: Measurement | None = None

    def begin(self, facts: RunFacts) -> None:
        """Do nothing: nothing is measured yet."""

    def record(self, record: Record) -> None:
        """Do nothing: records are kept in `metrics.jsonl`."""

    def measurement(self, measurement: Measurement) -> None:
        """Write `measurement` down, where the last one was written long enough ago."""
        self._pending = measurement
        if time.monotonic() >= self._due:
            self._write()

    def progress(self, step: int) -> None:
        """Do nothing."""

    def sync(self) -> None:
        """Do nothing: the file is of the moment alone."""

    def end(self, outcome: Outcome) -> None:
        """Write the last measurement, unless it is there."""
        self._write()

    def _write(self) -> None:
        if self._pending is None:
            return
        self._due = time.monotonic() + _PACE_SECONDS
        try:
            atomic.swap_text(self._path, _to_json(self._pending))
        except OSError as error:
            if not self._refused:
                _logger.warning("%s cannot be written; training continues: %s", self._path, error)
            self._refused = True
        else:
            self._refused, self._pending = False, None


def read_ranks(path: Path) -> RanksReading | None:
    """Return what the file at `path` holds, null as NaN; None where there is none that can be read."""
    try:
        fields = json.loads(path.read_bytes())
        ranks = tuple(_measurement(rank) for rank in fields["ranks"])
        return RanksReading(int(fields["step"]), float(fields["time"]), ranks)
    except (OSError, ValueError, KeyError, TypeError):
        return None


def _to_json(measurement: Measurement) -> str:
    ranks = [asdict(rank) for rank in measurement.ranks]
    return json_text({"step": measurement.step, "time": measurement.time, "ranks": ranks}) + "\n"


def _measurement(fields: Mapping[str, Any]) -> RankMeasurement:
    values = {name: math.nan if fields[name] is None else float(fields[name]) for name in _FIELDS}
    return RankMeasurement(**values)
