"""What a reader must know to run it again: settings, places, versions, commands."""

from __future__ import annotations

import shlex
from collections import Counter
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from datetime import datetime
from pathlib import Path

from dist_train.config import Config
from dist_train.monitoring import wording
from dist_train.report.stored_run import StoredRun, Subject, flat_settings
from dist_train.report.variants import shown
from dist_train.rundir.records import EventRecord

_NOT_RECORDED = "not recorded"


@dataclass(frozen=True)
class Setting:
    """A setting of a run; `is_default` where nobody has chosen it."""

    name: str
    value: str
    is_default: bool


@dataclass(frozen=True)
class Section:
    """A section of the configuration."""

    name: str
    settings: tuple[Setting, ...]


@dataclass(frozen=True)
class Checkpoint:
    """A checkpoint that was written; `is_kept` while its file is there."""

    step: int
    name: str
    size: str
    seconds: str
    is_kept: bool


def sections_of(run: StoredRun) -> tuple[Section, ...]:
    """Return all settings of `run`, by section."""
    defaults = dict(flat_settings(Config().model_dump(mode="json")))
    sections: dict[str, list[Setting]] = {}
    for path, value in run.settings.items():
        section, _, name = path.partition(".")
        is_default = path in defaults and defaults[path] == value
        sections.setdefault(section, []).append(Setting(name or section, shown(value), is_default))
    return tuple(Section(name, tuple(settings)) for name, settings in sections.items())


def shared_settings(runs: Sequence[StoredRun]) -> tuple[Section, ...]:
    """Return the settings that all of `runs` have in common."""
    known = [run for run in runs if run.settings]
    if not known:
        return ()
    common = {
        path: value
        for path, value in known[0].settings.items()
        if all(run.settings.get(path) == value for run in known)
    }
    return sections_of(StoredRun(known[0].directory, "", "", "", settings=common))


def checkpoints_of(run: StoredRun) -> tuple[Checkpoint, ...]:
    """Return the checkpoints that `run` tells of, in order."""
    found = []
    for event in run.events:
        name = str(event.details.get("path") or "")
        if event.event == "checkpoint" and name:
            size, seconds = event.details.get("bytes"), event.details.get("seconds")
            found.append(
                Checkpoint(
                    event.step,
                    Path(name).name,
                    f"{size / 1e6:.2f} MB" if isinstance(size, int | float) else "",
                    f"{seconds:.2f} s" if isinstance(seconds, int | float) else "",
                    (run.directory / "checkpoints" / Path(name).name).is_file(),
                )
            )
    return tuple(found)


def events_of(run: StoredRun) -> tuple[str, ...]:
    """Return what happened to `run` beside its checkpoints, one line each."""
    return tuple(wording.event(event) for event in run.events if not _is_checkpoint(event))


def environment(runs: Sequence[StoredRun]) -> tuple[tuple[str, str], ...]:
    """Return where and when `runs` ran, as names and values."""
    known = [run.status for run in runs if run.status]
    rows = [
        ("hosts", _listed(status.host for status in known)),
        ("ranks", _listed(f"{status.world_size}" for status in known)),
        ("Slurm jobs", _listed(status.slurm_job for status in known)),
        ("last launch began", _span([status.started for status in known])),
        ("ended", _span([status.finished for status in known if status.finished])),
    ]
    return tuple((name, value) for name, value in rows if value)


def versions(runs: Sequence[StoredRun]) -> tuple[tuple[str, str], ...]:
    """Return what `runs` ran with, as names and values; where they differ, how many of them had which."""
    told = [run.status.environment for run in runs if run.status]
    if told and not any(told):
        return (("versions", _NOT_RECORDED),)
    names = dict.fromkeys(name for environment in told for name in environment)
    return tuple(
        (name, _compared(Counter(str(environment.get(name, _NOT_RECORDED)) for environment in told))) for name in names
    )


def commands(subject: Subject) -> tuple[str, ...]:
    """Return the commands that make the runs, and this page, again."""
    folder = shlex.quote(str(subject.directory))
    if subject.kind == "run":
        name = subject.runs[0].settings.get("run.name", "run")
        again = f"dist-train train {folder}/config.yaml run.name={name}-again run.resume=never"
        return (again, f"dist-train report {folder}")
    return (f"dist-train report {folder}",)


def command_of(run: StoredRun) -> str:
    """Return the command that makes `run` of a study again; empty where its study does not tell."""
    if run.planned is None or not run.planned.overrides:
        return ""
    words = shlex.join(run.planned.overrides)
    return f"dist-train train {shlex.quote(str(run.directory.parent / 'base.yaml'))} {words}"


def _compared(counts: Counter[str]) -> str:
    if len(counts) == 1:
        return next(iter(counts))
    return "runs differ: " + ", ".join(f"{value} ({count})" for value, count in counts.most_common())


def _is_checkpoint(event: EventRecord) -> bool:
    return event.event == "checkpoint"


def _listed(values: Iterable[str]) -> str:
    return ", ".join(sorted({value for value in values if value}))


def _span(moments: Sequence[str]) -> str:
    try:
        known = sorted(datetime.fromisoformat(moment) for moment in moments)
    except ValueError:
        return ""
    if not known:
        return ""
    first, last = (f"{moment:%Y-%m-%d %H:%M} UTC" for moment in (known[0], known[-1]))
    return first if first == last else f"{first} to {last}"
