"""What Slurm's environment says; and a machine without Slurm."""

from __future__ import annotations

import os
from datetime import datetime
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
        "DIST_TRAIN_REQUEUE": "1",
    }
    assert current_job(environment) == SlurmJob(id="17", name="17", end=1795522619, restarts=1, is_requeued=True)


def test_what_slurm_does_not_say_is_not_made_up() -> None:
    assert current_job({"SLURM_JOB_ID": "17"}) == SlurmJob(id="17", name="17", end=None, restarts=0, is_requeued=False)


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


def test_the_end_of_a_job_is_read_whatever_format_the_user_prefers(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    squeue = tmp_path / "squeue"
    squeue.write_text(
        '#!/bin/sh\n[ "$SLURM_TIME_FORMAT" != relative ] && echo 2026-12-01T12:30:00 || echo Tomorr 12:30\n'
    )
    squeue.chmod(0o755)
    monkeypatch.setenv("PATH", str(tmp_path), prepend=os.pathsep)
    monkeypatch.setenv("SLURM_TIME_FORMAT", "relative")
    assert job_end("17") == datetime(2026, 12, 1, 12, 30).timestamp()


def test_without_slurm_nothing_is_known_of_a_job(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setenv("PATH", str(tmp_path))
    assert job_states(["17"]) == {}
    assert job_end("17") is None
    with raises(UsageError, "sbatch-missing"):
        submit("#!/bin/bash", ())


@pytest.mark.parametrize(
    ("inherited", "passed_on"),
    [
        ({}, {"SLURM_CONF", "SLURM_HINT", "SBATCH_QOS", "DIST_TRAIN_SETUP"}),
        ({"SLURM_JOB_ID": "17", "SLURM_NTASKS": "1"}, {"SLURM_CONF", "SBATCH_QOS", "DIST_TRAIN_SETUP"}),
    ],
    ids=["on a login node", "within a job"],
)
def test_a_job_does_not_inherit_what_describes_another(
    inherited: dict[str, str], passed_on: set[str], monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    for name in [name for name in os.environ if name.startswith(("SLURM_", "SBATCH_", "DIST_TRAIN_"))]:
        monkeypatch.delenv(name)
    sbatch = tmp_path / "sbatch"
    sbatch.write_text(f"#!/bin/bash\ncompgen -e >{tmp_path}/names\necho 18\n")
    sbatch.chmod(0o755)
    given = {"SLURM_CONF": "a", "SLURM_HINT": "b", "SBATCH_QOS": "c", "DIST_TRAIN_SETUP": "d", **inherited}
    for name, value in given.items():
        monkeypatch.setenv(name, value)
    monkeypatch.setenv("PATH", str(tmp_path))
    assert submit("#!/bin/bash", ()) == "18"
    assert given.keys() & set((tmp_path / "names").read_text().split()) == passed_on


def test_a_job_is_known_though_the_site_s_sbatch_prints_a_banner(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    sbatch = tmp_path / "sbatch"
    sbatch.write_text("#!/bin/sh\necho '--> Verifying your quota; 3 jobs...OK'\necho\necho '18;cluster'\n")
    sbatch.chmod(0o755)
    monkeypatch.setenv("PATH", str(tmp_path))
    assert submit("#!/bin/bash", ()) == "18"


def test_a_job_is_known_though_sbatch_prints_what_is_no_utf8(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    sbatch = tmp_path / "sbatch"
    sbatch.write_text("#!/bin/sh\nprintf 'caf\\351\\n' >&2\necho 18\n")
    sbatch.chmod(0o755)
    monkeypatch.setenv("PATH", str(tmp_path))
    assert submit("#!/bin/bash", ()) == "18"


def test_squeue_is_asked_once_for_all_jobs(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    squeue = tmp_path / "squeue"
    # The last job is a task of an array with the id 17.
    jobs = 'echo "17 RUNNING"\necho "18 PENDING"\necho "20 RUNNING"\n'
    squeue.write_text(f'#!/bin/sh\n[ -z "$SQUEUE_PARTITION" ] || exit 0\n{jobs}')
    squeue.chmod(0o755)
    monkeypatch.setenv("SQUEUE_PARTITION", "debug")  # a filter of the user's own
    monkeypatch.setenv("PATH", str(tmp_path))
    assert job_states(["17", "18", "19"]) == {"17": "RUNNING", "18": "PENDING"}
