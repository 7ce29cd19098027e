"""A rank that is killed, stopped, or fails: the whole job ends within the time, and says which one it was."""

from __future__ import annotations

import time
from pathlib import Path

import pytest

from dist_train.outcome import ExitCode
from tests.cluster.cluster import Cluster, status
from tests.cluster.runs import Undisturbed
from tests.cluster.submitted import Submitted, training_by
from tests.waiting import PATIENCE

# That nothing of a job is left on a node is looked at after every test, by its fixture.
pytestmark = [pytest.mark.ranks, pytest.mark.services]
_MPIRUN = pytest.param("mpirun", marks=pytest.mark.lengthy)


def disturb(cluster: Cluster, submitted: Submitted, signal: str) -> tuple[str, float]:
    """Send a signal to a rank of the second node, in mid-run; return its number there, and the moment."""
    submitted.wait_for_step(5)
    rank = next(line.split()[1] for line in cluster.processes() if line.startswith("node2") and "python" in line)
    cluster.on("node2", "kill", f"-{signal}", rank, folder=submitted.run)
    return rank, time.monotonic()


def reason_of_failure(cluster: Cluster, submitted: Submitted, seconds: float = PATIENCE) -> str:
    """Return the reason in the status of a job that fails by itself, within so many seconds."""
    ended = cluster.wait(submitted.job, seconds)
    assert (ended.state, ended.code, ended.restarts) == ("FAILED", ExitCode.FAULT, 0), ended.output
    found = status(submitted.run)
    assert (found["state"], found["exit_code"]) == ("failed", ExitCode.FAULT)
    return str(found["reason"])


@pytest.mark.parametrize("launcher", ["srun", _MPIRUN])
def test_a_rank_that_is_killed_ends_the_whole_job(
    launcher: str, cluster: Cluster, tmp_path: Path, long_run: Undisturbed
) -> None:
    submitted = Submitted(cluster, tmp_path, long_run.config, LAUNCHER=launcher, MAX_REQUEUES="0")
    rank, _ = disturb(cluster, submitted, "KILL")
    reason = reason_of_failure(cluster, submitted)
    exact = f"(node2, process {rank}) was killed by signal 9"
    # PMIx may end the step before the rank's parent can speak; then srun says which of the node's tasks were killed.
    assert exact in reason or (launcher == "srun" and "srun: error: node2: task" in reason)


@pytest.mark.lengthy
@pytest.mark.parametrize("launcher", ["srun", "mpirun"])
def test_a_rank_that_is_stopped_ends_the_whole_job(
    launcher: str, cluster: Cluster, tmp_path: Path, long_run: Undisturbed
) -> None:
    knobs = {"LAUNCHER": launcher, "MAX_REQUEUES": "0", "LOSS_SECONDS": "2", "OVERRIDES": "comm.timeout=10"}
    submitted = Submitted(cluster, tmp_path, long_run.config, **knobs)
    rank, _ = disturb(cluster, submitted, "STOP")
    reason = reason_of_failure(cluster, submitted)
    assert f"(node2, process {rank}) has not answered for " in reason


@pytest.mark.lengthy
def test_with_the_defaults_a_rank_that_is_stopped_ends_the_whole_job_within_60_s(
    cluster: Cluster, tmp_path: Path, long_run: Undisturbed
) -> None:
    submitted = Submitted(cluster, tmp_path, long_run.config, MAX_REQUEUES="0", LOSS_SECONDS="")
    rank, begun = disturb(cluster, submitted, "STOP")
    reason = reason_of_failure(cluster, submitted, 120)
    took = time.monotonic() - begun
    assert f"(node2, process {rank}) has not answered for " in reason
    assert took < 60


@pytest.mark.lengthy
@pytest.mark.parametrize("launcher", ["srun", "mpirun"])
def test_an_exception_on_one_rank_ends_the_whole_job(
    launcher: str, cluster: Cluster, tmp_path: Path, long_run: Undisturbed
) -> None:
    python = training_by(tmp_path, "tests.cluster.raise_on_rank 3 8")
    submitted = Submitted(cluster, tmp_path, long_run.config, LAUNCHER=launcher, MAX_REQUEUES="0", **python)
    # How long the ranks take to begin depends on the machine; what counts is how soon the job ends after the failure.
    submitted.wait_for(lambda found: found.get("state") == "failed")
    reason = reason_of_failure(cluster, submitted)
    assert "rank 3: the disk of this node is gone" in reason
