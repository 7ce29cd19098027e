"""The records of a run, and `metrics.jsonl`: one a line, never two for one step and kind, none lost in a crash."""

from __future__ import annotations

import json
import logging
import math
import os
from array import array
from bisect import bisect_left
from collections import defaultdict, deque
from collections.abc import Mapping
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path
from threading import Lock
from typing import Annotated, NamedTuple, TypeAlias

import msgspec

from dist_train.rundir import atomic
from dist_train.rundir.atomic import json_text, read_end, read_regular
from dist_train.rundir.epochs import Epochs, Stage

_logger = logging.getLogger(__name__)

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


_BACKLOG_LIMIT = 100_000  # records: more than there are in RECENT_BYTES
RECENT_BYTES = 1 << 23  # of metrics.jsonl: more than the records that a rank keeps for a takeover
_RESERVED = frozenset({"kind", "step", "event", "time"})
TRAIN_LINE = b'{"kind": "train"'
"""How the line of a training record begins; most lines are such records, and readers need not parse them all."""
_KINDS: Mapping[str, type[Record]] = {"train": TrainRecord, "eval": EvaluationRecord, "event": EventRecord}


def to_json(record: Record) -> str:
    """Return `record` as JSON on one line, without the newline; numbers that are not finite become null."""
    return json_text(_fields(record))


def _fields(record: Record) -> dict[str, Detail]:
    match record:
        case TrainRecord():
            return {"kind": "train", **vars(record)}
        case EvaluationRecord():
            return {"kind": "eval", **vars(record)}
    assert not _RESERVED & record.details.keys(), f"reserved names in {sorted(record.details)}"
    return {"kind": "event", "step": record.step, "event": record.event, **record.details, "time": record.time}


def from_json(line: str | bytes) -> Record | None:
    """Return the record in `line`; None if it is incomplete or of another form. Null becomes NaN."""
    with suppress(ValueError, KeyError, TypeError, AttributeError, RecursionError):
        fields = json.loads(line)
        values = nan_for_null(fields)
        if fields["kind"] == "event":
            values["details"] = {name: value for name, value in fields.items() if name not in _RESERVED}
        return msgspec.convert(values, _KINDS[fields["kind"]])
    return None


def nan_for_null(fields: Mapping[str, object]) -> dict[str, object]:
    """Return `fields` with NaN in place of null, which stands for a number that is not finite."""
    return {name: math.nan if value is None else value for name, value in fields.items()}


def read_records(path: Path) -> tuple[Record, ...]:
    """Return the records of `path` in order, without incomplete lines. Raises OSError if it cannot be read."""
    return _parse(read_regular(path))


def read_last_records(path: Path, size: int = 1 << 16) -> tuple[Record, ...]:
    """Return the records in the last `size` bytes of `path`. Raises OSError if it cannot be read."""
    return _parse(read_end(path, size)[0])


def _parse(content: bytes) -> tuple[Record, ...]:
    return tuple(record for line in content.split(b"\n") if (record := from_json(line)) is not None)


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
        """Called when the run has ended, in whatever way, also if it was refused before `begin`; release everything."""


class JsonLines(Observer):
    """Appends each record to `path` in one write; `flush` flushes to disk.

    A record whose `RecordKey` the end of the file already has is not written again; after `rewind` no older one recurs.
    While writes fail, records wait in memory; the first failure is reported.
    """

    def __init__(self, path: Path) -> None:
        """Open or create `path`. For a resume call `rewind` first."""
        content, size = read_end(path, RECENT_BYTES) if atomic.exists(path) else (b"", 0)
        self._written = dict.fromkeys(key for line in content.split(b"\n") if (key := _key_of_line(line)))
        self._path = path
        self._lock = Lock()
        self._backlog = deque[bytes]([] if content.endswith(b"\n") or not content else [b"\n"])
        # The last lines that the file has, but not yet for certain the disk.
        self._unflushed = deque[bytes](maxlen=_BACKLOG_LIMIT)
        self._size = size  # of the file with these lines
        self._is_torn = False  # whether the file may end in bytes beyond `_size`
        self._is_refused = False
        self._directory_flushed = False
        self._file: int | None = os.open(path, os.O_WRONLY | os.O_APPEND | os.O_CREAT | os.O_CLOEXEC, 0o644)

    def record(self, record: Record) -> None:
        """Append `record`, unless the file has it, or JSON cannot hold it, of which the log warns."""
        key = record_key(record)
        try:
            line = f"{to_json(record)}\n".encode()
        except (TypeError, ValueError) as error:
            _logger.warning("%s lacks a record of step %d: %s", self._path, record.step, error)
            return
        with self._lock:
            if key in self._written:
                return
            self._written[key] = None
            if len(self._written) > _BACKLOG_LIMIT:
                del self._written[next(iter(self._written))]
            if len(self._backlog) >= _BACKLOG_LIMIT:
                self._write_backlog()
            if len(self._backlog) < _BACKLOG_LIMIT:
                self._backlog.append(line)
            self._write_backlog()

    def flush(self) -> None:
        """Flush what was recorded to disk, from any thread. Raises OSError if records still wait in memory, too."""
        with self._lock:
            if self._file is None:
                return
            if (refused := self._write_backlog()) is not None:
                raise refused
            self._flush_lines(self._file)
            if not self._directory_flushed:
                atomic.flush_directory(self._path.parent)
                self._directory_flushed = True

    @property
    def waiting(self) -> bytes:
        """The last lines, which the disk may lack. From any thread."""
        with self._lock:
            return b"".join((*self._unflushed, *self._backlog))

    def end(self, outcome: Outcome) -> None:
        try:
            self.flush()
        except OSError as error:
            _logger.warning("%s lacks the last %d records or more: %s", self._path, len(self._backlog), error)
        with self._lock:
            if self._file is not None:
                os.close(self._file)
                self._file = None

    def _write_backlog(self) -> OSError | None:
        """Write the records that wait; return the error if the file takes no more."""
        while self._backlog and self._file is not None:
            try:
                self._truncate(self._file)
                self._is_torn = True
                line, written = self._backlog[0], 0
                while written < len(line):  # a disk with room for a part takes that, and says at the rest what it lacks
                    written += os.write(self._file, line[written:])
            except OSError as error:
                with suppress(OSError):
                    self._truncate(self._file)
                if not self._is_refused:
                    self._is_refused = True
                    _logger.warning("%s cannot be written, records wait in memory: %s", self._path, error)
                return OSError(error.errno, error.strerror or str(error), str(self._path))
            self._is_torn = False
            self._size += written
            self._unflushed.append(self._backlog.popleft())
        self._is_refused = False
        return None

    def _truncate(self, file: int) -> None:
        """Remove what a failed write or flush has left at the end of the file. Raises OSError."""
        if self._is_torn:
            os.ftruncate(file, self._size)
            self._is_torn = False

    def _flush_lines(self, file: int) -> None:
        """Flush the file. If that fails, its new lines wait in memory again: the next flush may succeed without them.

        A file server reports only then that it has no room for them. Raises OSError.
        """
        try:
            os.fsync(file)
        except OSError:
            self._size -= sum(map(len, self._unflushed))
            self._backlog.extendleft(reversed(self._unflushed))
            self._is_torn = True
            raise
        finally:
            self._unflushed.clear()


_LAUNCH_EVENTS = frozenset(name for name, kind in EVENTS.items() if kind.begins_launch)


def rewind(path: Path, step: int) -> None:
    """Restore `path` to what it was when the checkpoint at `step` was saved, for a run that resumes from it.

    Drops incomplete lines, records after `step`, duplicates by `RecordKey`, and events at `step` that say how a launch
    began, since this launch writes its own. Atomic; does nothing if there is no such file.
    """
    seen: defaultdict[tuple[str, str], array[int]] = defaultdict(lambda: array("q"))  # steps, ascending

    def is_kept(line: bytes) -> bool:
        key = _key_of_line(line)
        if key is None or not 0 <= key.step <= step or (key.step == step and key.part in _LAUNCH_EVENTS):
            return False
        steps = seen[key.kind, key.part]
        place = bisect_left(steps, key.step)
        if is_new := place == len(steps) or steps[place] != key.step:
            steps.insert(place, key.step)
        return is_new

    if atomic.exists(path):
        atomic.keep_lines(path, is_kept)


class RecordKey(NamedTuple):
    """Identifies a record within its run; `part`: an evaluation's split; an event's name and `distinct_by` detail."""

    kind: str
    step: int
    part: str


def record_key(record: Record) -> RecordKey:
    """Return what identifies `record` within its run."""
    key = _key_of_fields(_fields(record))
    assert key is not None
    return key


class _TrainLine(msgspec.Struct):
    step: Count


_TRAIN_LINE = msgspec.json.Decoder(_TrainLine)  # takes a tenth of the time, but lets pass what is not UTF-8


def _key_of_line(line: bytes) -> RecordKey | None:
    with suppress(ValueError, KeyError, TypeError, AttributeError, RecursionError):
        if line.startswith(TRAIN_LINE) and line.isascii():
            return RecordKey("train", _TRAIN_LINE.decode(line).step, "")
        return _key_of_fields(json.loads(line))
    return None


def _key_of_fields(fields: Mapping[str, object]) -> RecordKey | None:
    kind, step = fields["kind"], fields["step"]
    part = fields.get({"eval": "split", "event": "event"}.get(str(kind), ""), "")
    if kind == "event" and part in EVENTS and (detail := EVENTS[str(part)].distinct_by) in fields:
        part = f"{part} {fields[detail]}"
    if isinstance(kind, str) and isinstance(step, int) and isinstance(part, str):
        return RecordKey(kind, step, part)
    return None
