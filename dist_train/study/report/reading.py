"""Which runs a report is of: one, those of a study, or all below a folder."""

from __future__ import annotations

import json
import os
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

import yaml

from dist_train.outcome import UsageError
from dist_train.study.planned_runs import BASE_FILE
from dist_train.study.report.stored_run import Planned, StoredRun, read_run, read_settings
from dist_train.study.run_table import is_run

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
        base, _ = read_settings(path.with_name(BASE_FILE))
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
