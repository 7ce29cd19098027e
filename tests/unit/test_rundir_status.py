"""`status.json`: written whole at each change of state, at a steady pace between, readable at any time."""

from __future__ import annotations

import json
import os
from pathlib import Path

import pytest

from dist_train.outcome import ExitCode
from dist_train.rundir.status import LAUNCH_VARIABLE, StatusFile, another_failed, read_status


@pytest.fixture
def path(tmp_path: Path) -> Path:
    return tmp_path / "status.json"


def test_nothing_is_written_before_the_first_change(path: Path) -> None:
    StatusFile(path, 2)
    assert read_status(path) is None


def test_a_change_of_state_is_written_at_once(path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv(LAUNCH_VARIABLE, "abc")
    file = StatusFile(path, 3)
    file.change("running", step=4, epoch=0.5, total_steps=80)
    status = read_status(path)
    assert status == file.current
    assert status is not None
    assert (status.state, status.step, status.epoch, status.total_steps) == ("running", 4, 0.5, 80)
    assert (status.world_size, status.launch, status.pid) == (3, "abc", os.getpid())
    assert (status.exit_code, status.finished) == (None, None)


def test_progress_is_written_at_a_steady_pace_and_never_lost(path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    clock = [100.0]
    monkeypatch.setattr("dist_train.rundir.status.time.monotonic", lambda: clock[0])
    file = StatusFile(path, 1)
    file.change("running")
    written = []
    for step in range(1, 9):
        clock[0] += 0.3
        file.progress(step=step)
        status = read_status(path)
        assert status is not None
        written.append(status.step)
    assert written == [0, 0, 0, 4, 4, 4, 4, 8]
    file.change("stopping")
    assert read_status(path) == file.current
    assert file.current.step == 8


def test_the_end_says_how_and_when(path: Path) -> None:
    file = StatusFile(path, 1)
    file.progress(step=9)
    file.end("failed", ExitCode.DIVERGED, "the loss is not finite")
    fields = json.loads(path.read_text())
    assert (fields["state"], fields["exit_code"], fields["reason"], fields["step"]) == (
        "failed",
        3,
        "the loss is not finite",
        9,
    )
    assert fields["finished"] >= fields["started"]
    assert fields["updated"].endswith("+00:00")


@pytest.mark.parametrize(
    ("told", "is_another"),
    [
        ({"host": "node2"}, True),
        ({"pid": 1}, True),
        ({}, False),
        ({"host": "node2", "launch": "an earlier one"}, False),
        ({"host": "node2", "state": "running"}, False),
    ],
)
def test_a_failure_that_another_process_of_the_launch_told_is_not_overwritten_by_progress(
    path: Path, told: dict[str, object], is_another: bool
) -> None:
    file = StatusFile(path, 2)
    file.change("failed", reason="the disk is gone")
    path.write_text(json.dumps(json.loads(path.read_text()) | told))
    assert another_failed(path) == is_another
    late = StatusFile(path, 2)
    late.progress(step=7)
    status = read_status(path)
    assert status is not None
    assert (status.state == "failed") == is_another


def test_a_field_that_there_is_not_is_refused(path: Path) -> None:
    with pytest.raises(TypeError):
        StatusFile(path, 1).progress(stepp=1)


@pytest.mark.parametrize("text", ["", "{", "[]", "3", '{"state": "running"}', "\xff"])
def test_what_is_no_status_reads_as_none(path: Path, text: str) -> None:
    path.write_text(text, encoding="latin-1")
    assert read_status(path) is None
