"""A search by Optuna with real training: two concurrent sweeps, of which one is killed, and a sweep after both."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path

import pytest

from dist_train.cli.main import main
from dist_train.sweep.planned_runs import optuna_trials, plan_study
from dist_train.sweep.standing import standing_of
from tests.launching import environment, kill, wait_for_ends
from tests.unit.studies import write_study
from tests.waiting import PATIENCE, wait_for

TRIALS = 4

pytestmark = [pytest.mark.ranks, pytest.mark.lengthy]


def start_sweep(study: Path) -> subprocess.Popen[str]:
    command = [sys.executable, "-m", "dist_train", "sweep", str(study)]
    return subprocess.Popen(command, env=environment(), stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True)


def test_concurrent_sweeps_share_a_search_and_a_killed_one_loses_no_trial(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    rate = {"optimizer.learning_rate": {"kind": "log_uniform", "low": 0.01, "high": 0.1}}
    search = {"method": "optuna", "trials": TRIALS, "space": rate}
    study = write_study(tmp_path, search=search, variants={"plain": {}}, seeds=[0])
    folder = tmp_path / "runs" / "small"
    sweeps = [start_sweep(study), start_sweep(study)]
    try:
        wait_for(lambda: len(list(folder.glob("*/checkpoints/*.json"))) > 0)
        kill(sweeps[0])
        sweeps[1].communicate(timeout=PATIENCE)
    finally:
        for each in sweeps:
            kill(each)
    [last] = wait_for_ends(start_sweep(study))
    assert last.code == 0, last.output
    plan = plan_study(study)
    assert [run.name for run in plan.runs] == [f"plain-trial-{trial}-seed-0" for trial in range(TRIALS)]
    assert all(standing_of(run).then == "skip" for run in plan.runs)
    trials = optuna_trials(plan.study, plan.directory)
    assert trials is not None
    evaluated = [standing_of(run).evaluated for run in plan.runs]
    accuracies = [last_of_run.accuracy for last_of_run in evaluated if last_of_run is not None]
    assert [trial.value for trial in trials._trials("plain")] == accuracies
    assert main(["sweep", str(study), "--best"]) == 0
    best = json.loads(capsys.readouterr().out)
    assert best["test.accuracy"] == max(accuracies)
    assert main(["sweep", str(study), "--array"]) == 1
