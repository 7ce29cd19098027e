"""A killed, stopped or failing rank: the whole job ends in time, and names the rank."""

from __future__ import annotations

import re
import time
from pathlib import Path

import pytest

from dist_train.outcome import ExitCode
from tests.cluster.cluster import Cluster
from tests.cluster.runs import Undisturbed
from tests.cluster.submitted import SubmittedRun, hurry, paced, train_with
from tests.launching import status
from tests.waiting import wait_for

# The fixture `cluster` checks after every test that no process is left behind.
pytestmark = [pytest.mark.ranks, pytest.mark.services]
_MPIRUN = pytest.param("mpirun", marks=pytest.mark.lengthy)


def ranks_on_node2(cluster: Cluster) -> list[str]:
    """Return the process ids, there, of the ranks on the second node."""
    return [line.split()[1] for line in cluster.processes() if line.startswith("node2") and "python" in line]


def disturb(cluster: Cluster, submitted: SubmittedRun, signal: str) -> tuple[str, float]:
    """Send a signal to a rank on the second node during the run; return its process id there, and the time."""
    submitted.wait_for_step(5)
    rank = ranks_on_node2(cluster)[0]
    cluster.on("node2", "kill", f"-{signal}", rank, folder=submitted.run)
    return rank, time.monotonic()


def reason_of_failure(cluster: Cluster, submitted: SubmittedRun) -> str:
    """Wait for a job to fail by itself; return the reason in its status."""
    ended = cluster.wait(submitted.job)
    assert (ended.state, ended.code, ended.restarts) == ("FAILED", ExitCode.FAULT, 0), ended.output
    found = status(submitted.run)
    assert (found["state"], found["exit_code"]) == ("failed", ExitCode.FAULT)
    return str(found["reason"])


@pytest.mark.parametrize("launcher", ["srun", _MPIRUN])
def test_killed_rank_ends_the_whole_job(launcher: str, cluster: Cluster, tmp_path: Path, long_run: Undisturbed) -> None:
    variables = paced(tmp_path, LAUNCHER=launcher, MAX_REQUEUES="0")
    submitted = SubmittedRun(cluster, tmp_path, long_run.config, **variables)
    rank, _ = disturb(cluster, submitted, "KILL")
    reason = reason_of_failure(cluster, submitted)
    exact = f"(node2, process {rank}) was killed by signal 9"
    # PMIx may end the step before the rank's parent reports it; then srun names the node's killed tasks.
    assert exact in reason or (launcher == "srun" and "srun: error: node2: task" in reason)


@pytest.mark.lengthy
@pytest.mark.parametrize("launcher", ["srun", "mpirun"])
def test_stopped_rank_ends_the_whole_job(
    launcher: str, cluster: Cluster, tmp_path: Path, long_run: Undisturbed
) -> None:
    settings = {"LAUNCHER": launcher, "MAX_REQUEUES": "0", "LOSS_SECONDS": "2", "OVERRIDES": "comm.timeout=10"}
    variables = paced(tmp_path, **settings)
    submitted = SubmittedRun(cluster, tmp_path, long_run.config, **variables)
    rank, _ = disturb(cluster, submitted, "STOP")
    reason = reason_of_failure(cluster, submitted)
    assert f"(node2, process {rank}) has not answered for " in reason


@pytest.mark.lengthy
def test_stopped_rank_and_the_others_end_within_60_s_by_default(
    cluster: Cluster, tmp_path: Path, long_run: Undisturbed
) -> None:
    variables = paced(tmp_path, MAX_REQUEUES="0", LOSS_SECONDS="")
    submitted = SubmittedRun(cluster, tmp_path, long_run.config, **variables)
    rank, started = disturb(cluster, submitted, "STOP")
    wait_for(lambda: not ranks_on_node2(cluster))
    # Not until the job has ended: how long Python and Slurm take to decide that is up to the machine.
    seconds = time.monotonic() - started
    assert f"(node2, process {rank}) has not answered for " in reason_of_failure(cluster, submitted)
    assert seconds < 60


@pytest.mark.lengthy
@pytest.mark.parametrize(
    ("signal", "overrides"),
    # With MPI, Slurm's PMIx would end the stopped rank, without the controller.
    [("KILL", ""), ("STOP", "comm.engine=torch comm.timeout=10")],
)
def test_run_with_a_lost_rank_waits_for_slurms_controller(
    signal: str, overrides: str, cluster: Cluster, tmp_path: Path, long_run: Undisturbed
) -> None:
    submitted = SubmittedRun(cluster, tmp_path, long_run.config, **paced(tmp_path, OVERRIDES=overrides))
    submitted.wait_for_step(5)
    log = Path(
        re.findall(r"StdOut=(\S+)", cluster.run("scontrol", "show", "job", str(submitted.job), folder=tmp_path).stdout)[
            0
        ]
    )
    cluster.stop_controller()
    try:
        disturb(cluster, submitted, signal)
        wait_for(lambda: "waiting for Slurm's controller" in log.read_text(), log.read_text)
    finally:
        cluster.start_controller()
    hurry(tmp_path)
    ended = submitted.wait_for_weights_of(long_run)
    assert ended.restarts == 0
    assert "restarted on 2 nodes" in ended.output


@pytest.mark.lengthy
@pytest.mark.parametrize("launcher", ["srun", "mpirun"])
def test_exception_on_one_rank_ends_the_whole_job(
    launcher: str, cluster: Cluster, tmp_path: Path, long_run: Undisturbed
) -> None:
    python = train_with(tmp_path, "tests.cluster.raise_on_rank 3 8")
    submitted = SubmittedRun(cluster, tmp_path, long_run.config, LAUNCHER=launcher, MAX_REQUEUES="0", **python)
    # Starting the ranks may take long; only the time from the failure to the end of the job is limited.
    submitted.wait_for(lambda found: found.get("state") == "failed")
    reason = reason_of_failure(cluster, submitted)
    assert "rank 3: the disk of this node is gone" in reason
