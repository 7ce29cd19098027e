"""The runs below a folder, read from what each left behind, as a table."""

from __future__ import annotations

import json
import os
import socket
from collections.abc import Iterator, Mapping
from contextlib import suppress
from dataclasses import dataclass
from datetime import UTC, datetime, timedelta
from pathlib import Path
from statistics import fmean
from typing import Any

import yaml
from rich.box import SIMPLE_HEAD
from rich.table import Table
from rich.text import Text

from dist_train.monitoring import wording
from dist_train.outcome import UsageError
from dist_train.rundir.records import EvaluationRecord, TrainRecord, read_records

STALE_AFTER = timedelta(minutes=10)
"""How long a run on another host may be silent before it counts as lost."""

ALIVE = frozenset({"starting", "running", "stopping"})
_KNOWN = ALIVE | {"stopped", "finished", "failed"}
_MARKS = ("status.json", "metrics.jsonl", "checkpoints")
COLOURS = {
    "starting": "cyan",
    "running": "cyan",
    "stopping": "cyan",
    "stopped": "yellow",
    "finished": "green",
    "failed": "red",
    "lost": "magenta",
    "broken": "red",
}


@dataclass(frozen=True)
class RunSummary:
    """One run at a glance. `state` is status.json's, or `lost` or `broken`; `note` says why."""

    directory: Path
    name: str
    state: str
    note: str
    step: int | None = None
    total_steps: int | None = None
    epoch: float | None = None
    world_size: int | None = None
    best_accuracy: float | None = None
    samples_per_second: float | None = None
    seconds_left: float | None = None
    model: str | None = None
    data: str | None = None
    global_size: int | None = None
    noise: str | None = None
    slurm_job: str = ""
    """Slurm's number of the job that the run was in last; empty outside of Slurm."""


def read_runs(
    directory: Path, now: datetime | None = None, stale_after: timedelta = STALE_AFTER
) -> tuple[RunSummary, ...]:
    """Return every run at or below `directory`, by path. Raises UsageError where that is no folder."""
    if not directory.is_dir():
        raise UsageError(f"there is no folder {directory}: name the folder that holds the runs")
    moment = now or datetime.now(UTC)
    return tuple(_read_run(path, directory, moment, stale_after) for path in _run_directories(directory))


def read_state(directory: Path) -> tuple[str, str]:
    """Return the state of the run in `directory` as tables show it, and why; of its records only the age counts."""
    try:
        status = _read_status(directory / "status.json")
    except BrokenError as error:
        return "broken", str(error)
    return _state(status, directory / "metrics.jsonl", datetime.now(UTC), STALE_AFTER)


def is_run(directory: Path) -> bool:
    """Whether a run has begun in `directory`."""
    return any((directory / mark).exists() for mark in _MARKS)


def render(summaries: tuple[RunSummary, ...], job_states: Mapping[str, str] | None = None) -> Table:
    """Return the runs as a table; where `job_states` has Slurm's states of their jobs, with those."""
    table = Table(box=SIMPLE_HEAD, pad_edge=False, header_style="bold")
    table.add_column("run", overflow="fold")
    for heading in ("state", "model", "data"):
        table.add_column(heading, no_wrap=True)
    for heading in ("batch", "ranks", "epoch", "step", "done", "best", "images/s", "left"):
        table.add_column(heading, justify="right", no_wrap=True)
    table.add_column("note", overflow="fold")
    if job_states:
        table.add_column("slurm", no_wrap=True)
    for run in summaries:
        slurm = (Text(f"{run.slurm_job} {job_states.get(run.slurm_job, '')}".strip()),) if job_states else ()
        table.add_row(
            Text(run.name),
            Text(run.state, style=COLOURS.get(run.state, "")),
            Text(run.model or ""),
            Text(run.data or ""),
            *(Text(cell) for cell in _numbers(run)),
            Text(run.note),
            *slurm,
        )
    return table


def _numbers(run: RunSummary) -> tuple[str, ...]:
    done = run.step / run.total_steps if run.step is not None and run.total_steps else None
    steps = "" if run.step is None else f"{run.step:,}"
    return (
        "" if run.global_size is None else f"{run.global_size:,}",
        "" if run.world_size is None else str(run.world_size),
        "" if run.epoch is None else f"{run.epoch:.4g}",
        f"{steps}/{run.total_steps:,}" if run.total_steps else steps,
        "" if done is None else f"{done:.0%}",
        "" if run.best_accuracy is None else wording.percent(run.best_accuracy),
        "" if run.samples_per_second is None else wording.rate(run.samples_per_second),
        "" if run.seconds_left is None else wording.duration(run.seconds_left),
    )


def _run_directories(directory: Path) -> Iterator[Path]:
    for folder, children, files in os.walk(directory):
        if any(mark in files or mark in children for mark in _MARKS):
            children.clear()
            yield Path(folder)
        children.sort()


class BrokenError(Exception):
    """A run directory that cannot be read; its text says why."""


def _read_run(path: Path, root: Path, now: datetime, stale_after: timedelta) -> RunSummary:
    name = path.name if path == root else str(path.relative_to(root))
    try:
        status = _read_status(path / "status.json")
        settings = read_settings(path / "config.yaml")
        latest, best = _read_metrics(path / "metrics.jsonl")
    except BrokenError as error:
        return RunSummary(path, name, "broken", str(error))
    state, note = _state(status, path / "metrics.jsonl", now, stale_after)
    return RunSummary(
        directory=path,
        name=name,
        state=state,
        note=note,
        step=status.step,
        total_steps=status.total_steps,
        epoch=status.epoch,
        world_size=status.world_size,
        best_accuracy=status.best_accuracy if status.best_accuracy is not None else best,
        samples_per_second=_throughput(status, latest),
        seconds_left=_seconds_left(status, latest) if state in ALIVE else None,
        model=settings.model,
        data=settings.data,
        global_size=settings.global_size,
        noise=settings.noise,
        slurm_job=status.slurm_job,
    )


@dataclass(frozen=True)
class _Status:
    state: str
    reason: str
    step: int
    epoch: float
    total_steps: int | None
    world_size: int | None
    host: str
    pid: int | None
    started: datetime | None
    updated: datetime | None
    best_accuracy: float | None
    samples_per_second: float | None
    slurm_job: str


@dataclass(frozen=True)
class Settings:
    """What a table shows of a run's settings; None where `config.yaml` does not say."""

    model: str | None = None
    data: str | None = None
    global_size: int | None = None
    noise: str | None = None


def _read_status(path: Path) -> _Status:
    try:
        fields = json.loads(path.read_bytes())
    except FileNotFoundError:
        raise BrokenError("no status.json") from None
    except OSError as error:
        raise BrokenError(f"status.json cannot be read: {error.strerror}") from error
    except ValueError as error:
        raise BrokenError(f"status.json is not JSON: {error}") from error
    if not isinstance(fields, dict) or fields.get("state") not in _KNOWN:
        raise BrokenError("status.json names no state of a run")
    try:
        return _Status(
            state=fields["state"],
            reason=str(fields.get("reason") or ""),
            step=int(fields["step"]),
            epoch=float(fields["epoch"]),
            total_steps=_optional(int, fields.get("total_steps")),
            world_size=_optional(int, fields.get("world_size")),
            host=str(fields.get("host") or ""),
            pid=_optional(int, fields.get("pid")),
            started=_optional(_moment, fields.get("started")),
            updated=_optional(_moment, fields.get("updated")),
            best_accuracy=_optional(float, fields.get("best_accuracy")),
            samples_per_second=_optional(float, fields.get("samples_per_second")),
            slurm_job=str(fields.get("slurm_job") or ""),
        )
    except (KeyError, TypeError, ValueError) as error:
        raise BrokenError(f"status.json is not as it should be: {error!r}") from error


def _optional(read: Any, value: object) -> Any:
    return None if value is None else read(value)


def _moment(text: str) -> datetime:
    moment = datetime.fromisoformat(text)
    return moment if moment.tzinfo else moment.replace(tzinfo=UTC)


def read_settings(path: Path) -> Settings:
    """Return what a table shows; the rest of the file may be of another version. Raises BrokenError."""
    try:
        sections = yaml.safe_load(path.read_bytes())
    except FileNotFoundError:
        return Settings()  # it has not got so far
    except OSError as error:
        raise BrokenError(f"config.yaml cannot be read: {error.strerror}") from error
    except yaml.YAMLError as error:
        raise BrokenError(f"config.yaml is not YAML: {str(error).splitlines()[0]}") from error
    if not isinstance(sections, dict):
        raise BrokenError("config.yaml holds no settings")
    size = _setting(sections, "batch", "global_size")
    method = _setting(sections, "noise", "method")
    amplitude = _setting(sections, "noise", "amplitude")
    return Settings(
        model=_setting(sections, "model", "name"),
        data=_setting(sections, "data", "name"),
        global_size=size if isinstance(size, int) else None,
        noise=method if method in (None, "none") or amplitude is None else f"{method} {amplitude}",
    )


def _setting(sections: Mapping[str, Any], section: str, key: str) -> Any:
    values = sections.get(section)
    return values.get(key) if isinstance(values, dict) else None


def _read_metrics(path: Path) -> tuple[tuple[TrainRecord, ...], float | None]:
    """Return the latest training records, and the best test accuracy of all."""
    try:
        records = read_records(path)
    except FileNotFoundError:
        return (), None
    except OSError as error:
        raise BrokenError(f"metrics.jsonl cannot be read: {error.strerror}") from error
    latest = tuple(record for record in records if isinstance(record, TrainRecord))[-50:]
    tested = [record.accuracy for record in records if isinstance(record, EvaluationRecord) and record.split == "test"]
    return latest, max(tested, default=None)


def _state(status: _Status, metrics: Path, now: datetime, stale_after: timedelta) -> tuple[str, str]:
    if status.state not in ALIVE:
        return status.state, status.reason
    seen = _last_sign(status, metrics)
    if status.host == socket.gethostname() and status.pid is not None:
        if not process_runs(status.pid, seen):
            return "lost", f"its process {status.pid} is gone; start it again to resume"
        return status.state, status.reason
    if seen is None or now - seen > stale_after:
        silence = "never seen" if seen is None else f"silent for {wording.duration((now - seen).total_seconds())}"
        where = f" on {status.host}" if status.host else ""
        return "lost", f"{silence}{where}; start it again to resume"
    return status.state, status.reason


def _last_sign(status: _Status, metrics: Path) -> datetime | None:
    signs = [moment for moment in (status.updated, status.started) if moment is not None]
    with suppress(OSError):
        signs.append(datetime.fromtimestamp(metrics.stat().st_mtime, UTC))
    return max(signs, default=None)


def process_runs(pid: int, seen: datetime | None) -> bool:
    """Whether process `pid` lives and is the one last seen at `seen`, not a later one of its number."""
    try:
        stat = Path(f"/proc/{pid}/stat").read_text()
        boot = next(line for line in Path("/proc/stat").read_text().splitlines() if line.startswith("btime"))
    except OSError:
        return False
    fields = stat.rpartition(")")[2].split()
    if fields[0] in "ZX":
        return False
    begun = int(boot.split()[1]) + int(fields[19]) / os.sysconf("SC_CLK_TCK")
    # the boot time is known to the second only
    return seen is None or begun <= seen.timestamp() + 2.0


def _throughput(status: _Status, latest: tuple[TrainRecord, ...]) -> float | None:
    if status.samples_per_second is not None:
        return status.samples_per_second
    return latest[-1].samples_per_second if latest else None


def _seconds_left(status: _Status, latest: tuple[TrainRecord, ...]) -> float | None:
    """Return the time to the last step at the pace of the latest records, with what happens between steps."""
    if status.total_steps is None:
        return None
    step = max(status.step, latest[-1].step) if latest else status.step
    steps_left = max(0, status.total_steps - step)
    if len(latest) >= 2 and latest[-1].step > latest[0].step and latest[-1].time > latest[0].time:
        return steps_left * (latest[-1].time - latest[0].time) / (latest[-1].step - latest[0].step)
    return steps_left * fmean(record.step_seconds for record in latest) if latest else None


def targets_directories(directory: Path) -> tuple[Path, ...]:
    """Return the `metrics.targets_directory` of the runs at or below `directory`, each folder once.

    Raises UsageError where `directory` is no folder.
    """
    folders: dict[Path, None] = {}
    for run in read_runs(directory):
        try:
            sections = yaml.safe_load((run.directory / "config.yaml").read_bytes())
            folder = sections["metrics"]["targets_directory"]
        except (OSError, yaml.YAMLError, TypeError, KeyError):
            continue  # the table of runs tells of it
        if isinstance(folder, str):
            folders[Path(folder).expanduser().absolute()] = None
    return tuple(folders)
