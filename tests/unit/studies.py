"""A small study for tests, written to a folder with the configuration that it varies."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import yaml

from dist_train.outcome import ExitCode
from dist_train.rundir.status import StatusFile
from dist_train.sweep.planned_runs import Plan, PlannedRun, plan_study
from tests.unit.small_trainers import SETTINGS


def write_study(folder: Path, **changes: Any) -> Path:
    """Write a study of two variants and two seeds, changed by `changes`, and its base; return its path."""
    base = {**SETTINGS, "run": {**SETTINGS["run"], "directory": str(folder / "runs")}}
    (folder / "base.yaml").write_text(yaml.safe_dump(base))
    study = {
        "name": "small",
        "base": "base.yaml",
        "seeds": [0, 1],
        "variants": {"plain": {"settings": {"noise.method": "none"}}, "noisy": {"settings": {"noise.amplitude": 0.02}}},
        **changes,
    }
    path = folder / "study.yaml"
    path.write_text(yaml.safe_dump(study, sort_keys=False))
    return path


def small_plan(folder: Path, **changes: Any) -> Plan:
    """Return the plan of that study."""
    return plan_study(write_study(folder, **changes))


def begin_run(run: PlannedRun) -> StatusFile:
    """Leave what a run that begins does; return its status file."""
    run.files.create()
    run.files.save_config(run.config)
    return StatusFile(run.files.status, 1)


def finish_run(run: PlannedRun) -> None:
    """Leave what a run that has finished does, but for its results."""
    begin_run(run).end("finished", ExitCode.FINISHED, "")
