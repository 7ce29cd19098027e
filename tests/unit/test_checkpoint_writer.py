"""Checkpoints are written from a copy while training continues; a fault is reported, not raised."""

from __future__ import annotations

import errno
import threading
from pathlib import Path

import pytest
import torch

from dist_train.checkpoint.files import list_checkpoints, read_checkpoint
from dist_train.checkpoint.writer import CheckpointWriter, NotWritten, Written
from dist_train.config.sections import CheckpointSettings
from tests.unit.checkpoint_files import contents


def nothing() -> None:
    pass


def wait_for(event: threading.Event) -> None:
    assert event.wait(30)


@pytest.mark.parametrize("background", [True, False])
def test_what_is_written_is_the_state_at_the_moment_of_submission(tmp_path: Path, background: bool) -> None:
    go = threading.Event()
    if not background:
        go.set()
    writer = CheckpointWriter(tmp_path, CheckpointSettings(background=background), lambda: wait_for(go))
    state = contents(1)
    writer.submit(state, None)
    writer.wait_until_copied()
    state.model["weight"].fill_(99.0)
    state.optimizer["state"][0]["momentum_buffer"].fill_(99.0)
    state.optimizer["param_groups"][0]["lr"] = 99.0
    go.set()
    writer.wait()
    [result] = writer.results()
    assert isinstance(result, Written)
    read = read_checkpoint(result.file.path)
    assert torch.equal(read.model["weight"], torch.full((3,), 1.0))
    assert torch.equal(read.optimizer["state"][0]["momentum_buffer"], torch.full((3,), 1.0))
    assert read.optimizer["param_groups"] == [{"lr": 0.1, "params": [0]}]
    assert read.config == state.config


def test_the_optimizer_may_move_on_also_after_a_fault_in_copying(tmp_path: Path) -> None:
    writer = CheckpointWriter(tmp_path, CheckpointSettings(), nothing)
    writer.wait_until_copied()
    unreadable = {"state": torch.ones(3, device="meta")}
    writer.submit(contents(1, optimizer=unreadable), None)
    writer.wait_until_copied()
    writer.close()
    [result] = writer.results()
    assert isinstance(result, NotWritten)
    assert list_checkpoints(tmp_path) == []


def test_submission_does_not_wait_for_the_disk_but_the_next_one_waits_for_its_turn(tmp_path: Path) -> None:
    go, writing = threading.Event(), threading.Event()

    def slow() -> None:
        writing.set()
        assert go.wait(30)

    writer = CheckpointWriter(tmp_path, CheckpointSettings(), slow)
    writer.submit(contents(1), None)
    assert writing.wait(30)
    assert writer.results() == []
    threading.Timer(0.05, go.set).start()
    writer.submit(contents(2), None)
    assert go.is_set()
    writer.wait()
    results = writer.results()
    assert [result.file.step for result in results if isinstance(result, Written)] == [1, 2]
    assert [file.step for file in list_checkpoints(tmp_path)] == [1, 2]
    assert writer.results() == []


def test_in_the_foreground_it_is_there_when_submission_returns(tmp_path: Path) -> None:
    writer = CheckpointWriter(tmp_path, CheckpointSettings(background=False), nothing)
    writer.submit(contents(1), None)
    [result] = writer.results()
    assert isinstance(result, Written)
    assert result.stall_seconds == result.seconds > 0
    assert [file.step for file in list_checkpoints(tmp_path)] == [1]


@pytest.mark.parametrize("background", [True, False])
def test_promise_6_a_fault_is_reported_and_the_next_one_is_written(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, background: bool
) -> None:
    faults = [OSError(errno.ENOSPC, "No space left on device")]

    def fail_once() -> None:
        if faults:
            raise faults.pop()

    writer = CheckpointWriter(tmp_path, CheckpointSettings(background=background), fail_once)
    writer.submit(contents(1), None)
    writer.wait()
    [result] = writer.results()
    assert isinstance(result, NotWritten)
    assert (result.step, str(result.error)) == (1, "[Errno 28] No space left on device")
    writer.submit(contents(2), None)
    writer.wait()
    [after] = writer.results()
    assert isinstance(after, Written)
    assert [file.step for file in list_checkpoints(tmp_path)] == [2]


def test_old_ones_are_deleted_once_a_new_one_is_there(tmp_path: Path) -> None:
    writer = CheckpointWriter(tmp_path, CheckpointSettings(keep=2), nothing)
    for step in range(1, 7):
        writer.submit(contents(step), best_step=2)
    writer.wait()
    assert [file.step for file in list_checkpoints(tmp_path)] == [2, 5, 6]


def test_tensors_of_changed_shapes_are_copied_anew(tmp_path: Path) -> None:
    writer = CheckpointWriter(tmp_path, CheckpointSettings(background=False), nothing)
    for size, dtype in ((3, torch.float32), (5, torch.float32), (5, torch.int64)):
        writer.submit(contents(size, model={"weight": torch.ones(size, dtype=dtype)}), None)
        read = read_checkpoint(tmp_path / f"step-{size:08d}.pt")
        assert torch.equal(read.model["weight"], torch.ones(size, dtype=dtype))
