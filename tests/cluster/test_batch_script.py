"""`sbatch slurm/lb_8192.sh` on two nodes with two ranks each: equal to one rank; faults, lost nodes, requeues."""

from __future__ import annotations

import os
import re
import shlex
import sys
from pathlib import Path

import pytest

from dist_train.outcome import ExitCode
from tests.cluster.cluster import ROOT, Cluster
from tests.cluster.runs import Undisturbed
from tests.cluster.submitted import SubmittedRun, assert_finished_like, hurry, paced, train_with
from tests.launching import status
from tests.waiting import wait_for

pytestmark = [pytest.mark.ranks, pytest.mark.services]


LAUNCHERS = {
    "srun": {"LAUNCHER": "srun"},
    "mpirun": {"LAUNCHER": "mpirun"},
    "torch": {"LAUNCHER": "srun", "OVERRIDES": "comm.engine=torch"},
}


@pytest.mark.parametrize(
    "launcher", ["srun", *(pytest.param(launcher, marks=pytest.mark.lengthy) for launcher in ("mpirun", "torch"))]
)
def test_two_nodes_are_bit_identical_to_one_rank(
    launcher: str, cluster: Cluster, tmp_path: Path, large_batch: Undisturbed
) -> None:
    submitted = SubmittedRun(cluster, tmp_path, large_batch.config, **LAUNCHERS[launcher])
    ended = submitted.wait_for_weights_of(large_batch)
    assert status(submitted.run)["world_size"] == 4, ended.output
    assert "2 nodes (node[1-2]) x 2 ranks" in ended.output


@pytest.mark.lengthy
def test_documented_script_saves_on_request_and_resumes(
    cluster: Cluster, tmp_path: Path, long_run: Undisturbed
) -> None:
    block = re.search(r"^```sh\n(#!.*?)^```", (ROOT / "docs" / "cluster.md").read_text(), re.MULTILINE | re.DOTALL)
    assert block is not None
    text = block[1]
    # The cluster's GPUs are null devices, which torch cannot use.
    for documented, small in {
        "--ntasks-per-node=4 --gpus-per-node=4 --cpus-per-task=8": "--ntasks-per-node=2 --cpus-per-task=2",
        "configs/lb_8192.yaml": f"{long_run.config} {paced(tmp_path)['OVERRIDES']} --run-dir {tmp_path}/run",
        ".venv/bin/dist-train": f"{sys.executable} -m dist_train",
    }.items():
        assert documented in text
        text = text.replace(documented, small)
    script = tmp_path / "job.sh"
    script.write_text(text)

    def submit() -> int:
        submitted = cluster.run("sbatch", "--parsable", str(script), folder=tmp_path, PYTHONPATH=str(ROOT))
        assert submitted.returncode == 0, submitted.stderr
        return int(submitted.stdout)

    job = submit()
    wait_for(lambda: status(tmp_path / "run").get("step", 0) >= 20, lambda: cluster.job(job).output)
    cluster.run("scancel", "--signal=USR2", str(job), folder=tmp_path)
    stopped = cluster.wait(job)
    hurry(tmp_path)
    assert (stopped.state, stopped.code) == ("FAILED", ExitCode.STOPPED), stopped.output
    assert status(tmp_path / "run")["world_size"] == 4
    assert_finished_like(cluster.wait(submit()), tmp_path / "run", long_run)


@pytest.mark.lengthy
def test_steps_have_the_environment_of_the_script_where_sbatch_exports_none(
    cluster: Cluster, tmp_path: Path, large_batch: Undisturbed
) -> None:
    setup = tmp_path / "setup.sh"
    variables = {
        "CONFIG": large_batch.config,
        "RUN_DIR": str(tmp_path / "run"),
        "RANKS_PER_NODE": "2",
        "LAUNCHER": "mpirun",
        "DIST_TRAIN_PYTHON": sys.executable,
        "PYTHONPATH": str(ROOT),
        "PATH": os.environ["PATH"],
    }
    setup.write_text("".join(f"export {name}={shlex.quote(value)}\n" for name, value in variables.items()))
    submitted = SubmittedRun(cluster, tmp_path, large_batch.config, f"--export=DIST_TRAIN_SETUP={setup}")
    ended = submitted.wait_for_weights_of(large_batch)
    # The step that guards the batch host has started.
    assert "execve" not in ended.output


@pytest.mark.lengthy
def test_run_at_its_time_limit_saves_and_is_requeued(cluster: Cluster, tmp_path: Path, long_run: Undisturbed) -> None:
    options = ("--time=60", "--signal=B:USR1@1800")
    submitted = SubmittedRun(cluster, tmp_path, long_run.config, *options, **paced(tmp_path))
    submitted.wait_for_step(5)
    # Slurm sends the signal at its next check of time limits, every 30 s, and there is time left to save.
    cluster.control("update", f"jobid={submitted.job}", "timelimit=20")
    submitted.wait_for_restarts(1)
    cluster.control("update", f"jobid={submitted.job}", "timelimit=60")
    hurry(tmp_path)
    ended = submitted.wait_for_weights_of(long_run)
    assert "asked to stop after step" in ended.output
    assert "resuming from step" in ended.output


@pytest.mark.lengthy
def test_run_with_too_little_time_is_requeued_until_it_finishes(
    cluster: Cluster, tmp_path: Path, long_run: Undisturbed
) -> None:
    # A minute is the shortest limit. Slurm's signal comes too late; the run itself watches its time limit.
    python = train_with(tmp_path, "tests.cluster.slow_first_attempts 3")
    submitted = SubmittedRun(cluster, tmp_path, long_run.config, "--time=1", "--signal=B:USR1@1", **python)
    ended = cluster.wait(submitted.job, 500)
    assert_finished_like(ended, submitted.run, long_run)
    assert ended.restarts >= 3, ended.output  # more if other work makes the fourth start slow, too
    assert ended.output.count("resuming from step") == ended.restarts, ended.output


@pytest.mark.lengthy
@pytest.mark.parametrize("launcher", ["mpirun", "torch"])
def test_preempted_run_resumes_after_the_other_job(
    launcher: str, cluster: Cluster, tmp_path: Path, long_run: Undisturbed
) -> None:
    submitted = SubmittedRun(cluster, tmp_path, long_run.config, **paced(tmp_path, **LAUNCHERS[launcher]))
    submitted.wait_for_step(20)
    cluster.preempt(2, tmp_path)
    submitted.wait_for_restarts(1)
    hurry(tmp_path)
    submitted.wait_for_weights_of(long_run)


@pytest.mark.lengthy
def test_manually_requeued_run_resumes(cluster: Cluster, tmp_path: Path, long_run: Undisturbed) -> None:
    submitted = SubmittedRun(cluster, tmp_path, long_run.config, **paced(tmp_path))
    submitted.wait_for_step(20)
    cluster.control("requeue", str(submitted.job))
    hurry(tmp_path)
    ended = submitted.wait_for_weights_of(long_run)
    assert ended.restarts == 1


@pytest.mark.lengthy
@pytest.mark.parametrize("lost", ["node2", "node1"], ids=["another node", "the batch host"])
@pytest.mark.parametrize("launcher", ["srun", "torch"])
def test_run_that_loses_a_node_resumes_with_half_the_ranks(
    lost: str, launcher: str, cluster: Cluster, tmp_path: Path, long_run: Undisturbed
) -> None:
    submitted = SubmittedRun(cluster, tmp_path, long_run.config, **paced(tmp_path, **LAUNCHERS[launcher]))
    submitted.wait_for_step(35)
    assert cluster.batch_host(submitted.job) == "node1"
    cluster.kill_node(lost)
    hurry(tmp_path)
    try:
        ended = submitted.wait()
    finally:
        cluster.start_node(lost)
    assert_finished_like(ended, submitted.run, long_run)
    # Without node2 the job starts the run again itself. Slurm may requeue twice when the batch host is lost.
    assert (ended.restarts >= 1) is (lost == "node1"), ended.output
    assert status(submitted.run)["world_size"] == 2


@pytest.mark.lengthy
def test_cancelled_run_is_not_requeued(cluster: Cluster, tmp_path: Path, long_run: Undisturbed) -> None:
    submitted = SubmittedRun(cluster, tmp_path, long_run.config, **paced(tmp_path))
    submitted.wait_for_step(20)
    cluster.run("scancel", str(submitted.job), folder=tmp_path)
    ended = submitted.wait()
    assert ended.state == "CANCELLED", ended.output
    assert status(submitted.run)["state"] == "stopped"


@pytest.mark.lengthy
@pytest.mark.parametrize(("limit", "requeues"), [("1", "1 requeue"), ("", "3 requeues")])
def test_run_that_always_crashes_at_one_step_stops_being_requeued(
    limit: str, requeues: str, cluster: Cluster, tmp_path: Path, long_run: Undisturbed
) -> None:
    submitted = SubmittedRun(
        cluster,
        tmp_path,
        long_run.config,
        "--nodes=1",
        RANKS_PER_NODE="1",
        MAX_REQUEUES=limit,
        MAX_RESTARTS="0",
        **train_with(tmp_path, "tests.cluster.crash_at_step 40"),
    )
    ended = submitted.wait()
    # The checkpoint of step 30 counts as progress the first time, but not the second.
    assert f"{ended.restarts} requeue" == requeues.rstrip("s"), ended.output
    assert (ended.state, ended.code) == ("FAILED", ExitCode.FAULT)
    found = status(submitted.run)
    assert found["state"] == "failed"
    assert found["reason"].startswith(f"given up after {requeues} in a row without a checkpoint after step 30; ")
    assert found["reason"].endswith(("was killed by signal 9", "srun: error: node1: task 0: Killed"))


@pytest.mark.lengthy
def test_job_with_gpus_that_torch_cannot_use_is_not_requeued(
    cluster: Cluster, tmp_path: Path, large_batch: Undisturbed
) -> None:
    submitted = SubmittedRun(cluster, tmp_path, large_batch.config, "--gpus-per-node=2", OVERRIDES="run.device=auto")
    ended = submitted.wait()
    assert (ended.state, ended.code, ended.restarts) == ("FAILED", ExitCode.USAGE, 0), ended.output
    assert ended.output.count("run.device=cpu") == 1, ended.output


def test_bad_configuration_ends_the_job_before_a_rank_starts(cluster: Cluster, tmp_path: Path) -> None:
    config = tmp_path / "config.yaml"
    config.write_text("noise: {amplitud: 1}")
    submitted = SubmittedRun(cluster, tmp_path, str(config))
    ended = submitted.wait()
    assert (ended.state, ended.code, ended.restarts) == ("FAILED", ExitCode.USAGE, 0)
    assert "[unknown-key]" in ended.output
    assert not submitted.run.exists()
