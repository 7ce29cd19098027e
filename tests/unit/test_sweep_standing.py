"""What a sweep does with a run, by the run's state and that of its Slurm job."""

from __future__ import annotations

from pathlib import Path

import pytest

from dist_train.rundir.status import StatusFile
from dist_train.sweep.standing import standing_of
from tests.unit.studies import small_plan


@pytest.mark.parametrize(
    ("job_state", "ours", "expected"),
    [
        ("RUNNING", "", ("running", "busy")),
        ("PENDING", "", ("lost", "busy")),
        ("NODE_FAIL", "", ("lost", "start")),
        ("RUNNING", "17", ("lost", "start")),
    ],
)
def test_a_run_at_work_is_judged_beside_its_job(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, job_state: str, ours: str, expected: tuple[str, str]
) -> None:
    squeue = tmp_path / "squeue"
    squeue.write_text(f"#!/bin/sh\necho 17 {job_state}\n")
    squeue.chmod(0o755)
    monkeypatch.setenv("PATH", str(tmp_path))
    run = small_plan(tmp_path).runs[0]
    run.directory.mkdir(parents=True)
    monkeypatch.setenv("SLURM_JOB_ID", "17")
    StatusFile(run.files.status, 1).change("running")
    monkeypatch.setenv("SLURM_JOB_ID", ours)
    standing = standing_of(run)
    assert (standing.state, standing.then) == expected
