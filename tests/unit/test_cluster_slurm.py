"""What Slurm's environment says; and a machine without Slurm."""

from __future__ import annotations

from pathlib import Path

import pytest

from dist_train.cluster.launch import SlurmJob, comment_on_job, current_job, job_end, job_states, submit
from dist_train.outcome import UsageError
from tests.raising import raises


def test_outside_of_slurm_there_is_no_job() -> None:
    assert current_job({}) is None


def test_the_environment_names_the_job() -> None:
    environment = {
        "SLURM_JOB_ID": "17",
        "SLURM_JOB_END_TIME": "1795522619",
        "SLURM_RESTART_COUNT": "1",
    }
    assert current_job(environment) == SlurmJob(id="17", name="17", end=1795522619, restarts=1)


def test_what_slurm_does_not_say_is_not_made_up() -> None:
    assert current_job({"SLURM_JOB_ID": "17"}) == SlurmJob(id="17", name="17", end=None, restarts=0)


def test_the_last_task_of_an_array_is_not_named_like_the_array(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    environment = {"SLURM_JOB_ID": "17", "SLURM_ARRAY_JOB_ID": "17", "SLURM_ARRAY_TASK_ID": "6"}
    job = current_job(environment)
    assert job is not None
    assert (job.id, job.name) == ("17", "17_6")
    scontrol = tmp_path / "scontrol"
    scontrol.write_text(f'#!/bin/sh\necho "$@" >{tmp_path}/asked\n')
    scontrol.chmod(0o755)
    monkeypatch.setenv("PATH", str(tmp_path))
    comment_on_job("disk full", environment)
    assert (tmp_path / "asked").read_text() == "update jobid=17_6 comment=disk full\n"


def test_without_slurm_nothing_is_known_of_a_job(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setenv("PATH", str(tmp_path))
    assert job_states(["17"]) == {}
    assert job_end("17") is None
    with raises(UsageError, "sbatch-missing"):
        submit("#!/bin/bash", ())


def test_squeue_is_asked_once_for_all_jobs(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    squeue = tmp_path / "squeue"
    # The last job is a task of an array with the id 17.
    squeue.write_text('#!/bin/sh\necho "$@" >&2\necho "17 RUNNING"\necho "18 PENDING"\necho "20 RUNNING"\n')
    squeue.chmod(0o755)
    monkeypatch.setenv("PATH", str(tmp_path))
    assert job_states(["17", "18", "19"]) == {"17": "RUNNING", "18": "PENDING"}
