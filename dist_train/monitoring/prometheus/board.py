"""The latest state of a run, as immutable snapshots for other threads."""

from __future__ import annotations

import math
import time
from bisect import bisect_left
from collections.abc import Iterable, Mapping
from dataclasses import asdict, dataclass, field, fields, replace
from functools import reduce
from statistics import median
from threading import Lock
from typing import Any

from dist_train.monitoring.prometheus.messages import Begin, Progress, ToExporter
from dist_train.monitoring.wording import Pace
from dist_train.outcome import ExitCode
from dist_train.rundir.records import (
    EVENTS,
    EvaluationRecord,
    EventRecord,
    Measurement,
    Outcome,
    Record,
    RunFacts,
    StepParts,
    TrainRecord,
    better,
)

STATES = ("running", "stopping", "stopped", "finished", "failed")
KILLED = "killed"  # outcome of a run that ended without reporting one, or that another rank may take over
OUTCOMES = ("finished", "stopped", "failed", "diverged", KILLED)
COUNTED = (*EVENTS, "exporter_restarted")
"""Events whose counters exist from the start, at 0, so that an increase to 1 is seen; the exporter counts the last."""

STEP_SECONDS = (0.005, 0.01, 0.025, 0.05, 0.1, 0.25, 0.5, 1.0, 2.5, 5.0, 10.0, 25.0, 50.0, 100.0, 250.0)
"""Upper bounds of the step duration's buckets until the run's step time is known; the last bucket is unbounded."""
_FIRST_STEPS = 5  # the run's step time is the median of this many first steps, because the very first may compile
_BOUNDS_PER_DECADE = 24
_FINE_RANGE = 2.5


def bounds_around(seconds: float) -> tuple[float, ...]:
    """Return `STEP_SECONDS` with additional bounds every 10 % from `seconds` / 2.5 to `seconds` * 2.5.

    The additional bounds lie on one grid for all runs, so that new launches do not keep adding series.
    """
    seconds = max(seconds, 1e-6)
    first = math.floor(_BOUNDS_PER_DECADE * math.log10(seconds / _FINE_RANGE))
    last = math.ceil(_BOUNDS_PER_DECADE * math.log10(seconds * _FINE_RANGE))
    fine = (float(f"{10 ** (place / _BOUNDS_PER_DECADE):.4g}") for place in range(first, last + 1))
    return tuple(sorted({*STEP_SECONDS, *fine}))


PART_SECONDS = (0.0001, 0.001, 0.005, 0.01, 0.025, 0.05, 0.1, 0.25, 0.5, 1.0, 2.5, 5.0, 10.0, 25.0, 100.0)
"""Upper bounds of the buckets of a step's parts."""


@dataclass(frozen=True)
class Buckets:
    """A histogram: the number of values in each bucket (one more than bounds), and the sum of the values."""

    bounds: tuple[float, ...]
    counts: tuple[int, ...]
    total: float = 0.0

    @staticmethod
    def of(bounds: tuple[float, ...], values: Iterable[float] = ()) -> Buckets:
        """Return the histogram of `values`."""
        return reduce(Buckets.plus, values, Buckets(bounds, (0,) * (len(bounds) + 1)))

    def plus(self, value: float) -> Buckets:
        """Return the histogram with one more value."""
        place = bisect_left(self.bounds, value)
        counts = (*self.counts[:place], self.counts[place] + 1, *self.counts[place + 1 :])
        return Buckets(self.bounds, counts, self.total + value)


@dataclass(frozen=True)
class Snapshot:
    """The state at one moment, immutable; times are in seconds since 1970."""

    facts: RunFacts  # with the current size and number of micro-batches
    step: int
    last_progress: float
    events: Mapping[str, int]
    events_before: Mapping[str, int]  # those before this process
    state: str = "running"
    outcome: str = ""  # how the run ended, one of `OUTCOMES`; empty before
    seconds_left: float | None = None
    train: TrainRecord | None = None
    evaluations: Mapping[str, EvaluationRecord] = field(default_factory=dict)
    best_accuracy: float | None = None
    measured: Measurement | None = None
    checkpoint: EventRecord | None = None
    disk_free: int | None = None  # free bytes on the file system of the run directory
    step_seconds: Buckets = field(default_factory=lambda: Buckets.of(STEP_SECONDS))
    measured_samples: int = 0  # of the steps in `step_seconds`
    part_seconds: Mapping[str, Buckets] = field(
        default_factory=lambda: {part.name: Buckets.of(PART_SECONDS) for part in fields(StepParts)}
    )


def outcome_label(outcome: Outcome) -> str:
    """Return the value of the label `outcome`: "diverged", `KILLED` if `is_left`, or else the run's final state."""
    state = KILLED if outcome.is_left else outcome.state
    return "diverged" if outcome.exit_code == ExitCode.DIVERGED else state


_LEAST_SECONDS = 120.0
_OUTSIDE_STEPS_SECONDS = 600.0  # before the first step, and after the last one, when the last checkpoint is written


def stall_timeout_seconds(now: Snapshot) -> float:
    """Return the time without progress after which a run has stalled.

    It is two minutes, ten mean steps, or twice the time to write the latest checkpoint, whichever is longest; at least
    ten minutes before the first step and after the last one. Where a schedule has made the batch larger than that of
    the measured steps, a step counts as that much longer.
    """
    count = sum(now.step_seconds.counts)
    if not count:
        return _OUTSIDE_STEPS_SECONDS
    growth = max(1.0, now.facts.passes.stage(now.step).global_size * count / now.measured_samples)
    least = _LEAST_SECONDS if now.step < now.facts.total_steps else _OUTSIDE_STEPS_SECONDS
    writing = now.checkpoint.details.get("seconds") if now.checkpoint else None
    return max(
        least, 10 * growth * now.step_seconds.total / count, 2 * writing if isinstance(writing, int | float) else 0.0
    )


def is_stalled(now: Snapshot, moment: float) -> bool:
    """Return whether a running run has stalled at `moment` (seconds since 1970), as the alert DistTrainStalled does."""
    return now.state == "running" and moment - now.last_progress > stall_timeout_seconds(now)


class Board:
    """Applies the trainer's messages, in microseconds each, and returns the latest snapshot. Thread-safe."""

    def __init__(self, facts: RunFacts, counts: Mapping[str, int] | None = None) -> None:
        events = {**dict.fromkeys(COUNTED, 0), **(counts or {})}
        self._now = Snapshot(facts, facts.start_step, time.time(), events, events)
        self._lock = Lock()
        self._pace = Pace()
        self._first_steps: list[float] = []

    def snapshot(self) -> Snapshot:
        """Return the current state: the same object until something changes."""
        return self._now

    def recall(self, history: Iterable[Record]) -> None:
        """Add evaluations and events from before this process; what has been recorded since takes precedence."""
        begun = self._now.facts
        earlier = Board(begun)
        for record in history:
            earlier.apply(record)
        before = earlier.snapshot()
        with self._lock:
            now = self._now
            accuracies = [best for best in (before.best_accuracy, now.best_accuracy) if best is not None]
            self._change(
                evaluations={**before.evaluations, **now.evaluations},
                best_accuracy=max(accuracies, default=None),
                checkpoint=now.checkpoint or before.checkpoint,
                facts=before.facts if now.facts == begun else now.facts,
                state=before.state if now.state == "running" else now.state,
            )

    def apply(self, message: ToExporter) -> None:
        """Change the state as a message of the trainer says; `Begin` brings the facts of a new generation of ranks."""
        with self._lock:
            now = self._now
            match message:
                case Begin(facts=facts):
                    # The last measurement is by the former ranks' numbers: it would be shown on other nodes.
                    self._change(facts=replace(facts, start_step=now.facts.start_step), measured=None)
                case Progress(step=step):
                    self._advance(step)
                case TrainRecord(step=step):
                    self._advance(step, train=message)
                case EvaluationRecord(split=split):
                    evaluations = {**now.evaluations, split: message}
                    self._change(evaluations=evaluations, best_accuracy=better(now.best_accuracy, message))
                case EventRecord(event=event):
                    self._change(events={**now.events, event: now.events.get(event, 0) + 1})
                    self._apply_event(message)
                case Measurement(step=step, parts=parts):
                    seconds = asdict(parts)
                    self._change(
                        measured=message,
                        step_seconds=self._with_step(message.step_seconds),
                        measured_samples=now.measured_samples + now.facts.passes.stage(step - 1).global_size,
                        part_seconds={part: before.plus(seconds[part]) for part, before in now.part_seconds.items()},
                    )
                case Outcome(state=state, step=step):
                    left = 0.0 if state == "finished" else now.seconds_left  # early stopping leaves steps
                    step = max(now.step, step)
                    self._change(state=state, outcome=outcome_label(message), step=step, seconds_left=left)

    def disk(self, free: int) -> None:
        """Set the free bytes on the run directory's file system."""
        with self._lock:
            self._change(disk_free=free)

    def killed(self) -> None:
        """Set that the run ended without reporting an outcome."""
        with self._lock:
            self._change(state="failed", outcome=KILLED)

    def _with_step(self, seconds: float) -> Buckets:
        """Return the step durations with one more; once the step time is known, in buckets around it."""
        if len(self._first_steps) < _FIRST_STEPS:
            self._first_steps.append(seconds)
            if len(self._first_steps) == _FIRST_STEPS:
                return Buckets.of(bounds_around(median(self._first_steps)), self._first_steps)
        return self._now.step_seconds.plus(seconds)

    def _change(self, **changes: Any) -> None:
        self._now = replace(self._now, **changes)

    def _advance(self, step: int, **changes: Any) -> None:
        facts = self._now.facts
        if step > self._now.step:  # the batches of an evaluation would push the steps before it out of the last minute
            self._pace.mark(facts.passes.samples(step), time.monotonic())
        self._change(
            step=max(self._now.step, step),
            last_progress=time.time(),
            seconds_left=self._pace.seconds_left(facts.planned_samples),
            **changes,
        )

    def _apply_event(self, record: EventRecord) -> None:
        match record.event, record.details.get("now"):
            case "checkpoint", _:
                self._change(checkpoint=record)
            case "signal", _:
                self._change(state="stopping")
            case "micro_size", int(size) if size > 0:
                self._change(facts=_with_micro_size(self._now.facts, size))
            case "batch_size", int(size) if size > 0:
                facts = replace(self._now.facts, global_size=size)
                self._change(facts=_with_micro_size(facts, facts.micro_size))


def _with_micro_size(facts: RunFacts, size: int) -> RunFacts:
    """Return `facts` with the batch split into micro-batches of `size`."""
    return replace(facts, micro_size=size, micro_batches=-(-facts.global_size // size))
