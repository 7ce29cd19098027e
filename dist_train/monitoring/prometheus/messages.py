"""What the trainer and the exporter's process say to each other."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import TypeAlias

from dist_train.monitoring.prometheus.serving_plan import ServingPlan
from dist_train.monitoring.records import EvaluationRecord, EventRecord, Measurement, Outcome, RunFacts, TrainRecord


@dataclass(frozen=True)
class Begin:
    """To the exporter: serve this run. `counts`: its events before this launch, by kind."""

    plan: ServingPlan
    facts: RunFacts
    counts: Mapping[str, int]


@dataclass(frozen=True)
class Progress:
    """To the exporter: `step` updates are done."""

    step: int


@dataclass(frozen=True)
class End:
    """To the exporter: the run has ended."""

    outcome: Outcome


@dataclass(frozen=True)
class Serving:
    """From the exporter: it serves at `address`, and has entered itself in the file `target`."""

    address: str
    target: Path | None


@dataclass(frozen=True)
class Warned:
    """From the exporter: something that the user should know."""

    text: str


@dataclass(frozen=True)
class Ending:
    """From the exporter: it ends within so many seconds; `for_scrape` of them for a last scrape."""

    seconds: float
    for_scrape: float


@dataclass(frozen=True)
class Failed:
    """From the exporter: it cannot go on."""

    reason: str


ToExporter: TypeAlias = Begin | Progress | TrainRecord | EvaluationRecord | EventRecord | Measurement | End
FromExporter: TypeAlias = Serving | Warned | Ending | Failed
Message: TypeAlias = ToExporter | FromExporter
