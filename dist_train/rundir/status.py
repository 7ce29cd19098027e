"""The state of a run, in files rewritten as it proceeds: `status.json`, `counts.json`, `ranks.json`.

For launch scripts, tables and people.
"""

from __future__ import annotations

import json
import logging
import math
import os
import socket
import time
from collections import Counter
from collections.abc import Callable, Mapping
from contextlib import suppress
from dataclasses import asdict, dataclass, field, replace
from datetime import UTC, datetime
from pathlib import Path
from typing import Annotated, Literal, TypedDict, Unpack

import yaml
from pydantic import BeforeValidator, Field, TypeAdapter, ValidationError

from dist_train.config.loading import flat_settings, parse_yaml, yaml_fault
from dist_train.outcome import ExitCode, shortened
from dist_train.rundir import atomic
from dist_train.rundir.atomic import json_text, nan_for_null, read_regular
from dist_train.rundir.lock import check_of_run, pid_namespace
from dist_train.rundir.paths import BrokenFileError, RunDirectory
from dist_train.rundir.records import EventRecord, Measurement, Observer, Outcome, RankMeasurement, Record

State = Literal["starting", "running", "stopping", "stopped", "finished", "failed"]

LAUNCH_VARIABLE = "DIST_TRAIN_LAUNCH"  # so that a script does not mistake the outcome of an earlier launch

_Count = Annotated[int, Field(ge=0, lt=2**63)]
_Finite = Annotated[float, Field(allow_inf_nan=False)]

_WRITE_INTERVAL_SECONDS = 1.0
_logger = logging.getLogger(__name__)


@dataclass(frozen=True)
class Status:
    """The fields of `status.json`; times are ISO 8601 in UTC, `exit_code` is None while the run continues."""

    state: State
    step: _Count
    epoch: _Finite
    total_steps: _Count | None
    world_size: _Count
    reason: str
    exit_code: int | None
    launch: str
    host: str
    pid: _Count
    started: str
    updated: str
    finished: str | None
    best_accuracy: _Finite | None
    samples_per_second: _Finite | None
    slurm_job: str = ""
    generation: _Count = 1  # how often the ranks of this launch have met: more than once if some were lost or joined
    environment: Mapping[str, str] = field(default_factory=dict)  # versions, and device, of the last launch
    metrics: str = ""  # the URL at which rank 0 serves the run's metrics; empty while it does not
    pid_namespace: str = ""  # of `pid`: containers number their processes themselves; empty if unknown
    total_epochs: _Finite | None = None  # at the end; not in proportion to updates if the batch grows

    @property
    def is_here(self) -> bool:
        """Whether `pid` is a number in the PID namespace of this process, on this host."""
        return self.host == socket.gethostname() and self.pid_namespace in ("", pid_namespace())

    def ended(self, state: State, code: ExitCode, reason: str) -> Status:
        """Return the final status, in `state`, of a launch."""
        now = _now()
        return replace(self, state=state, exit_code=int(code), reason=reason, finished=now, updated=now, metrics="")

    def to_json(self) -> str:
        """Return the text of the file."""
        return json_text(asdict(self), indent=2) + "\n"


class StatusFields(TypedDict, total=False):
    """The fields of `Status` that a launch sets while it runs."""

    step: int
    epoch: float
    total_steps: int | None
    total_epochs: float | None
    best_accuracy: float | None
    samples_per_second: float | None
    world_size: int
    reason: str
    generation: int
    environment: Mapping[str, str]


_STATUS = TypeAdapter(Status)


class RewrittenFile:
    """A small file that is rewritten as a run proceeds. A series of failed writes causes a single warning.

    `check` raises OSError if it may no longer be written (default: once another run has the folder than has it now).
    """

    def __init__(self, path: Path, check: Callable[[], None] | None = None) -> None:
        self.path = path
        self.is_refused = False
        self._check = check or check_of_run(RunDirectory(path.parent))

    def swap(self, content: str) -> None:
        """Write `content`, as `swap_text` does. Raises OSError."""
        self._check()
        atomic.swap_text(self.path, content)

    def write(self, content: str) -> None:
        """Write `content`, if that is possible."""
        try:
            self.swap(content)
        except OSError as error:
            if not self.is_refused:
                _logger.warning("%s cannot be written; training continues: %s", self.path, error)
            self.is_refused = True
        else:
            self.is_refused = False


class StatusFile:
    """The status of this launch, rewritten at every change of state, and otherwise at most once a second."""

    def __init__(
        self,
        path: Path,
        world_size: int,
        before: Status | None = None,
        metrics: Callable[[], str] = str,
        check: Callable[[], None] | None = None,
    ) -> None:
        """Begin in state `starting`, with the progress of `before`; nothing is written yet.

        `metrics` returns the URL of the metrics at the moment; `check`: see `RewrittenFile`.
        """
        self._file = RewrittenFile(path, check)
        self._metrics = metrics
        now = _now()
        self.current = Status(  # as it is now, written or not
            state="starting",
            step=before.step if before else 0,
            epoch=before.epoch if before else 0.0,
            total_steps=before.total_steps if before else None,
            total_epochs=before.total_epochs if before else None,
            world_size=world_size,
            reason="",
            exit_code=None,
            launch=os.environ.get(LAUNCH_VARIABLE, ""),
            host=socket.gethostname(),
            pid=os.getpid(),
            started=now,
            updated=now,
            finished=None,
            best_accuracy=before.best_accuracy if before else None,
            samples_per_second=None,
            slurm_job=os.environ.get("SLURM_JOB_ID", ""),
            environment=before.environment if before else {},
            pid_namespace=pid_namespace(),
        )
        self._written = 0.0

    def note(self, **fields: Unpack[StatusFields]) -> None:
        """Set `fields`, to be written with the next write."""
        self.current = replace(self.current, **fields)

    def change(self, state: State, **fields: Unpack[StatusFields]) -> None:
        """Enter `state` and write at once."""
        self.current = replace(self.current, state=state, **fields)
        self._write()

    def progress(self, **fields: Unpack[StatusFields]) -> None:
        """Set `fields`, and write them if the last write is at least a second ago.

        Does not overwrite a failure that another rank of this launch has recorded, which may be a step behind this one.
        One two steps behind was of an earlier launch: under torchrun and mpirun launches have no names.
        """
        self.note(**fields)
        is_due = time.monotonic() - self._written >= _WRITE_INTERVAL_SECONDS
        if is_due and not another_failed(self._file.path, since=self.current.step - 1):
            self._write()

    def end(self, state: State, exit_code: ExitCode, reason: str) -> None:
        """Enter the final state of this launch."""
        self.current = self.current.ended(state, exit_code, reason)
        self._write()

    def _write(self) -> None:
        self._written = time.monotonic()
        self.current = replace(self.current, updated=_now(), metrics="" if self.current.finished else self._metrics())
        text = self.current.to_json()
        self._file.write(text)
        if self._file.is_refused and self.current.finished is not None:
            with suppress(OSError):
                directory = RunDirectory(self._file.path.parent)
                directory.spend_reserve(lambda: self._file.swap(text))


def load_status(path: Path) -> Status:
    """Return the status at `path`; unknown fields, of a later version, are ignored. Raises BrokenFileError."""
    try:
        return _STATUS.validate_json(read_regular(path))
    except FileNotFoundError:
        raise BrokenFileError(f"no {path.name}") from None
    except OSError as error:
        raise BrokenFileError(f"{path.name} cannot be read: {error.strerror}") from error
    except ValidationError as error:
        first = error.errors()[0]
        place = "".join(f"{name}: " for name in first["loc"])
        raise BrokenFileError(f"{path.name} is no status of a run: {place}{first['msg']}") from error


def read_status(path: Path) -> Status | None:
    """Return the status at `path`; None if there is no valid one."""
    try:
        return load_status(path)
    except BrokenFileError:
        return None


def runs_with_result(folder: Path) -> tuple[str, ...]:
    """Return the names of the runs in `folder` that have finished or diverged, in order."""
    statuses = ((path.parent.name, read_status(path)) for path in folder.glob(f"*/{RunDirectory(folder).status.name}"))
    return tuple(
        sorted(
            name
            for name, status in statuses
            if status is not None and (status.state == "finished" or status.exit_code == ExitCode.DIVERGED)
        )
    )


def record_lost(path: Path, launch: str, reason: str) -> None:
    """Record in the status at `path` that `launch`, whose processes have all ended, has failed, if none of them has
    recorded an end.
    """
    status = read_status(path)
    if status is None or status.launch != launch or status.exit_code is not None:
        return
    text = status.ended("failed", ExitCode.FAULT, shortened(reason)).to_json()
    with suppress(OSError):  # the old status stays
        RunDirectory(path.parent).spend_reserve(lambda: atomic.swap_text(path, text))


def record_end(path: Path, state: State, exit_code: ExitCode, reason: str) -> None:
    """Replace the end in the status at `path`, of a launch that has ended. Raises BrokenFileError or OSError."""
    atomic.swap_text(path, load_status(path).ended(state, exit_code, reason).to_json())


def another_failed(path: Path, since: int = 0) -> bool:
    """Whether another process of this launch has recorded in the status at `path` that it failed, at step `since` or
    later.
    """
    status = read_status(path)
    if status is None or status.state != "failed" or status.launch != os.environ.get(LAUNCH_VARIABLE, ""):
        return False
    # Processes of two nodes, or of two containers, may have the same number.
    return status.step >= since and (not status.is_here or status.pid != os.getpid())


def _now() -> str:
    return datetime.now(UTC).isoformat(timespec="milliseconds")


def read_settings(path: Path) -> Mapping[str, object]:
    """Return a run's settings, of any version, by dotted path; empty without a file. Raises BrokenFileError."""
    try:
        sections = parse_yaml(read_regular(path), is_dumped=True)
    except FileNotFoundError:
        return {}  # the run has not written it yet
    except OSError as error:
        raise BrokenFileError(f"{path.name} cannot be read: {error.strerror}") from error
    except yaml.YAMLError as error:
        raise BrokenFileError(f"{path.name} is not YAML: {yaml_fault(error)}") from error
    if not isinstance(sections, dict):
        raise BrokenFileError(f"{path.name} holds no settings")
    return dict(flat_settings(sections))


def fallback_directory(run: RunDirectory) -> Path | None:
    """Return the setting `checkpoint.fallback_directory` of `run`; None if it has none, or cannot be read."""
    with suppress(BrokenFileError):
        if isinstance(folder := read_settings(run.config).get("checkpoint.fallback_directory"), str):
            return Path(folder)
    return None


class EventCounts(Observer):
    """Counts event records in `path`, over all launches of the run; a resume does not rewind the counts."""

    def __init__(self, path: Path) -> None:
        """Read the counts so far; if the file is broken, report it and start from zero."""
        self._file = RewrittenFile(path)
        try:
            self._counts = Counter(read_counts(path))
        except (OSError, ValueError) as error:
            _logger.warning("%s cannot be used, the counts of events begin anew: %s", path, error)
            self._counts = Counter()
            self._write()

    def record(self, record: Record) -> None:
        if isinstance(record, EventRecord):
            self._counts[record.event] += 1
            self._write()

    def end(self, outcome: Outcome) -> None:
        """Try once more if the last write failed."""
        if self._file.is_refused:
            self._write()

    def _write(self) -> None:
        self._file.write(json.dumps(dict(sorted(self._counts.items())), indent=2) + "\n")


def read_counts(path: Path) -> Mapping[str, int]:
    """Return the counts in `path`, empty if there is no such file. Raises OSError or ValueError if it is broken."""
    try:
        content = read_regular(path)
    except FileNotFoundError:
        return {}
    try:
        return _COUNTS.validate_json(content)
    except ValidationError as error:
        raise ValueError(f"it does not hold counts of events: {error.errors()[0]['msg']}") from error


def _with_nan(rank: object) -> object:
    return nan_for_null(rank) if isinstance(rank, dict) else rank


@dataclass(frozen=True)
class RanksReading:
    """The content of `ranks.json`: the measurements of all ranks, by rank, at `step`; `time` in seconds since 1970."""

    step: int
    time: float
    ranks: tuple[Annotated[RankMeasurement, BeforeValidator(_with_nan)], ...]


class RanksFile(Observer):
    """Writes the latest measurement to `ranks.json`, at most once a second, and at the end."""

    def __init__(self, path: Path) -> None:
        self._file = RewrittenFile(path)
        self._due = -math.inf
        self._pending: Measurement | None = None

    def measurement(self, measurement: Measurement) -> None:
        """Keep `measurement`, and write it if the last write is at least a second ago."""
        self._pending = measurement
        if time.monotonic() >= self._due:
            self._write()

    def end(self, outcome: Outcome) -> None:
        """Write the last measurement, unless it has been written."""
        self._write()

    def _write(self) -> None:
        if self._pending is None:
            return
        self._due = time.monotonic() + _WRITE_INTERVAL_SECONDS
        ranks = [rank._asdict() for rank in self._pending.ranks]
        self._file.write(json_text({"step": self._pending.step, "time": self._pending.time, "ranks": ranks}) + "\n")
        if not self._file.is_refused:
            self._pending = None


def read_ranks(path: Path) -> RanksReading | None:
    """Return the content of the file at `path`, with null as NaN; None if there is no valid one."""
    try:
        return _RANKS.validate_json(read_regular(path))
    except (OSError, ValidationError):
        return None


_COUNTS = TypeAdapter(dict[str, Annotated[int, Field(strict=True, ge=0)]])
_RANKS = TypeAdapter(RanksReading)
