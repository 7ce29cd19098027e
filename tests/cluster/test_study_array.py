"""`sbatch --array=... slurm/sweep.sh`: one task a run; submitted again, only what is left is trained."""

from __future__ import annotations

import sys
from pathlib import Path

import pytest
import yaml

from tests.cluster.cluster import ROOT, Cluster, status
from tests.cluster.runs import LONG
from tests.launching import write_config
from tests.waiting import wait_for

pytestmark = [pytest.mark.ranks, pytest.mark.services, pytest.mark.lengthy]
TASKS = range(1, 7)
KILLED = 4
REQUEUED = 6  # the last task has the number of the whole array


def test_a_task_is_requeued_alone_and_of_an_array_with_one_killed_only_that_one_runs_again(
    cluster: Cluster, tmp_path: Path
) -> None:
    study = tmp_path / "study.yaml"
    variants = {f"momentum-{number}": {"settings": {"optimizer.momentum": number / 10}} for number in (1, 5, 9)}
    base = write_config(tmp_path, {**LONG, "run": {"directory": str(tmp_path / "runs"), "epochs": 25, "device": "cpu"}})
    study.write_text(yaml.safe_dump({"name": "array", "base": base, "seeds": [0, 1], "variants": variants}))
    options = ("--gpus-per-node=0", "--cpus-per-task=1", "--mem=0")
    runs = [tmp_path / "runs" / "array" / f"{variant}-seed-{seed}" for seed in (0, 1) for variant in variants]
    killed = runs[KILLED - 1]

    def submit() -> int:
        return cluster.sbatch(
            tmp_path, "sweep.sh", "--array=1-6", *options, STUDY=str(study), RANKS_PER_NODE="1", PYTHONPATH=str(ROOT)
        )

    def left() -> str:
        told = cluster.run(
            *(sys.executable, "-m", "dist_train", "sweep", str(study), "--array"),
            folder=tmp_path,
            PYTHONPATH=str(ROOT),
        )
        return told.stdout.strip()

    first = submit()
    requeued = runs[REQUEUED - 1]
    wait_for(lambda: status(killed).get("step", 0) >= 30, lambda: cluster.job(f"{first}_{KILLED}").output)
    cluster.run("scancel", "--full", "--signal=KILL", f"{first}_{KILLED}", folder=tmp_path)
    wait_for(lambda: status(requeued).get("step", 0) >= 30, lambda: cluster.job(f"{first}_{REQUEUED}").output)
    cluster.run("scancel", "--batch", "--signal=USR1", f"{first}_{REQUEUED}", folder=tmp_path)
    ended = {task: cluster.wait(f"{first}_{task}") for task in TASKS}
    assert {task for task in TASKS if ended[task].state == "COMPLETED"} == set(TASKS) - {KILLED}
    assert [ended[task].restarts for task in TASKS if task != KILLED] == [0, 0, 0, 0, 1], ended[REQUEUED].output
    assert left() == str(KILLED)

    before = [status(run) for run in runs]
    second = submit()
    again = {task: cluster.wait(f"{second}_{task}") for task in TASKS}
    assert {again[task].state for task in TASKS} == {"COMPLETED"}, again[KILLED].output
    assert [run for run, was in zip(runs, before, strict=True) if status(run) != was] == [killed]
    assert "has finished" in again[1].output
    assert '"event":"resumed"' in (killed / "metrics.jsonl").read_text().replace(" ", "")
    assert left() == ""
