"""One run as its directory tells of it, also where that is missing or broken."""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field
from pathlib import Path

import yaml

from dist_train.monitoring.reading import read_records
from dist_train.monitoring.records import EvaluationRecord, EventRecord, Record, TrainRecord
from dist_train.status import Status, read_status
from dist_train.study.report.results import Analyses, read_analyses
from dist_train.study.run_table import is_run, read_state


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
