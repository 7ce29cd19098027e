"""One run as its directory shows it, and which runs a report is of."""

from __future__ import annotations

import json
import math
import os
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Literal

import yaml

from dist_train.outcome import UsageError
from dist_train.report.results import Analyses, read_analyses
from dist_train.rundir.paths import StudyDirectory
from dist_train.rundir.records import EvaluationRecord, EventRecord, Record, TrainRecord, read_records
from dist_train.rundir.status import Status, read_status
from dist_train.watch.run_table import is_run, read_state


@dataclass(frozen=True)
class Planned:
    """What a study says of one of its runs."""

    name: str
    variant: str
    title: str
    """What the study calls the variant."""
    seed: int | None
    overrides: tuple[str, ...]
    batch: int | None = None
    """Its global batch; None where neither the run nor the study's base configuration says it."""


@dataclass(frozen=True)
class StoredRun:
    """A run. `state` is status.json's, or `lost`, `broken` or `missing`, and `note` says why."""

    directory: Path
    name: str
    state: str
    note: str
    planned: Planned | None = None
    settings: Mapping[str, object] = field(default_factory=dict)
    """By dotted path; empty where config.yaml is missing or broken."""
    status: Status | None = None
    train: tuple[TrainRecord, ...] = ()
    evaluations: tuple[EvaluationRecord, ...] = ()
    events: tuple[EventRecord, ...] = ()
    analyses: Analyses = field(default_factory=Analyses)

    @property
    def is_finished(self) -> bool:
        """Whether its last measurement is its result."""
        return self.state == "finished"

    @property
    def seed(self) -> int | None:
        """Return the seed, as its settings or the study have it."""
        seed = self.settings.get("run.seed", self.planned.seed if self.planned else None)
        return seed if isinstance(seed, int) else None

    @property
    def batch(self) -> int | None:
        """Return the global batch."""
        size = self.settings.get("batch.global_size")
        return size if isinstance(size, int) else None

    def last(self, split: str) -> EvaluationRecord | None:
        """Return the last evaluation of `split`; None without one, and where it is not finite."""
        found = [record for record in self.evaluations if record.split == split][-1:]
        return next(filter(_is_finite, found), None)

    def split(self, split: str) -> tuple[EvaluationRecord, ...]:
        """Return the evaluations of `split`, in order, but for those that are not finite."""
        return tuple(record for record in self.evaluations if record.split == split and _is_finite(record))


def _is_finite(record: EvaluationRecord) -> bool:
    return math.isfinite(record.accuracy) and math.isfinite(record.loss)


def read_run(directory: Path, name: str, planned: Planned | None = None) -> StoredRun:
    """Return the run in `directory`; what is wrong with it stands in its state and note, never raised."""
    if not directory.is_dir():
        return StoredRun(directory, name, "missing", "it has not begun: its folder is not there", planned)
    if not is_run(directory):
        return StoredRun(directory, name, "missing", "it has not begun: its folder is empty", planned)
    records, problem = _records(directory / "metrics.jsonl")
    settings, fault = read_settings(directory / "config.yaml")
    state, note = read_state(directory)
    if problem or fault:
        state, note = "broken", problem or fault
    elif state == "finished" and not any(isinstance(record, EvaluationRecord) for record in records):
        state, note = "broken", "it has finished, but metrics.jsonl holds no evaluation"
    return StoredRun(
        directory=directory,
        name=name,
        state=state,
        note=note,
        planned=planned,
        settings=settings,
        status=read_status(directory / "status.json"),
        train=tuple(record for record in records if isinstance(record, TrainRecord)),
        evaluations=tuple(record for record in records if isinstance(record, EvaluationRecord)),
        events=tuple(record for record in records if isinstance(record, EventRecord)),
        analyses=read_analyses(directory),
    )


def flat_settings(sections: Mapping[str, object], prefix: str = "") -> Iterator[tuple[str, object]]:
    """Yield the settings of nested `sections` under dotted paths, in their order."""
    for name, value in sections.items():
        if isinstance(value, Mapping):
            yield from flat_settings(value, f"{prefix}{name}.")
        else:
            yield f"{prefix}{name}", value


def _records(path: Path) -> tuple[tuple[Record, ...], str]:
    try:
        return read_records(path), ""
    except FileNotFoundError:
        return (), "it has no metrics.jsonl"
    except OSError as error:
        return (), f"metrics.jsonl cannot be read: {error.strerror}"


def read_settings(path: Path) -> tuple[Mapping[str, object], str]:
    """Return the settings of a configuration file by dotted path; none, and why, where it cannot be read."""
    try:
        sections = yaml.safe_load(path.read_bytes())
    except FileNotFoundError:
        return {}, ""
    except (OSError, yaml.YAMLError) as error:
        return {}, f"config.yaml cannot be read: {str(error).splitlines()[0]}"
    return (
        (dict(flat_settings(sections)), "") if isinstance(sections, Mapping) else ({}, "config.yaml holds no settings")
    )


PLAN = "runs.json"
"""In a study's folder: its runs, in order."""
_BATCH = "batch.global_size"


@dataclass(frozen=True)
class Subject:
    """What a report is of; the runs' names differ from each other."""

    directory: Path
    kind: Literal["run", "study", "folder"]
    runs: tuple[StoredRun, ...]

    @property
    def title(self) -> str:
        """Return what the study calls itself, else the folder's name."""
        return _study_title(self.directory) if self.kind == "study" else self.directory.resolve().name


def read_subject(directory: Path) -> Subject:
    """Return the runs of `directory`. Raises UsageError where it is no folder, or there is no run in it."""
    if not directory.is_dir():
        raise UsageError(f"there is no folder {directory}: name a run, a study, or a folder of runs")
    if (directory / PLAN).is_file():
        return Subject(directory, "study", tuple(_study_runs(directory, "")))
    if is_run(directory):
        return Subject(directory, "run", (read_run(directory, directory.resolve().name),))
    runs = tuple(_runs_below(directory))
    if not runs:
        raise UsageError(f"there is no run at or below {directory}: name a run, a study, or a folder of runs")
    return Subject(directory, "folder", runs)


def read_plan(path: Path) -> tuple[Planned, ...]:
    """Return the runs that a study's `runs.json` names. Raises UsageError where it cannot be used."""
    try:
        content = json.loads(path.read_bytes())
        entries = content["runs"] if isinstance(content, Mapping) else content
        base, _ = read_settings(StudyDirectory(path.parent).base)
        return tuple(_planned(entry, base.get(_BATCH)) for entry in entries)
    except OSError as error:
        raise UsageError(f"cannot read {path}: {error.strerror}") from error
    except (ValueError, KeyError, TypeError, AttributeError) as error:
        raise UsageError(
            f"{path} is not a list of runs ({error!r}): start the study's sweep again, which writes it"
        ) from error


def _planned(entry: Mapping[str, object], base_batch: object) -> Planned:
    name, seed, overrides = str(entry["name"]), entry.get("seed"), entry.get("overrides") or ()
    if isinstance(overrides, Mapping):
        overrides = [f"{path}={value}" for path, value in overrides.items()]
    if not isinstance(overrides, list | tuple):
        raise TypeError(f"overrides of {name}: {overrides!r}")
    return Planned(
        name=name,
        variant=str(entry.get("variant") or ""),
        title=str(entry.get("title") or entry.get("variant") or ""),
        seed=seed if isinstance(seed, int) else None,
        overrides=tuple(map(str, overrides)),
        batch=_batch(tuple(map(str, overrides)), base_batch),
    )


def _batch(overrides: tuple[str, ...], base_batch: object) -> int | None:
    for override in overrides:
        path, _, value = override.partition("=")
        if path.strip() == _BATCH and value.strip().isdecimal():
            return int(value)
    return base_batch if isinstance(base_batch, int) else None


def _study_runs(directory: Path, prefix: str) -> Iterator[StoredRun]:
    for planned in read_plan(directory / PLAN):
        yield read_run(directory / planned.name, prefix + planned.name, planned)


def _runs_below(directory: Path) -> Iterator[StoredRun]:
    for folder, children, files in os.walk(directory):
        path = Path(folder)
        name = str(path.relative_to(directory))
        if PLAN in files:
            children.clear()
            yield from _study_runs(path, f"{name}/")
        elif path != directory and is_run(path):
            children.clear()
            yield read_run(path, name)
        children.sort()


def _study_title(directory: Path) -> str:
    try:
        fields = yaml.safe_load((directory / "study.yaml").read_bytes())
    except (OSError, yaml.YAMLError):
        fields = None
    title = (fields.get("title") or fields.get("name")) if isinstance(fields, Mapping) else None
    return str(title or directory.resolve().name)
