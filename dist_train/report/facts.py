"""What a reader must know to run it again: settings, places, versions, commands."""

from __future__ import annotations

import shlex
from collections import Counter
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from datetime import datetime
from pathlib import Path

from dist_train.config import Config
from dist_train.monitoring import wording
from dist_train.report.stored_run import StoredRun, Subject
from dist_train.report.variants import shown
from dist_train.rundir.paths import RunDirectory
from dist_train.sweep.planned_runs import BASE_FILE
from dist_train.watch.run_table import flat_settings

_NOT_RECORDED = "not recorded"


@dataclass(frozen=True)
class Setting:
    """A setting of a run; `is_default` where nobody has chosen it."""

    name: str
    value: str
    is_default: bool


@dataclass(frozen=True)
class Checkpoint:
    """A checkpoint that was written; `is_kept` while its file is there."""

    step: int
    name: str
    size: str
    seconds: str
    is_kept: bool


def sections_of(settings: Mapping[str, object]) -> dict[str, list[Setting]]:
    """Return `settings`, which are by dotted path, by section."""
    defaults = dict(flat_settings(Config().model_dump(mode="json")))
    sections: dict[str, list[Setting]] = {}
    for path, value in settings.items():
        section, _, name = path.partition(".")
        is_default = path in defaults and defaults[path] == value
        sections.setdefault(section, []).append(Setting(name or section, shown(value), is_default))
    return sections


def shared_settings(runs: Sequence[StoredRun]) -> dict[str, list[Setting]]:
    """Return the settings that all of `runs` have in common, by section."""
    first, *others = [run.settings for run in runs if run.settings] or [{}]
    missing = object()
    return sections_of(
        {path: value for path, value in first.items() if all(each.get(path, missing) == value for each in others)}
    )


def checkpoints_of(run: StoredRun) -> Iterator[Checkpoint]:
    """Yield the checkpoints that `run` has recorded, in order."""
    for event in run.events:
        name = Path(str(event.details.get("path") or "")).name
        if event.event == "checkpoint" and name:
            size, seconds = event.details.get("bytes"), event.details.get("seconds")
            yield Checkpoint(
                event.step,
                name,
                f"{size / 1e6:.2f} MB" if isinstance(size, int | float) else "",
                f"{seconds:.2f} s" if isinstance(seconds, int | float) else "",
                (RunDirectory(run.directory).checkpoints / name).is_file(),
            )


def events_of(run: StoredRun) -> tuple[str, ...]:
    """Return what happened to `run` beside its checkpoints, one line each."""
    return tuple(wording.event(event) for event in run.events if event.event != "checkpoint")


def environment(runs: Sequence[StoredRun]) -> tuple[tuple[str, str], ...]:
    """Return where and when `runs` ran, as names and values."""
    known = [run.status for run in runs if run.status]
    rows = (
        ("hosts", _listed(status.host for status in known)),
        ("ranks", _listed(f"{status.world_size}" for status in known)),
        ("Slurm jobs", _listed(status.slurm_job for status in known)),
        ("last launch began", _span([status.started for status in known])),
        ("ended", _span([status.finished for status in known if status.finished])),
    )
    return tuple((name, value) for name, value in rows if value)


def versions(runs: Sequence[StoredRun]) -> tuple[tuple[str, str], ...]:
    """Return what `runs` ran with, as names and values; where they differ, how many of them had which."""
    recorded = [run.status.environment for run in runs if run.status]
    if recorded and not any(recorded):
        return (("versions", _NOT_RECORDED),)
    rows = []
    for name in dict.fromkeys(name for environment in recorded for name in environment):
        counts = Counter(environment.get(name, _NOT_RECORDED) for environment in recorded).most_common()
        differ = "runs differ: " + ", ".join(f"{value} ({count})" for value, count in counts)
        rows.append((name, differ if len(counts) > 1 else counts[0][0]))
    return tuple(rows)


def commands(subject: Subject) -> tuple[str, ...]:
    """Return the commands that make the runs, and this page, again."""
    folder = shlex.quote(str(subject.directory))
    report = f"dist-train report {folder}"
    if subject.kind != "run":
        return (report,)
    name = subject.runs[0].settings.get("run.name", "run")
    config = shlex.quote(str(RunDirectory(subject.directory).config))
    return (f"dist-train train {config} run.name={name}-again run.resume=never", report)


def command_of(run: StoredRun) -> str:
    """Return the command that makes `run` of a study again; empty where its study does not say it."""
    if run.planned is None or not run.planned.overrides:
        return ""
    return shlex.join(["dist-train", "train", str(run.directory.parent / BASE_FILE), *run.planned.overrides])


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
