"""The latest state of a run, as snapshots that other threads may read."""

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

from dist_train.monitoring.wording import Pace
from dist_train.outcome import ExitCode
from dist_train.rundir.records import (
    EvaluationRecord,
    EventRecord,
    Measurement,
    Outcome,
    Record,
    RunFacts,
    StepParts,
    TrainRecord,
)

STATES = ("starting", "running", "stopping", "stopped", "finished", "failed")
KILLED = "killed"
"""The outcome of a run that ended without reporting an outcome."""
OUTCOMES = ("finished", "stopped", "failed", "diverged", KILLED)
EVENTS = (
    *("resumed", "requeued", "signal", "checkpoint", "checkpoint_failed", "corrupt_checkpoint", "not_finite"),
    *("non_finite_evaluation", "disagreement", "micro_size", "dealing", "batch_size", "exporter_restarted"),
    *("rank_lost", "rank_joined"),
)
"""The kinds of event that are counted from 0; others are counted once they come."""

STEP_SECONDS = (0.005, 0.01, 0.025, 0.05, 0.1, 0.25, 0.5, 1.0, 2.5, 5.0, 10.0, 25.0, 50.0, 100.0, 250.0)
"""Upper bounds of the step duration's buckets, until the run's own step is known; the last bucket has none."""
_FIRST_STEPS = 5
"""By the median of so many the run's own step is known: the very first may compile."""
_BOUNDS_PER_DECADE = 24
_FINE_RANGE = 2.5


def bounds_around(seconds: float) -> tuple[float, ...]:
    """Return `STEP_SECONDS`, with a bound every 10 % from 2.5 times below to 2.5 times above `seconds`.

    They are of one grid for all runs, so that their number does not grow with that of launches.
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
    """A histogram: how many values fell into each bucket (one more than bounds), and their sum."""

    bounds: tuple[float, ...]
    counts: tuple[int, ...]
    total: float = 0.0

    @staticmethod
    def of(bounds: tuple[float, ...], values: Iterable[float] = ()) -> Buckets:
        """Return the histogram of `values`."""
        return reduce(Buckets.plus, values, Buckets(bounds, (0,) * (len(bounds) + 1)))

    def plus(self, value: float) -> Buckets:
        """Return the histogram with one value more."""
        place = bisect_left(self.bounds, value)
        counts = (*self.counts[:place], self.counts[place] + 1, *self.counts[place + 1 :])
        return Buckets(self.bounds, counts, self.total + value)


@dataclass(frozen=True)
class Snapshot:
    """What is known at one moment; times are in seconds since 1970. Every change makes a new object."""

    facts: RunFacts
    """With the size and the number of micro-batches as they are now."""
    step: int
    last_progress: float
    events: Mapping[str, int]
    state: str = "running"
    outcome: str = ""
    """How the run has ended, one of `OUTCOMES`; empty while it has not."""
    seconds_left: float | None = None
    train: TrainRecord | None = None
    evaluations: Mapping[str, EvaluationRecord] = field(default_factory=dict)
    best_accuracy: float | None = None
    measured: Measurement | None = None
    checkpoint: EventRecord | None = None
    disk_free: int | None = None
    """Bytes that are left where the run directory lies."""
    step_seconds: Buckets = field(default_factory=lambda: Buckets.of(STEP_SECONDS))
    part_seconds: Mapping[str, Buckets] = field(
        default_factory=lambda: {part.name: Buckets.of(PART_SECONDS) for part in fields(StepParts)}
    )


def outcome_label(outcome: Outcome) -> str:
    """Return the value of the label `outcome`: the state that the run ended in, or diverged."""
    return "diverged" if outcome.exit_code == ExitCode.DIVERGED else outcome.state


_LEAST_SECONDS = 120.0
_FIRST_STEP_SECONDS = 600.0


def stands_still(now: Snapshot, moment: float) -> bool:
    """Return whether a run at work has made no progress for long, at `moment` in seconds since 1970.

    Long is what the alert DistTrainStalled takes for it: two minutes, or ten of the run's own steps if that is longer;
    ten minutes for the first one.
    """
    count = sum(now.step_seconds.counts)
    patience = max(_LEAST_SECONDS, 10 * now.step_seconds.total / count) if count else _FIRST_STEP_SECONDS
    return now.state == "running" and moment - now.last_progress > patience


class Board:
    """Takes in what is recorded, in microseconds, and hands out the latest snapshot. For several threads."""

    def __init__(self, facts: RunFacts, counts: Mapping[str, int] | None = None) -> None:
        """Start a launch of a run whose events were counted as `counts` before it."""
        self._now = Snapshot(facts, facts.start_step, time.time(), {**dict.fromkeys(EVENTS, 0), **(counts or {})})
        self._lock = Lock()
        self._pace = Pace()
        self._first_steps: list[float] = []

    def snapshot(self) -> Snapshot:
        """Return what is known now: the same object until something changes."""
        return self._now

    def recall(self, history: Iterable[Record]) -> None:
        """Take what earlier launches recorded: evaluations and the latest checkpoint; their events are counted.

        What this launch has recorded by now is newer.
        """
        earlier = Board(self._now.facts)
        for record in history:
            earlier.record(record)
        before = earlier.snapshot()
        with self._lock:
            now = self._now
            accuracies = [best for best in (before.best_accuracy, now.best_accuracy) if best is not None]
            self._change(
                evaluations={**before.evaluations, **now.evaluations},
                best_accuracy=max(accuracies, default=None),
                checkpoint=now.checkpoint or before.checkpoint,
            )

    def regroup(self, facts: RunFacts) -> None:
        """Note that the ranks have met anew, as `facts` say."""
        with self._lock:
            self._change(facts=replace(facts, start_step=self._now.facts.start_step))

    def progress(self, step: int) -> None:
        """Note that `step` updates are done."""
        with self._lock:
            self._advance(step)

    def record(self, record: Record) -> None:
        """Take `record` in."""
        with self._lock:
            match record:
                case TrainRecord():
                    self._advance(record.step, train=record)
                case EvaluationRecord():
                    self._change(evaluations={**self._now.evaluations, record.split: record})
                    if record.split == "test" and record.accuracy >= (self._now.best_accuracy or 0.0):
                        self._change(best_accuracy=record.accuracy)
                case EventRecord():
                    self._change(events={**self._now.events, record.event: self._now.events.get(record.event, 0) + 1})
                    self._happen(record)

    def measurement(self, measurement: Measurement) -> None:
        """Take `measurement` in."""
        with self._lock:
            seconds = asdict(measurement.parts)
            self._change(
                measured=measurement,
                step_seconds=self._with_step(measurement.step_seconds),
                part_seconds={part: before.plus(seconds[part]) for part, before in self._now.part_seconds.items()},
            )

    def disk(self, free: int) -> None:
        """Note that so many bytes are left where the run directory lies."""
        with self._lock:
            self._change(disk_free=free)

    def end(self, outcome: Outcome) -> None:
        """Note how the run ended."""
        with self._lock:
            label = outcome_label(outcome)
            self._change(state=outcome.state, outcome=label, step=max(self._now.step, outcome.step))

    def killed(self) -> None:
        """Note that the run ended without saying how."""
        with self._lock:
            self._change(state="failed", outcome=KILLED)

    def _with_step(self, seconds: float) -> Buckets:
        """Return the durations of steps with one more; once enough are known, in buckets around them."""
        if len(self._first_steps) < _FIRST_STEPS:
            self._first_steps.append(seconds)
            if len(self._first_steps) == _FIRST_STEPS:
                return Buckets.of(bounds_around(median(self._first_steps)), self._first_steps)
        return self._now.step_seconds.plus(seconds)

    def _change(self, **changes: Any) -> None:
        self._now = replace(self._now, **changes)

    def _advance(self, step: int, **changes: Any) -> None:
        self._pace.mark(step, time.monotonic())
        self._change(
            step=max(self._now.step, step),
            last_progress=time.time(),
            seconds_left=self._pace.seconds_left(self._now.facts.total_steps),
            **changes,
        )

    def _happen(self, record: EventRecord) -> None:
        match record.event, record.details.get("now", record.details.get("shares")):
            case "checkpoint", _:
                self._change(checkpoint=record)
            case "signal", _:
                self._change(state="stopping")
            case "micro_size", int(size) if size > 0:
                self._change(facts=_cut_anew(self._now.facts, size))
            case "batch_size", int(size) if size > 0:
                facts = replace(self._now.facts, global_size=size)
                self._change(facts=_cut_anew(facts, facts.micro_size))
            case "dealing", str(shares):
                self._change(facts=replace(self._now.facts, micro_batches_of=tuple(map(int, shares.split()))))


def _cut_anew(facts: RunFacts, size: int) -> RunFacts:
    """Return `facts` of a batch that is cut into micro-batches of another size, among the same ranks."""
    count, ranks = -(-facts.global_size // size), len(facts.micro_batches_of)
    shares_all = sum(facts.micro_batches_of) > facts.micro_batches  # each rank has a part of every micro-batch
    counts = tuple(count if shares_all else len(range(rank, count, ranks)) for rank in range(ranks))
    return replace(facts, micro_size=size, micro_batches=count, micro_batches_of=counts)
