"""What a run reports while it trains, its records first, and the callbacks of those who observe it."""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, NamedTuple, TypeAlias

import msgspec

from dist_train.rundir.epochs import Epochs, Stage

Detail: TypeAlias = str | int | float | bool | None

Count = Annotated[int, msgspec.Meta(ge=-(2**63), le=2**63 - 1)]  # 64 bits, as messages to the exporter have


@dataclass(frozen=True)
class TrainRecord:
    """One optimizer update: the last of every `metrics.every_steps`, and of the run."""

    step: Count  # updates done
    epoch: float  # epochs done: step / steps per epoch
    loss: float
    accuracy: float  # share of the global batch that was classified correctly, in [0, 1]
    learning_rate: float
    noise_amplitude: float
    gradient_norm: float
    step_seconds: float
    samples_per_second: float
    time: float  # seconds since 1970 (UTC)


@dataclass(frozen=True)
class EvaluationRecord:
    """Loss and accuracy (in [0, 1]) of the clean weights or their average, over the first `samples` of a split."""

    step: Count
    epoch: float
    split: str
    loss: float
    accuracy: float
    samples: Count
    time: float


def better(best: float | None, record: EvaluationRecord) -> float | None:
    """Return the best test accuracy so far: `best`, or that of `record`, which counts if its loss is finite."""
    is_better = math.isfinite(record.loss) and record.accuracy > (-math.inf if best is None else best)
    return record.accuracy if record.split == "test" and is_better else best


@dataclass(frozen=True)
class EventRecord:
    """Something that happened to the run; `event` is a key of `EVENTS`, unless another version wrote the record."""

    step: Count
    event: str
    time: float
    details: Mapping[str, Detail]


@dataclass(frozen=True)
class EventKind:
    """What is particular to the events of a name."""

    is_bad: bool = False  # shown in red
    begins_launch: bool = False  # a launch that resumes from the event's step records it anew
    distinct_by: str = ""  # the detail in which events of one step differ, if there may be several


EVENTS: Mapping[str, EventKind] = {
    "resumed": EventKind(begins_launch=True),
    "requeued": EventKind(distinct_by="restart"),
    "lengthened": EventKind(begins_launch=True),
    "initialized": EventKind(begins_launch=True),
    "plugins_changed": EventKind(begins_launch=True),
    "data_changed": EventKind(begins_launch=True),
    "versions_changed": EventKind(distinct_by="now"),  # not begins_launch: the next launch compares with this one's
    "corrupt_checkpoint": EventKind(is_bad=True, distinct_by="path"),
    "checkpoint": EventKind(),
    "checkpoint_failed": EventKind(is_bad=True),
    "signal": EventKind(),
    "stopped_early": EventKind(),
    "micro_size": EventKind(distinct_by="now"),
    "dealing": EventKind(),
    "batch_size": EventKind(),
    "gradient_repeated": EventKind(),
    "non_finite_evaluation": EventKind(is_bad=True),
    "not_finite": EventKind(is_bad=True),
    "disagreement": EventKind(is_bad=True),
    "rank_lost": EventKind(is_bad=True, distinct_by="generation"),
    "rank_joined": EventKind(distinct_by="generation"),
    "regrouped": EventKind(distinct_by="generation"),
}
"""The events that a run records; docs/watching.md says when."""


@dataclass(frozen=True)
class StepParts:
    """Seconds that one rank spent in the parts of one step; the rest of the step is in none of them."""

    data_wait: float  # until the micro-batches were on the device
    forward_backward: float
    perturb_restore: float  # drawing noise, adding it, and restoring the clean weights
    allreduce_wait: float  # waiting for gradients and counts of the other ranks, once this rank's own were done
    optimizer: float
    checkpoint_stall: float  # from the beginning of a checkpoint until training could continue


class RankMeasurement(NamedTuple):
    """What one rank measured at one step; a tuple, since those of a thousand ranks travel as one message."""

    busy_seconds: float  # time of the step without the wait for the other ranks
    wait_seconds: float
    resident_bytes: float
    device_bytes: float = math.nan  # device memory that the rank has allocated; NaN without a device
    device_peak_bytes: float = math.nan  # peak of `device_bytes`; NaN without a device
    device_utilization: float = math.nan  # share of the last second in which it was busy, in [0, 1]; NaN without NVML
    micro_batches: float = math.nan  # that the rank computed in the step, or parts of them with sync norm
    device_total_bytes: float = math.nan  # the device's memory; NaN without a device
    device_used_bytes: float = math.nan  # of all processes. From here on: NaN if NVML does not report it
    device_power_watts: float = math.nan
    device_core_clock_hertz: float = math.nan
    device_memory_clock_hertz: float = math.nan
    device_throttle_reasons: float = math.nan  # as bits of NVML (nvmlClocksEventReasons)
    device_corrected_errors: float = math.nan  # memory errors since the driver was loaded
    device_uncorrected_errors: float = math.nan


@dataclass(frozen=True)
class Measurement:
    """One step's times on this rank and on all. Not in `metrics.jsonl`, since a resume does not reproduce it."""

    step: int
    time: float
    step_seconds: float
    parts: StepParts  # this rank's own
    weight_norm: float  # Euclidean norm of the clean weights after the step
    distance: float  # Euclidean distance of the clean weights from the initial ones
    ranks: tuple[RankMeasurement, ...]  # by rank; on ranks other than rank 0, their own alone


Record: TypeAlias = TrainRecord | EvaluationRecord | EventRecord


@dataclass(frozen=True)
class RunFacts:
    """What is known about a run before its first step; `noise` and `controller` are for display."""

    name: str
    run_directory: Path
    model: str
    data: str
    parameters: int
    global_size: int
    micro_size: int
    micro_batches: int
    world_size: int
    total_steps: int
    steps_per_epoch: int
    epochs: float
    noise: str
    start_step: int
    controller: str
    rank: int = 0  # the rank that these facts are for
    revision: str = ""  # version of dist_train, with the commit if it runs from a repository
    slurm_job: str = ""
    node: str = ""
    nodes: tuple[str, ...] = ()  # the nodes of the ranks, by rank
    launched: float = 0.0  # when this launch began, in seconds since 1970
    device: str = ""  # what this rank computes on, for display
    run_id: str = ""  # shared by all launches of the run, and by no other run
    checkpoint_interval: int = 0  # updates between two checkpoints, at most; 0 if the run writes only its last
    time_limit: float = 0.0  # when the batch system ends the job, seconds since 1970; 0 if unknown
    is_requeued: bool = False  # whether the batch script then requeues the job
    generation: int = 1  # how often the ranks of this launch have met: more than once if some were lost or joined
    best_accuracy: float | None = None  # of the test split, before the first step of this launch
    stages: tuple[Stage, ...] = ()  # of a batch schedule; without one, the fields above hold throughout

    @property
    def passes(self) -> Epochs:
        """The run's passes over the data."""
        return Epochs(self.stages or (Stage(0, 0, self.global_size, self.steps_per_epoch),))

    @property
    def planned_samples(self) -> int:
        """Training samples that the run will have used at its end."""
        return self.passes.samples(self.total_steps)


@dataclass(frozen=True)
class Outcome:
    """How a run ended. `seconds` is the time of this launch; accuracies are in [0, 1]."""

    state: str
    reason: str
    exit_code: int
    step: int
    epoch: float
    seconds: float
    train_accuracy: float | None
    test_accuracy: float | None
    best_accuracy: float | None
    samples_per_second: float | None
    last_checkpoint: Path | None  # None on all ranks but rank 0
    is_left: bool = False
    """Whether nothing may wait any more: a second Ctrl-C or `sys.exit` ends it at once, or other ranks may train on."""


class Observer:
    """Callbacks of a run, in the order of their calls; a subclass overrides those that it needs.

    If a callback raises, the observer is dropped and the run continues. Numbers are Python's; there are no arrays.

    Examples:
        >>> class Losses(dist_train.Observer):
        ...     def __init__(self):
        ...         self.losses = []
        ...
        ...     def record(self, record):
        ...         if isinstance(record, TrainRecord):
        ...             self.losses.append(record.loss)
        >>> losses = Losses()
        >>> config = dist_train.load_config("dist_train:configs/smoke.yaml")
        >>> outcome = dist_train.train(config, "runs/observed", observers=[losses])
        >>> len(losses.losses), losses.losses[-1] < losses.losses[0]
        (32, True)
    """

    def begin(self, facts: RunFacts) -> None:
        """Called before the first step."""

    def regroup(self, facts: RunFacts) -> None:
        """Called when the ranks of an elastic launch have met again, after some were lost or joined."""

    def record(self, record: Record) -> None:
        """Called for each training, evaluation and event record."""

    def measurement(self, measurement: Measurement) -> None:
        """Called with the times of a step on every rank, at most once per `metrics.every_steps`."""

    def progress(self, step: int) -> None:
        """Called when `step` updates are done, at each one and within evaluations, so it must cost next to nothing."""

    def sync(self) -> None:
        """Flush records to disk. Called, from any thread, before a checkpoint becomes durable."""

    def end(self, outcome: Outcome) -> None:
        """Called when the run has ended, in whatever way, also if it was refused before `begin`; release everything.

        After ten minutes it is interrupted by a TimeoutError, so that an upload that hangs does not hold up the job.
        """
