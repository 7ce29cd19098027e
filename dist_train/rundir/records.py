"""The records of a run, in `metrics.jsonl` and elsewhere, and how they are read back."""

from __future__ import annotations

import json
import math
from collections.abc import Mapping
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any, NamedTuple, TypeAlias, TypeVar

from dist_train.rundir.atomic import json_text, open_regular

Detail: TypeAlias = str | int | float | bool | None
_Real = TypeVar("_Real", int, float)


@dataclass(frozen=True)
class TrainRecord:
    """One optimizer update, or the mean over the updates since the record before."""

    step: int
    """Updates done."""
    epoch: float
    """Epochs done: step / steps per epoch."""
    loss: float
    accuracy: float
    """Share of the global batch that was classified rightly, in [0, 1]."""
    learning_rate: float
    noise_amplitude: float
    gradient_norm: float
    step_seconds: float
    samples_per_second: float
    time: float
    """Seconds since 1970 (UTC)."""


@dataclass(frozen=True)
class EvaluationRecord:
    """Loss and accuracy (in [0, 1]) of the clean weights over a whole split."""

    step: int
    epoch: float
    split: str
    loss: float
    accuracy: float
    samples: int
    time: float


@dataclass(frozen=True)
class EventRecord:
    """Something that happened to the run: resumed, checkpoint, signal, corrupt_checkpoint, ..."""

    step: int
    event: str
    time: float
    details: Mapping[str, Detail]


@dataclass(frozen=True)
class StepParts:
    """Seconds that one rank spent in the parts of one step; what is left of the step is none of these."""

    data_wait: float
    """Until the micro-batches were on the device."""
    forward_backward: float
    perturb_restore: float
    """Drawing noise, adding it, and restoring the clean weights."""
    allreduce_wait: float
    """For gradients and counts of the others, once this rank's own were done."""
    optimizer: float
    checkpoint_stall: float
    """Until training could continue after a checkpoint was begun."""


class RankMeasurement(NamedTuple):
    """What one rank measured at one step; a tuple, since those of a thousand ranks are one message."""

    busy_seconds: float
    """Time of the step without the wait for the others."""
    wait_seconds: float
    resident_bytes: float
    device_bytes: float
    """Memory of its device that it holds; NaN without a device."""
    device_peak_bytes: float
    """The most of it that it has held; NaN without a device."""
    device_utilization: float
    """Share of the last second in which its device was at work, in [0, 1]; NaN where NVML is not there."""
    device_used_bytes: float = math.nan
    """Memory of its device that all processes hold; this and all below: NaN where NVML does not tell it."""
    device_power_watts: float = math.nan
    device_core_clock_hertz: float = math.nan
    device_memory_clock_hertz: float = math.nan
    device_throttle_reasons: float = math.nan
    """Why its device is clocked down, as NVML's bits (nvmlClocksEventReasons)."""
    device_corrected_errors: float = math.nan
    """Of its device's memory, since the driver was loaded."""
    device_uncorrected_errors: float = math.nan


@dataclass(frozen=True)
class Measurement:
    """One step's times on this rank and on all. Not part of `metrics.jsonl`: it does not repeat on a resume."""

    step: int
    time: float
    step_seconds: float
    parts: StepParts
    """This rank's own."""
    weight_norm: float
    """Euclidean norm of the clean weights after the step."""
    distance: float
    """Euclidean distance of the clean weights from the initial ones."""
    ranks: tuple[RankMeasurement, ...]
    """By rank; of the one rank itself where it is not rank 0."""


Record: TypeAlias = TrainRecord | EvaluationRecord | EventRecord


@dataclass(frozen=True)
class RunFacts:
    """What is known of a run before its first step; `noise` and `controller` are words for people."""

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
    rank: int = 0
    """The rank that these facts are for."""
    micro_batches_of: tuple[int, ...] = ()
    """Micro-batches of each rank, by rank."""
    revision: str = ""
    """Version of dist_train, with the commit where it runs from a repository."""
    slurm_job: str = ""
    node: str = ""
    nodes: tuple[str, ...] = ()
    """The nodes of the ranks, by rank."""
    launched: float = 0.0
    """When this launch began, in seconds since 1970."""
    device: str = ""
    """What this rank computes on, in words for people."""
    run_id: str = ""
    """The same for every launch of a run, and of no other run."""
    device_memory: int = 0
    """Bytes of memory of this rank's device; 0 without a device."""
    time_limit: float = 0.0
    """When the batch system ends the job, in seconds since 1970; 0 where it does not, or is not asked."""


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
    last_checkpoint: Path | None


_RESERVED = frozenset({"kind", "step", "event", "time"})


def to_json(record: Record) -> str:
    """Return `record` as JSON on one line, without its end; numbers that are not finite become null."""
    fields: dict[str, Detail]
    match record:
        case TrainRecord():
            fields = {"kind": "train", **asdict(record)}
        case EvaluationRecord():
            fields = {"kind": "eval", **asdict(record)}
        case EventRecord():
            assert not _RESERVED & record.details.keys(), f"reserved names in {sorted(record.details)}"
            fields = {"kind": "event", "step": record.step, "event": record.event}
            fields |= {**record.details, "time": record.time}
    return json_text(fields)


def from_json(line: str | bytes) -> Record | None:
    """Return the record that `line` holds; None where it is torn or of another form. Null becomes NaN."""
    try:
        fields = json.loads(line)
        match fields["kind"]:
            case "train":
                return TrainRecord(step=_integer(fields["step"]), **_numbers(fields, *_TRAIN_NUMBERS))
            case "eval":
                return EvaluationRecord(
                    step=_integer(fields["step"]),
                    split=_word(fields["split"]),
                    samples=_integer(fields["samples"]),
                    **_numbers(fields, "epoch", "loss", "accuracy", "time"),
                )
            case "event":
                details = {name: value for name, value in fields.items() if name not in _RESERVED}
                return EventRecord(_integer(fields["step"]), _word(fields["event"]), _number(fields["time"]), details)
            case _:
                return None
    except (ValueError, KeyError, TypeError, RecursionError):
        return None


_TRAIN_NUMBERS = tuple(name for name in TrainRecord.__dataclass_fields__ if name != "step")


def _numbers(fields: Mapping[str, Any], *names: str) -> dict[str, float]:
    return {name: _number(fields[name]) for name in names}


def _number(value: object) -> float:
    if value is None:
        return math.nan
    if isinstance(value, bool) or not isinstance(value, int | float):
        raise TypeError(f"not a number: {value!r}")
    return _bounded(value)


def _integer(value: object) -> int:
    if isinstance(value, bool) or not isinstance(value, int):
        raise TypeError(f"not a whole number: {value!r}")
    return _bounded(value)


def _bounded(value: _Real) -> _Real:
    """Return `value`. Raises ValueError for a whole number that no arithmetic with floats takes."""
    if isinstance(value, int) and abs(value) >= 2**63:
        raise ValueError("a number beyond all bounds")
    return value


def _word(value: object) -> str:
    if not isinstance(value, str):
        raise TypeError(f"not a word: {value!r}")
    return value


def read_records(path: Path) -> tuple[Record, ...]:
    """Return the records of `path` in order, without torn lines. Raises OSError where it cannot be read."""
    with open_regular(path) as file:
        return _parse(file.read())


def read_last_records(path: Path, size: int = 1 << 16) -> tuple[Record, ...]:
    """Return the records in the last `size` bytes of `path`. Raises OSError where it cannot be read."""
    with path.open("rb") as file:
        end = file.seek(0, 2)
        file.seek(max(0, end - size))
        return _parse(file.read())


def _parse(content: bytes) -> tuple[Record, ...]:
    return tuple(record for line in content.split(b"\n") if (record := from_json(line)) is not None)


class Observer:
    """The calls that a run makes, in their order; a subclass overrides those that it needs, the others do nothing.

    A call may raise: the observer is then dropped, and the run continues.
    """

    def begin(self, facts: RunFacts) -> None:
        """The run is about to do its first step."""

    def record(self, record: Record) -> None:
        """Something was measured, or happened."""

    def measurement(self, measurement: Measurement) -> None:
        """What a step took on every rank; at most once per `metrics.every_steps`."""

    def progress(self, step: int) -> None:
        """`step` updates are done; called at every one and within evaluations, so it must cost next to nothing."""

    def sync(self) -> None:
        """Flush to disk what was recorded; called, from any thread, before a checkpoint becomes durable."""

    def end(self, outcome: Outcome) -> None:
        """The run has ended, well or not; release everything."""
