"""What a metric is: its name, kind, unit and meaning, and how it is read off a snapshot of the run."""

from __future__ import annotations

from collections.abc import Callable, Iterable
from dataclasses import dataclass
from enum import StrEnum
from typing import NamedTuple

from dist_train.monitoring.prometheus.board import Buckets, Snapshot


class Kind(StrEnum):
    """The kinds of metric, by Prometheus' names."""

    GAUGE = "gauge"
    COUNTER = "counter"
    HISTOGRAM = "histogram"
    INFO = "info"


class Scope(StrEnum):
    """What a metric tells about, and so on whose page it is."""

    RUN = "run"
    """The run: on rank 0's page alone."""
    RANK = "rank"
    """The rank that serves it: on every page."""
    BOTH = "run, on every page"


class Reading(NamedTuple):
    """A value, and the values of the metric's labels in their order."""

    value: float | Buckets
    labels: tuple[str, ...] = ()


@dataclass(frozen=True)
class Metric:
    """`take` reads the metric off a snapshot; no reading where nothing is known yet."""

    name: str
    kind: Kind
    unit: str
    meaning: str
    take: Callable[[Snapshot], Iterable[Reading]]
    labels: tuple[str, ...] = ()
    scope: Scope = Scope.RUN


def one(value: float | Buckets | None) -> tuple[Reading, ...]:
    """Return the reading of a metric without labels; none where `value` is None."""
    return () if value is None else (Reading(value),)
