"""`sbatch slurm/lb_8192.sh`: two nodes with two ranks each end as one rank does; faults, losses, requeues."""

from __future__ import annotations

from pathlib import Path

import pytest

from dist_train.outcome import ExitCode
from tests.cluster.cluster import Cluster, status
from tests.cluster.runs import Undisturbed
from tests.cluster.submitted import Submitted, assert_equal_bit_identically, training_by
from tests.waiting import wait_for

pytestmark = [pytest.mark.ranks, pytest.mark.services]


STARTED = {
    "srun": {"LAUNCHER": "srun"},
    "mpirun": {"LAUNCHER": "mpirun"},
    "torch": {"LAUNCHER": "srun", "OVERRIDES": "comm.engine=torch"},
}


@pytest.mark.parametrize("by", ["srun", *(pytest.param(by, marks=pytest.mark.lengthy) for by in ("mpirun", "torch"))])
def test_two_nodes_end_as_one_rank_does(by: str, cluster: Cluster, tmp_path: Path, large_batch: Undisturbed) -> None:
    submitted = Submitted(cluster, tmp_path, large_batch.config, **STARTED[by])
    ended = submitted.wait()
    assert_equal_bit_identically(ended, submitted.run, large_batch)
    assert status(submitted.run)["world_size"] == 4, ended.output
    assert "2 nodes (node[1-2]) x 2 ranks" in ended.output


@pytest.mark.lengthy
def test_a_run_that_meets_its_time_limit_saves_and_resumes_by_itself(
    cluster: Cluster, tmp_path: Path, long_run: Undisturbed
) -> None:
    # Slurm looks at time limits every 30 s.
    python = training_by(tmp_path, "tests.cluster.slow_first_lives 1")
    submitted = Submitted(cluster, tmp_path, long_run.config, "--time=10", "--signal=B:USR1@58", **python)
    submitted.wait_for_step(5)
    # The shortest limit is a minute: set now, it is already time for the signal.
    cluster.control("update", f"jobid={submitted.job}", "timelimit=1")
    wait_for(lambda: cluster.job(submitted.job).restarts == 1, lambda: cluster.job(submitted.job).output)
    assert status(submitted.run)["state"] == "stopped"
    cluster.control("update", f"jobid={submitted.job}", "timelimit=10")
    ended = submitted.wait()
    assert_equal_bit_identically(ended, submitted.run, long_run)
    assert "resuming from step" in ended.output


@pytest.mark.lengthy
def test_a_run_with_too_little_time_is_requeued_again_and_again_until_it_has_finished(
    cluster: Cluster, tmp_path: Path, long_run: Undisturbed
) -> None:
    # A minute is the shortest limit. Slurm's signal comes too late for anything: the run itself looks at the time.
    python = training_by(tmp_path, "tests.cluster.slow_first_lives 3")
    submitted = Submitted(cluster, tmp_path, long_run.config, "--time=1", "--signal=B:USR1@1", **python)
    ended = cluster.wait(submitted.job, 500)
    assert_equal_bit_identically(ended, submitted.run, long_run)
    assert ended.restarts == 3, ended.output
    assert ended.output.count("resuming from step") == 3, ended.output


@pytest.mark.lengthy
@pytest.mark.parametrize("by", ["mpirun", "torch"])
def test_a_run_that_is_preempted_resumes_when_the_other_job_is_done(
    by: str, cluster: Cluster, tmp_path: Path, long_run: Undisturbed
) -> None:
    submitted = Submitted(cluster, tmp_path, long_run.config, **STARTED[by])
    submitted.wait_for_step(20)
    urgent = cluster.run(
        "sbatch", "--partition=high", "--exclusive", "--nodes=2", "--output=/dev/null", "--wrap=true", folder=tmp_path
    )
    assert urgent.returncode == 0, urgent.stderr
    ended = submitted.wait()
    assert ended.restarts >= 1
    assert_equal_bit_identically(ended, submitted.run, long_run)


@pytest.mark.lengthy
def test_a_run_that_is_requeued_by_hand_resumes(cluster: Cluster, tmp_path: Path, long_run: Undisturbed) -> None:
    submitted = Submitted(cluster, tmp_path, long_run.config)
    submitted.wait_for_step(20)
    cluster.control("requeue", str(submitted.job))
    ended = submitted.wait()
    assert ended.restarts == 1
    assert_equal_bit_identically(ended, submitted.run, long_run)


@pytest.mark.lengthy
@pytest.mark.parametrize("lost", ["node2", "node1"], ids=["another node", "the batch host"])
@pytest.mark.parametrize("by", ["srun", "torch"])
def test_a_run_that_loses_a_node_resumes_with_half_the_ranks(
    lost: str, by: str, cluster: Cluster, tmp_path: Path, long_run: Undisturbed
) -> None:
    submitted = Submitted(cluster, tmp_path, long_run.config, **STARTED[by])
    submitted.wait_for_step(50)
    assert cluster.batch_host(submitted.job) == "node1"
    cluster.kill_node(lost)
    try:
        ended = submitted.wait()
    finally:
        cluster.start_node(lost)
    assert_equal_bit_identically(ended, submitted.run, long_run)
    # Slurm itself may start it twice when the batch host is lost; without another one the run is started in the job.
    assert (ended.restarts >= 1) is (lost == "node1"), ended.output
    assert status(submitted.run)["world_size"] == 2


def test_a_run_that_is_cancelled_is_not_requeued(cluster: Cluster, tmp_path: Path, long_run: Undisturbed) -> None:
    submitted = Submitted(cluster, tmp_path, long_run.config)
    submitted.wait_for_step(20)
    cluster.run("scancel", str(submitted.job), folder=tmp_path)
    ended = submitted.wait()
    assert ended.state == "CANCELLED", ended.output
    assert status(submitted.run)["state"] == "stopped"


@pytest.mark.lengthy
@pytest.mark.parametrize(("limit", "requeues"), [("1", "1 requeue"), ("", "3 requeues")])
def test_a_run_that_crashes_at_the_same_step_is_given_up(
    limit: str, requeues: str, cluster: Cluster, tmp_path: Path, long_run: Undisturbed
) -> None:
    submitted = Submitted(
        cluster,
        tmp_path,
        long_run.config,
        "--nodes=1",
        RANKS_PER_NODE="1",
        MAX_REQUEUES=limit,
        MAX_RESTARTS="0",
        **training_by(tmp_path, "tests.cluster.crash_at_step 40"),
    )
    ended = submitted.wait()
    # The checkpoint of step 30 is progress the first time, none the second.
    assert f"{ended.restarts} requeue" == requeues.rstrip("s"), ended.output
    assert (ended.state, ended.code) == ("FAILED", ExitCode.FAULT)
    found = status(submitted.run)
    assert found["state"] == "failed"
    assert found["reason"].startswith(f"given up after {requeues} in a row without a checkpoint after step 30; ")
    assert found["reason"].endswith(("was killed by signal 9", "srun: error: node1: task 0: Killed"))


@pytest.mark.lengthy
def test_gpus_that_torch_cannot_use_are_refused_and_the_job_is_not_requeued(
    cluster: Cluster, tmp_path: Path, large_batch: Undisturbed
) -> None:
    submitted = Submitted(cluster, tmp_path, large_batch.config, "--gpus-per-node=2", OVERRIDES="run.device=auto")
    ended = submitted.wait()
    assert (ended.state, ended.code, ended.restarts) == ("FAILED", ExitCode.USAGE, 0), ended.output
    assert ended.output.count("run.device=cpu") == 1, ended.output


def test_a_bad_configuration_ends_the_job_before_a_rank_starts(cluster: Cluster, tmp_path: Path) -> None:
    config = tmp_path / "config.yaml"
    config.write_text("noise: {amplitud: 1}")
    submitted = Submitted(cluster, tmp_path, str(config))
    ended = submitted.wait()
    assert (ended.state, ended.code, ended.restarts) == ("FAILED", ExitCode.USAGE, 0)
    assert "[unknown-key]" in ended.output
    assert not submitted.run.exists()
