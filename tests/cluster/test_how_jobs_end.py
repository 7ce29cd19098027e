"""How jobs end that cannot start, fill their disk, or are stopped at an awkward moment, and what they report."""

from __future__ import annotations

import json
import os
import sys
from contextlib import suppress
from pathlib import Path

import pytest

from dist_train.outcome import ExitCode
from tests.cluster.cluster import ROOT, Cluster
from tests.cluster.runs import Undisturbed
from tests.cluster.submitted import SubmittedRun, assert_finished_like, hurry, paced, train_with
from tests.launching import status, weights_digest
from tests.waiting import wait_for

pytestmark = [pytest.mark.ranks, pytest.mark.services]

UNRECOVERABLE = {
    "no MPI": ({"MPI": "none", "OVERRIDES": "comm.engine=horovod"}, "Horovod sees 1"),
    "an unknown MPI": ({"MPI": "nonesuch"}, "srun: error: cannot find mpi plugin"),
    "no such GPUs": ({"LAUNCHER_OPTIONS": "--gpus-per-node=9"}, "srun: error: Unable to create step"),
    "more processors": ({"LAUNCHER_OPTIONS": "--ntasks=99 --ntasks-per-node=50 --exact"}, "srun: error: "),
    "an unknown option": ({"LAUNCHER_OPTIONS": "--nonesuch"}, "srun: unrecognized option"),
    "mpirun's options": ({"LAUNCHER": "mpirun", "LAUNCHER_OPTIONS": "--map-by slot"}, "command line"),
}


def fill_disk(ballast: Path) -> None:
    """Write to `ballast` until its disk is full."""
    with suppress(OSError), ballast.open("wb", buffering=0) as file:
        while True:
            file.write(b"x" * 4096)


@pytest.mark.lengthy
@pytest.mark.parametrize(
    "problem",
    [next(iter(UNRECOVERABLE)), *(pytest.param(each, marks=pytest.mark.lengthy) for each in [*UNRECOVERABLE][1:])],
)
def test_launch_that_cannot_start_is_not_requeued(
    problem: str, cluster: Cluster, tmp_path: Path, large_batch: Undisturbed
) -> None:
    variables, message = UNRECOVERABLE[problem]
    submitted = SubmittedRun(cluster, tmp_path, large_batch.config, **variables)
    ended = submitted.wait()
    assert (ended.state, ended.code, ended.restarts) == ("FAILED", ExitCode.USAGE, 0), ended.output
    assert status(submitted.run)["state"] == "failed"
    shown = cluster.run(sys.executable, "-m", "dist_train", "runs", str(submitted.run), "--json", folder=tmp_path)
    [run] = json.loads(shown.stdout)["runs"]
    assert run["state"] == "failed"
    assert message in run["note"], ended.output


@pytest.mark.lengthy
def test_full_disk_is_reported_and_the_run_resumes_once_there_is_space(
    cluster: Cluster, tmp_path: Path, long_run: Undisturbed
) -> None:
    run, ballast = cluster.disk / "run", cluster.disk / "ballast"
    variables = paced(tmp_path, RUN_DIR=str(run))
    submitted = SubmittedRun(cluster, tmp_path, long_run.config, **variables)
    wait_for(lambda: status(run).get("step", 0) >= 35, lambda: cluster.job(submitted.job).output)
    fill_disk(ballast)
    hurry(tmp_path)
    ended = submitted.wait()
    found = status(run)
    assert "Traceback" not in ended.output
    assert (ended.state, ended.code) == ("FAILED", ExitCode.FAULT), ended.output
    assert (found["state"], found["step"]) == ("failed", 300), ended.output
    assert "No space left on device" in found["reason"]
    comment = cluster.run(
        "squeue", "--states=all", "--noheader", f"--jobs={submitted.job}", "--format=%k", folder=tmp_path
    )
    assert "No space left on device" in comment.stdout
    ballast.unlink()
    again = SubmittedRun(cluster, tmp_path, long_run.config, **variables).wait()
    assert_finished_like(again, run, long_run)


@pytest.mark.lengthy
def test_run_resumes_from_the_fallback_directory_after_a_full_disk(
    cluster: Cluster, tmp_path: Path, long_run: Undisturbed
) -> None:
    run, ballast = cluster.disk / "other", cluster.disk / "ballast"
    fallback = f"'checkpoint.fallback_directory={tmp_path / 'fall back'}'"
    variables = paced(tmp_path, RUN_DIR=str(run), OVERRIDES=fallback)
    submitted = SubmittedRun(cluster, tmp_path, long_run.config, **variables)
    wait_for(lambda: status(run).get("step", 0) >= 35, lambda: cluster.job(submitted.job).output)
    fill_disk(ballast)
    hurry(tmp_path)
    ended = submitted.wait()
    assert ended.state == "FAILED", ended.output
    ballast.unlink()
    again = SubmittedRun(cluster, tmp_path, long_run.config, **variables).wait()
    assert "resuming from step 300" in again.output
    assert_finished_like(again, run, long_run)


@pytest.mark.lengthy
def test_second_job_in_a_run_directory_is_refused_without_disturbing_the_first(
    cluster: Cluster, tmp_path: Path, long_run: Undisturbed
) -> None:
    # The first is slow until it is asked to save, so that it still runs when the second starts.
    slow = train_with(tmp_path, "tests.cluster.slow_first_attempts 1")
    first = SubmittedRun(cluster, tmp_path, long_run.config, "--nodes=1", RANKS_PER_NODE="1", **slow)
    first.wait_for_step(2)
    command = (sys.executable, "-m", "dist_train", "submit", long_run.config, "--run-dir", str(first.run))
    refused = cluster.run(*command, folder=tmp_path)
    assert refused.returncode == ExitCode.USAGE
    assert "[run-in-queue]" in refused.stderr
    assert f"job {first.job}" in refused.stderr
    second = SubmittedRun(cluster, tmp_path, long_run.config, "--nodes=1", RANKS_PER_NODE="1")
    ended = second.wait()
    assert (ended.code, ended.restarts) == (ExitCode.USAGE, 0), ended.output
    assert f"Slurm job {first.job}" in ended.output
    cluster.run("scancel", "--batch", "--signal=USR1", str(first.job), folder=tmp_path)
    assert_finished_like(first.wait(), first.run, long_run)


@pytest.mark.lengthy
def test_signal_during_the_configuration_check_requeues_the_job(
    cluster: Cluster, tmp_path: Path, long_run: Undisturbed
) -> None:
    # In the job's first attempt, the check waits for the signal.
    python, checking, signalled = (tmp_path / name for name in ("python", "checking", "signalled"))
    python.write_text(
        f"""#!/bin/bash
if [[ $* == *" config run-directory "* && ! -e {signalled} ]]; then
    touch {checking}
    until [[ -e {signalled} ]]; do sleep 0.1; done
fi
exec {sys.executable} "$@"
"""
    )
    python.chmod(0o755)
    submitted = SubmittedRun(
        cluster, tmp_path, long_run.config, "--nodes=1", RANKS_PER_NODE="1", DIST_TRAIN_PYTHON=str(python)
    )
    wait_for(checking.exists, lambda: cluster.job(submitted.job).output)
    cluster.run("scancel", "--batch", "--signal=USR1", str(submitted.job), folder=tmp_path)
    signalled.touch()
    ended = submitted.wait_for_weights_of(long_run)
    assert ended.restarts == 1, ended.output


@pytest.mark.lengthy
def test_array_task_accepts_overrides_with_quotes_spaces_and_newlines(
    cluster: Cluster, tmp_path: Path, large_batch: Undisturbed
) -> None:
    overrides = 'run.seed=1\n\'noise.exclude=["norm", "bias"]\'\n  \'run.directory=' + str(tmp_path / "my runs") + "'"
    array = SubmittedRun(
        cluster, tmp_path, large_batch.config, "--array=1", "--nodes=1", OVERRIDES=overrides, RUN_DIR=""
    )
    ended = cluster.wait(f"{array.job}_1")
    assert (ended.state, ended.code) == ("COMPLETED", 0), ended.output
    [config] = (tmp_path / "my runs").glob("*/config.yaml")
    text = config.read_text()
    assert "seed: 1\n" in text
    assert "- norm\n  - bias\n" in text


@pytest.mark.lengthy
def test_signalled_run_stops_where_scontrol_fails(cluster: Cluster, tmp_path: Path, long_run: Undisturbed) -> None:
    programs = tmp_path / "bin"
    programs.mkdir()
    (programs / "scontrol").write_text("#!/bin/sh\nexit 1\n")
    (programs / "scontrol").chmod(0o755)
    variables = paced(tmp_path, RANKS_PER_NODE="1")
    broken = {"PATH": f"{programs}:{os.environ['PATH']}", "DIST_TRAIN_ROOT": str(ROOT)}
    submitted = SubmittedRun(cluster, tmp_path, long_run.config, "--nodes=1", **variables, **broken)
    submitted.wait_for_step(5)
    cluster.run("scancel", "--batch", "--signal=USR1", str(submitted.job), folder=tmp_path)
    ended = submitted.wait()
    assert (ended.state, ended.code) == ("FAILED", ExitCode.STOPPED), ended.output
    assert status(submitted.run)["state"] == "stopped"
    hurry(tmp_path)
    again = SubmittedRun(cluster, tmp_path, long_run.config, "--nodes=1", **variables).wait()
    assert again.state == "COMPLETED"
    assert weights_digest(submitted.run) == long_run.weights
