"""The latest state of a run, for whoever asks from another thread."""

from __future__ import annotations

import time
from bisect import bisect_left
from collections import Counter
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, fields
from threading import Lock

from dist_train.monitoring.wording import Pace
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
EVENTS = (
    "resumed",
    "requeued",
    "signal",
    "checkpoint",
    "checkpoint_failed",
    "corrupt_checkpoint",
    "not_finite",
    "non_finite_evaluation",
    "disagreement",
    "micro_size",
)
"""The kinds of event that are counted from 0; others are counted once they come."""

STEP_SECONDS = (0.005, 0.01, 0.025, 0.05, 0.1, 0.25, 0.5, 1.0, 2.5, 5.0, 10.0, 25.0, 50.0, 100.0, 250.0)
"""Upper bounds of the step duration's buckets; the last bucket has none."""
PART_SECONDS = (0.0001, 0.001, 0.005, 0.01, 0.025, 0.05, 0.1, 0.25, 0.5, 1.0, 2.5, 5.0, 10.0, 25.0, 100.0)
"""Upper bounds of the buckets of a step's parts."""
PARTS = tuple(field.name for field in fields(StepParts))


@dataclass(frozen=True)
class Buckets:
    """A histogram: how many values fell into each bucket (one more than bounds), and their sum."""

    bounds: tuple[float, ...]
    counts: tuple[int, ...]
    total: float


@dataclass(frozen=True)
class MicroBatches:
    """How a global batch is cut: `count` micro-batches of `size` samples, `of_ranks` by rank."""

    size: int
    count: int
    of_ranks: tuple[int, ...]


@dataclass(frozen=True)
class Snapshot:
    """What is known at one moment. `version` grows with every change; times are seconds since 1970."""

    version: int
    facts: RunFacts
    state: str
    step: int
    last_progress: float
    train: TrainRecord | None
    evaluations: Mapping[str, EvaluationRecord]
    best_accuracy: float | None
    measured: Measurement | None
    micro_batches: MicroBatches
    checkpoint: EventRecord | None
    events: Mapping[str, int]
    step_seconds: Buckets
    part_seconds: Mapping[str, Buckets]
    seconds_left: float | None


class Board:
    """Takes in what is recorded, in microseconds, and gives out snapshots; neither waits for the other's work."""

    def __init__(self, facts: RunFacts, counts: Mapping[str, int] | None = None) -> None:
        """Start a launch of a run whose events were counted as `counts` before it."""
        self._lock = Lock()
        self._facts = facts
        self._version = 0
        self._state = "running"
        self._step = facts.start_step
        self._last_progress = time.time()
        self._train: TrainRecord | None = None
        self._evaluations: dict[str, EvaluationRecord] = {}
        self._best: float | None = None
        self._measured: Measurement | None = None
        self._micro_batches = MicroBatches(facts.micro_size, facts.micro_batches, facts.micro_batches_of)
        self._checkpoint: EventRecord | None = None
        self._events = Counter(dict.fromkeys(EVENTS, 0))
        self._events.update(counts or {})
        self._step_seconds = _Histogram(STEP_SECONDS)
        self._part_seconds = {part: _Histogram(PART_SECONDS) for part in PARTS}
        self._pace = Pace()

    def recall(self, history: Iterable[Record]) -> None:
        """Take what earlier launches recorded: evaluations and the latest checkpoint; their events are counted.

        What this launch has recorded by now is newer.
        """
        before = Board(self._facts)
        for record in history:
            before.record(record)
        with self._lock:
            self._version += 1
            self._evaluations = {**before._evaluations, **self._evaluations}
            self._best = max((best for best in (before._best, self._best) if best is not None), default=None)
            self._checkpoint = self._checkpoint or before._checkpoint

    def progress(self, step: int) -> None:
        """Note that `step` updates are done."""
        with self._lock:
            self._version += 1
            self._advance(step)

    def record(self, record: Record) -> None:
        """Take `record` in."""
        with self._lock:
            self._version += 1
            match record:
                case TrainRecord():
                    self._train = record
                    self._advance(record.step)
                case EvaluationRecord():
                    self._evaluate(record)
                case EventRecord():
                    self._happen(record)

    def measurement(self, measurement: Measurement) -> None:
        """Take `measurement` in."""
        with self._lock:
            self._version += 1
            self._measured = measurement
            self._step_seconds.add(measurement.step_seconds)
            for part, histogram in self._part_seconds.items():
                histogram.add(getattr(measurement.parts, part))

    def end(self, outcome: Outcome) -> None:
        """Note how the run ended."""
        with self._lock:
            self._version += 1
            self._state = outcome.state
            self._step = max(self._step, outcome.step)

    def snapshot(self) -> Snapshot:
        """Return what is known now."""
        with self._lock:
            return Snapshot(
                version=self._version,
                facts=self._facts,
                state=self._state,
                step=self._step,
                last_progress=self._last_progress,
                train=self._train,
                evaluations=dict(self._evaluations),
                best_accuracy=self._best,
                measured=self._measured,
                micro_batches=self._micro_batches,
                checkpoint=self._checkpoint,
                events=dict(self._events),
                step_seconds=self._step_seconds.buckets(),
                part_seconds={part: histogram.buckets() for part, histogram in self._part_seconds.items()},
                seconds_left=self._pace.seconds_left(self._facts.total_steps),
            )

    @property
    def version(self) -> int:
        """A number that grows with every change."""
        return self._version

    def _advance(self, step: int) -> None:
        self._step = max(self._step, step)
        self._last_progress = time.time()
        self._pace.mark(step, time.monotonic())

    def _evaluate(self, record: EvaluationRecord) -> None:
        self._evaluations[record.split] = record
        if record.split == "test" and record.accuracy >= (self._best or 0.0):
            self._best = record.accuracy

    def _happen(self, record: EventRecord) -> None:
        self._events[record.event] += 1
        match record.event:
            case "checkpoint":
                self._checkpoint = record
            case "signal":
                self._state = "stopping"
            case "micro_size":
                size = record.details.get("now")
                if isinstance(size, int) and size > 0:
                    self._micro_batches = _cut_anew(self._micro_batches, self._facts.global_size, size)


def _cut_anew(before: MicroBatches, global_size: int, size: int) -> MicroBatches:
    count = -(-global_size // size)
    ranks = len(before.of_ranks)
    if sum(before.of_ranks) > before.count:
        # each rank has a part of every micro-batch
        return MicroBatches(size, count, (count,) * ranks)
    return MicroBatches(size, count, tuple(len(range(rank, count, ranks)) for rank in range(ranks)))


class _Histogram:
    def __init__(self, bounds: Sequence[float]) -> None:
        self._bounds = tuple(bounds)
        self._counts = [0] * (len(bounds) + 1)
        self._total = 0.0

    def add(self, value: float) -> None:
        self._counts[bisect_left(self._bounds, value)] += 1
        self._total += value

    def buckets(self) -> Buckets:
        return Buckets(self._bounds, tuple(self._counts), self._total)
