"""Jobs that depend on each other: a run, then its landscape on two nodes, then its report."""

from __future__ import annotations

import re
from pathlib import Path

import pytest

from dist_train.outcome import ExitCode
from tests.cluster.cluster import ROOT, Cluster
from tests.launching import status
from tests.waiting import wait_for

pytestmark = [pytest.mark.ranks, pytest.mark.services]
_TRAIN = {
    "CONFIG": str(ROOT / "configs/smoke.yaml"),
    "OVERRIDES": "run.name=smoke batch.global_size=256 run.device=cpu",
    "RANKS_PER_NODE": "1",
}
_MEASURE = {"TARGETS": "runs/smoke", "RANKS_PER_NODE": "2", "OVERRIDES": "run.device=cpu"}


@pytest.mark.lengthy
def test_landscape_waits_for_the_run_and_the_report_for_both(cluster: Cluster, tmp_path: Path) -> None:
    train = cluster.sbatch(tmp_path, "lb_8192.sh", "--nodes=1", **_TRAIN)
    options = {"OPTIONS": "--directions 2 --points 5 --samples 256"}
    # Not the script's 1-2 nodes: Slurm would not wait for the run's node, which is still busy ending its job.
    on_both = ("--nodes=2", f"--dependency=afterok:{train}")
    measure = cluster.sbatch(tmp_path, "landscape.sh", *on_both, **_MEASURE, **options)
    page = cluster.sbatch(tmp_path, "report.sh", f"--dependency=afterok:{measure}", DIRECTORY="runs/smoke")
    after_failure = cluster.sbatch(tmp_path, "landscape.sh", f"--dependency=afternotok:{train}", **_MEASURE)
    _, measured, reported = (cluster.wait(job) for job in (train, measure, page))
    assert status(tmp_path / "runs/smoke")["state"] == "finished"
    assert (measured.state, measured.code) == ("COMPLETED", 0), measured.output
    assert "2 nodes (node[1-2]) x 2 ranks" in measured.output
    [result] = (tmp_path / "runs/smoke/analysis").iterdir()
    assert (result / "points.csv").read_text().count("\n") == 1 + 2 * 2 * 5
    assert (reported.state, reported.code) == ("COMPLETED", 0), reported.output
    text = (tmp_path / "runs/smoke/report.html").read_text()
    assert "random directions" in text
    assert cluster.wait(after_failure).state == "CANCELLED"


@pytest.mark.lengthy
def test_analyses_of_a_study_run_as_an_array(cluster: Cluster, tmp_path: Path) -> None:
    lines = re.search(r"^dist-train sweep \S+ --analyses.*\nsbatch .*$", (ROOT / "docs/reproduce.md").read_text(), re.M)
    assert lines is not None
    study = str(ROOT / "studies/smoke.yaml")
    (tmp_path / ".venv").symlink_to(ROOT / ".venv")
    # The cluster's GPUs are null devices, which torch cannot use.
    commands_of_study = lines[0].replace("studies/paper.yaml", study).replace(" --gpus-per-node=1", "")
    commands_of_study = commands_of_study.replace("sbatch ", "sbatch --parsable ")
    commands = f"""
        set -e
        PATH=$PWD/.venv/bin:$PATH
        dist-train sweep {study} --only 1
        {commands_of_study}
    """
    submitted = cluster.run("bash", "-c", commands, folder=tmp_path)
    assert submitted.returncode == 0, submitted.stdout + submitted.stderr
    array = submitted.stdout.split()[-1]
    tasks = [cluster.wait(f"{array}_{task}") for task in (1, 2)]
    outputs = [task.output for task in tasks]
    assert [(task.state, task.code) for task in tasks] == [("COMPLETED", 0)] * 2, outputs
    [run] = (tmp_path / "runs/smoke").glob("*-seed-0")
    assert len(list(run.glob("analysis/direction-*/points.csv"))) == 1, outputs
    assert len(list(run.glob("analysis/sharpness-*.json"))) == 1, outputs


@pytest.mark.lengthy
@pytest.mark.parametrize("launcher", ["srun", "mpirun"])
def test_cancelled_landscape_keeps_its_points_and_resumes(launcher: str, cluster: Cluster, tmp_path: Path) -> None:
    train = cluster.sbatch(tmp_path, "lb_8192.sh", "--nodes=1", **_TRAIN)
    assert cluster.wait(train).state == "COMPLETED"
    measure = {**_MEASURE, "KIND": "plane", "OPTIONS": "--points 15 --samples all", "LAUNCHER": launcher}
    first = cluster.sbatch(tmp_path, "landscape.sh", **measure)

    def finished_points() -> int:
        return sum(file.read_text().count('"point"') for file in tmp_path.glob("runs/smoke/analysis/*/partial/*"))

    wait_for(lambda: finished_points() >= 8, lambda: cluster.job(first).output)
    cluster.run("scancel", str(first), folder=tmp_path)
    assert cluster.wait(first).state == "CANCELLED"
    before = finished_points()
    assert 8 <= before < 225
    assert not list(tmp_path.glob("runs/smoke/analysis/*/points.csv"))
    second = cluster.sbatch(tmp_path, "landscape.sh", "--nodes=1", **measure)
    ended = cluster.wait(second)
    assert (ended.state, ended.code) == ("COMPLETED", 0), ended.output
    [points] = tmp_path.glob("runs/smoke/analysis/*/points.csv")
    assert points.read_text().count("\n") == 1 + 2 * 225


@pytest.mark.lengthy
def test_landscape_error_is_reported_once_and_exits_with_2(cluster: Cluster, tmp_path: Path) -> None:
    (tmp_path / "run").mkdir()
    job = cluster.sbatch(tmp_path, "landscape.sh", TARGETS="run", OPTIONS="--points 3", RANKS_PER_NODE="1")
    ended = cluster.wait(job)
    assert (ended.state, ended.code) == ("FAILED", ExitCode.USAGE), ended.output
    assert ended.output.count("[target-missing]") == 1, ended.output
