"""A study as an array of jobs: `sbatch --array=... slurm/sweep.sh`, and `dist-train submit --study` with its report."""

from __future__ import annotations

import re
import sys
from pathlib import Path

import pytest
import yaml

from tests.cluster.cluster import ROOT, Cluster
from tests.cluster.runs import LONG
from tests.cluster.submitted import hurry, paced_noise
from tests.launching import status, write_config
from tests.unit.studies import write_study
from tests.waiting import wait_for

pytestmark = [pytest.mark.ranks, pytest.mark.services, pytest.mark.lengthy]
TASKS = range(1, 7)
KILLED = 4
REQUEUED = 6  # the last task has the number of the whole array


def test_requeue_and_resubmission_run_only_the_tasks_that_need_it(cluster: Cluster, tmp_path: Path) -> None:
    study = tmp_path / "study.yaml"
    variants = {f"momentum-{number}": {"settings": {"optimizer.momentum": number / 10}} for number in (1, 5, 9)}
    run_settings = {"directory": str(tmp_path / "runs"), "epochs": 25, "device": "cpu"}
    noise = {"method": paced_noise(tmp_path), "amplitude": 0.01}
    base = write_config(tmp_path, {**LONG, "run": run_settings, "noise": noise})
    study.write_text(yaml.safe_dump({"name": "array", "base": base, "seeds": [0, 1], "variants": variants}))
    options = ("--gpus-per-node=0", "--cpus-per-task=1", "--mem=0")
    runs = [tmp_path / "runs" / "array" / f"{variant}-seed-{seed}" for seed in (0, 1) for variant in variants]
    killed = runs[KILLED - 1]

    def submit() -> int:
        return cluster.sbatch(
            tmp_path, "sweep.sh", "--array=1-6", *options, STUDY=str(study), RANKS_PER_NODE="1", PYTHONPATH=str(ROOT)
        )

    def remaining() -> str:
        listed = cluster.run(
            *(sys.executable, "-m", "dist_train", "sweep", str(study), "--array"),
            folder=tmp_path,
            PYTHONPATH=str(ROOT),
        )
        return listed.stdout.strip()

    first = submit()
    requeued = runs[REQUEUED - 1]
    wait_for(lambda: status(killed).get("step", 0) >= 30, lambda: cluster.job(f"{first}_{KILLED}").output)
    cluster.run("scancel", "--full", "--signal=KILL", f"{first}_{KILLED}", folder=tmp_path)
    wait_for(lambda: status(requeued).get("step", 0) >= 30, lambda: cluster.job(f"{first}_{REQUEUED}").output)
    cluster.run("scancel", "--batch", "--signal=USR1", f"{first}_{REQUEUED}", folder=tmp_path)
    hurry(tmp_path)
    ended = {task: cluster.wait(f"{first}_{task}") for task in TASKS}
    assert {task for task in TASKS if ended[task].state == "COMPLETED"} == set(TASKS) - {KILLED}
    assert [ended[task].restarts for task in TASKS if task != KILLED] == [0, 0, 0, 0, 1], ended[REQUEUED].output
    assert remaining() == str(KILLED)

    before = [status(run) for run in runs]
    second = submit()
    again = {task: cluster.wait(f"{second}_{task}") for task in TASKS}
    assert {again[task].state for task in TASKS} == {"COMPLETED"}, again[KILLED].output
    assert [run for run, earlier in zip(runs, before, strict=True) if status(run) != earlier] == [killed]
    assert "has finished" in again[1].output
    assert '"event":"resumed"' in (killed / "metrics.jsonl").read_text().replace(" ", "")
    assert remaining() == ""


def test_hanging_rank_of_the_last_task_does_not_disturb_the_others(cluster: Cluster, tmp_path: Path) -> None:
    study = tmp_path / "study.yaml"
    run_settings = {"directory": str(tmp_path / "runs"), "epochs": 1000, "device": "cpu"}
    base = write_config(tmp_path, {**LONG, "run": run_settings, "comm": {"engine": "torch", "timeout": 10}})
    study.write_text(yaml.safe_dump({"name": "array", "base": base, "seeds": [0, 1], "variants": {"one": {}}}))
    runs = [tmp_path / "runs" / "array" / f"one-seed-{seed}" for seed in (0, 1)]
    options = ("--array=1-2", "--gpus-per-node=0", "--cpus-per-task=2", "--nodelist=node1")
    array = cluster.sbatch(tmp_path, "sweep.sh", *options, STUDY=str(study), RANKS_PER_NODE="2", PYTHONPATH=str(ROOT))
    try:
        wait_for(lambda: all(status(run).get("step", 0) >= 1 for run in runs), lambda: cluster.job(f"{array}_2").output)
        # Rank 0 reports that rank 1 is silent, and ends; the batch script must kill rank 1.
        stop = """
            for rank in $(pgrep -f '^[^ ]*python[0-9.]* (-P )?-m dist_train train .*one-seed-1'); do
                ! grep -qzx SLURM_PROCID=1 /proc/$rank/environ || kill -STOP $rank
            done
        """
        cluster.on("node1", "sh", "-c", stop, folder=tmp_path)
        wait_for(lambda: "restarted on 1 nodes" in cluster.job(f"{array}_2").output)
        assert status(runs[0])["state"] == "running"
    finally:
        cluster.run("scancel", str(array), folder=tmp_path)
    assert "Killed" not in cluster.wait(f"{array}_1").output


def test_submitted_study_trains_analyzes_and_reports_with_a_site_setup(cluster: Cluster, tmp_path: Path) -> None:
    study = write_study(tmp_path, analyse=[{"kind": "direction", "options": {"points": 3}}])
    # With --export=NONE only this file makes the package importable, like a module that must be loaded.
    setup = tmp_path / "site set-up.sh"
    setup.write_text(f'export PYTHONPATH={ROOT}\necho "set up $SLURM_JOB_ID" >>{tmp_path}/set-up\n')
    command = (sys.executable, "-m", "dist_train", "submit", "--study", str(study), "--ranks-per-node", "1")
    options = ("--", "--gpus-per-node=0", "--cpus-per-task=1", "--mem=0", "--export=NONE")
    submitted = cluster.run(
        *command, "--time", "5", *options, folder=tmp_path, PYTHONPATH=str(ROOT), DIST_TRAIN_SETUP=str(setup)
    )
    assert submitted.returncode == 0, submitted.stderr
    jobs = dict(re.findall(r"^(runs|analyses|report) +(\d+)$", submitted.stdout, re.MULTILINE))
    assert set(jobs) == {"runs", "analyses", "report"}
    tasks = [cluster.wait(f"{jobs['runs']}_{task}") for task in range(1, 5)]
    after = [cluster.wait(jobs[name]) for name in ("analyses", "report")]
    assert [job.state for job in (*tasks, *after)] == ["COMPLETED"] * 6, "".join(job.output for job in (*tasks, *after))
    folder = tmp_path / "runs" / "small"
    assert (folder / "report.html").is_file()
    assert len(list(folder.glob("*/analysis/*"))) >= 4
    assert len((tmp_path / "set-up").read_text().splitlines()) >= 6
