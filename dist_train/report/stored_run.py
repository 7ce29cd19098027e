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
from dist_train.rundir.paths import RunDirectory
from dist_train.rundir.records import EvaluationRecord, EventRecord, Record, TrainRecord
from dist_train.rundir.status import Status, read_status
from dist_train.sweep.planned_runs import BASE_FILE, RUNS_FILE, STUDY_FILE
from dist_train.watch.run_table import BrokenError, read_measurements, read_settings, read_state

_BATCH = "batch.global_size"


@dataclass(frozen=True)
class Planned:
    """What a study says of one of its runs; `title` is what it calls the variant.

    `batch` is None where neither the run nor the study's base configuration says it.
    """

    name: str
    variant: str
    title: str
    seed: int | None
    overrides: tuple[str, ...]
    batch: int | None = None


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
        size = self.settings.get(_BATCH)
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


def read_run(root: Path, name: str, planned: Planned | None = None) -> StoredRun:
    """Return the run in `root`; what is wrong with it stands in its state and note, never raised."""
    directory = RunDirectory(root)
    if not directory.has_begun:
        what = "empty" if root.is_dir() else "not there"
        return StoredRun(root, name, "missing", f"it has not begun: its folder is {what}", planned)
    state, note = read_state(directory)
    records: tuple[Record, ...] = ()
    settings: Mapping[str, object] = {}
    try:
        settings = read_settings(directory.config)
        records = read_measurements(directory.metrics)
        if not directory.metrics.exists():
            raise BrokenError(f"it has no {directory.metrics.name}")
        if state == "finished" and not any(isinstance(record, EvaluationRecord) for record in records):
            raise BrokenError(f"it has finished, but {directory.metrics.name} holds no evaluation")
    except BrokenError as error:
        state, note = "broken", str(error)
    return StoredRun(
        directory=root,
        name=name,
        state=state,
        note=note,
        planned=planned,
        settings=settings,
        status=read_status(directory.status),
        train=tuple(record for record in records if isinstance(record, TrainRecord)),
        evaluations=tuple(record for record in records if isinstance(record, EvaluationRecord)),
        events=tuple(record for record in records if isinstance(record, EventRecord)),
        analyses=read_analyses(directory),
    )


@dataclass(frozen=True)
class Subject:
    """What a report is of; the runs' names differ from each other."""

    directory: Path
    kind: Literal["run", "study", "folder"]
    runs: tuple[StoredRun, ...]

    @property
    def title(self) -> str:
        """Return what the study calls itself, else the folder's name."""
        name = self.directory.resolve().name
        if self.kind == "study":
            try:
                fields = yaml.safe_load((self.directory / STUDY_FILE).read_bytes())
            except (OSError, yaml.YAMLError):
                fields = None
            if isinstance(fields, Mapping):
                return str(fields.get("title") or fields.get("name") or name)
        return name


def read_subject(directory: Path) -> Subject:
    """Return the runs of `directory`. Raises UsageError where it is no folder, or there is no run in it."""
    if not directory.is_dir():
        raise UsageError(f"there is no folder {directory}: name a run, a study, or a folder of runs")
    if (directory / RUNS_FILE).is_file():
        return Subject(directory, "study", tuple(_study_runs(directory, "")))
    if RunDirectory(directory).has_begun:
        return Subject(directory, "run", (read_run(directory, directory.resolve().name),))
    runs = tuple(_runs_below(directory))
    if not runs:
        raise UsageError(f"there is no run at or below {directory}: name a run, a study, or a folder of runs")
    return Subject(directory, "folder", runs)


def _runs_below(directory: Path) -> Iterator[StoredRun]:
    for folder, children, files in os.walk(directory):
        path = Path(folder)
        name = str(path.relative_to(directory))
        if RUNS_FILE in files:
            children.clear()
            yield from _study_runs(path, f"{name}/")
        elif RunDirectory(path).has_begun:
            children.clear()
            yield read_run(path, name)
        children.sort()


def _study_runs(directory: Path, prefix: str) -> Iterator[StoredRun]:
    path = directory / RUNS_FILE
    try:
        base = read_settings(directory / BASE_FILE).get(_BATCH)
    except BrokenError:
        base = None
    try:
        content = json.loads(path.read_bytes())
        entries = content["runs"] if isinstance(content, Mapping) else content
        plan = [_planned(entry, base) for entry in entries]
    except OSError as error:
        raise UsageError(f"cannot read {path}: {error.strerror}") from error
    except (ValueError, KeyError, TypeError, AttributeError) as error:
        raise UsageError(
            f"{path} is not a list of runs ({error!r}): start the study's sweep again, which writes it"
        ) from error
    for planned in plan:
        yield read_run(directory / planned.name, prefix + planned.name, planned)


def _planned(entry: Mapping[str, object], base_batch: object) -> Planned:
    name, seed, overrides = str(entry["name"]), entry.get("seed"), entry.get("overrides") or ()
    if not isinstance(overrides, list | tuple):
        raise TypeError(f"overrides of {name}: {overrides!r}")
    settings = dict(str(override).split("=", 1) for override in overrides)
    batch = settings.get(_BATCH, base_batch)
    return Planned(
        name=name,
        variant=str(entry.get("variant") or ""),
        title=str(entry.get("title") or entry.get("variant") or ""),
        seed=seed if isinstance(seed, int) else None,
        overrides=tuple(map(str, overrides)),
        batch=int(str(batch)) if str(batch).isdecimal() else None,
    )
