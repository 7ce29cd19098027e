"""Checkpoints are written from a copy while training continues; a fault is reported, not raised."""

from __future__ import annotations

import errno
import os
import threading
import time
from collections.abc import Callable, Mapping
from contextlib import nullcontext
from dataclasses import dataclass, field
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from dist_train.checkpoint.files import (
    CheckpointFile,
    Contents,
    adopt,
    list_checkpoints,
    newest_whole,
    read_checkpoint,
    write_checkpoint,
)
from dist_train.checkpoint.writer import CheckpointWriter, NotWritten, Saving, Written
from dist_train.cluster.communicator import SingleProcess
from dist_train.config.sections import CheckpointSettings
from dist_train.outcome import FaultError, UsageError
from dist_train.rundir import atomic
from dist_train.rundir.metrics_file import JsonLines, read_records, rewind
from dist_train.rundir.paths import RunDirectory
from tests.raising import raises
from tests.unit.checkpoint_files import contents, write
from tests.unit.records import train
from tests.waiting import PATIENCE
from tests.waiting import wait_for as wait_until


def nothing() -> None:
    pass


def wait_for(event: threading.Event) -> None:
    assert event.wait(PATIENCE)


@pytest.mark.parametrize("background", [True, False])
def test_what_is_written_is_the_state_at_the_moment_of_submission(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, background: bool
) -> None:
    go = threading.Event()
    if not background:
        go.set()

    def write_later(folder: Path, state: Contents, before_publishing: Callable[[], None]) -> CheckpointFile:
        wait_for(go)
        return write_checkpoint(folder, state, before_publishing)

    monkeypatch.setattr("dist_train.checkpoint.writer.write_checkpoint", write_later)
    writer = CheckpointWriter(tmp_path, CheckpointSettings(background=background), nothing)
    state = contents(1, average={"kept": [{"weight": torch.ones(3)}]}, noise={"strength": torch.ones(3)})
    writer.submit(state, None)
    writer.wait_until_copied()
    state.model["weight"].fill_(99.0)
    state.average["kept"][0]["weight"].fill_(99.0)
    state.noise["strength"].fill_(99.0)
    state.optimizer["state"][0]["momentum_buffer"].fill_(99.0)
    state.optimizer["param_groups"][0]["lr"] = 99.0
    go.set()
    writer.wait()
    [result] = writer.results()
    assert isinstance(result, Written)
    read = read_checkpoint(result.file.path)
    assert torch.equal(read.model["weight"], torch.full((3,), 1.0))
    assert torch.equal(read.optimizer["state"][0]["momentum_buffer"], torch.full((3,), 1.0))
    assert torch.equal(read.average["kept"][0]["weight"], torch.ones(3))
    assert torch.equal(read.noise["strength"], torch.ones(3))
    assert read.optimizer["param_groups"] == [{"lr": 0.1, "params": [0]}]
    assert read.config == state.config


@dataclass(frozen=True)
class MoreContents(Contents):
    """The contents of a version that saves one more tensor."""

    more: Mapping[str, torch.Tensor] = field(default_factory=dict)


def test_every_field_is_copied_before_training_may_change_it(tmp_path: Path) -> None:
    changed = threading.Event()

    def refuse_until_changed() -> None:
        if not changed.is_set():
            wait_for(changed)
            raise OSError(errno.ENOSPC, "full")

    writer = CheckpointWriter(tmp_path, CheckpointSettings(), refuse_until_changed)
    tensor = torch.ones(3)
    writer.submit(MoreContents(**vars(contents(1)), more={"tensor": tensor}), None)
    writer.wait_until_copied()
    tensor.zero_()
    changed.set()
    writer.wait()
    *_, result = writer.results()  # written again, from the start, after a refusal
    assert isinstance(result, Written)
    assert torch.load(result.file.path)["more"]["tensor"].tolist() == [1.0, 1.0, 1.0]


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


def test_copies_from_a_gpu_are_made_in_the_stream_that_trains_of_which_nothing_later_is_waited_for(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    current = threading.local()  # as in CUDA: a stream of each thread, at first the default one of the first GPU
    done: list[tuple[str, object]] = []

    class Stream:
        """A stream in which an update is queued after the copies, and never ends: it cannot be waited for."""

        def record_event(self) -> SimpleNamespace:
            done.append(("end", self))
            return SimpleNamespace(synchronize=lambda: done.append(("wait", self)))

    def copy(writer: CheckpointWriter, name: str, value: object) -> object:
        done.append(("copy", getattr(current, "stream", "default")))
        return copy_value(writer, name, value)

    copy_value = CheckpointWriter._copy
    monkeypatch.setattr(CheckpointWriter, "_copy", copy)
    monkeypatch.setattr(torch.cuda, "is_initialized", lambda: True)
    monkeypatch.setattr(torch.cuda, "current_stream", lambda: current.stream)
    monkeypatch.setattr(torch.cuda, "set_stream", lambda stream: setattr(current, "stream", stream))
    monkeypatch.setattr(torch.cuda, "synchronize", lambda device=None: pytest.fail("fails while a graph is recorded"))
    trains = current.stream = Stream()
    writer = CheckpointWriter(tmp_path, CheckpointSettings(), nothing)
    writer.submit(contents(1), None)
    writer.close()
    [result] = writer.results()
    assert isinstance(result, Written)
    assert {*done[:-2]} == {("copy", trains)}
    assert done[-2:] == [("end", trains), ("wait", trains)]


def test_submission_does_not_wait_for_the_disk_but_the_next_one_waits_for_its_turn(tmp_path: Path) -> None:
    go, writing = threading.Event(), threading.Event()

    def slow() -> None:
        writing.set()
        wait_for(go)

    writer = CheckpointWriter(tmp_path, CheckpointSettings(), slow)
    writer.submit(contents(1), None)
    wait_for(writing)
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


def refuse(times: int) -> Callable[[], None]:
    """Return what stands for a disk that is full so many times."""
    faults = [OSError(errno.ENOSPC, "No space left on device")] * times

    def fail() -> None:
        if faults:
            raise faults.pop()

    return fail


def test_promise_6_a_fault_is_reported_and_the_next_one_is_written(tmp_path: Path) -> None:
    writer = CheckpointWriter(tmp_path, CheckpointSettings(background=False), refuse(1))
    writer.submit(contents(1), None)
    [result] = writer.results()
    assert isinstance(result, NotWritten)
    assert (result.step, str(result.error)) == (1, "[Errno 28] No space left on device")
    writer.submit(contents(2), None)
    [after] = writer.results()
    assert isinstance(after, Written)
    assert [file.step for file in list_checkpoints(tmp_path)] == [2]


def test_in_the_background_what_was_refused_is_tried_again_and_again_while_training_continues(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("dist_train.checkpoint.writer._FIRST_PAUSE_SECONDS", 0.01)
    refusals = iter([False, True, True])

    def fail() -> None:
        if next(refusals, False):
            raise OSError(errno.ENOSPC, "No space left on device")

    writer = CheckpointWriter(tmp_path, CheckpointSettings(), fail)
    writer.submit(contents(1), None)
    writer.submit(contents(2), None)  # waits for the first, which is not to end the pauses of this one
    results = wait_for_results(writer, 3)
    assert [type(result) for result in results] == [Written, NotWritten, Written]
    assert [file.step for file in list_checkpoints(tmp_path)] == [1, 2]


def test_the_time_of_writing_is_that_of_the_attempt_that_succeeded(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    now, durations = [0.0], [100.0, 2.0]

    def fail_once() -> None:
        now[0] += durations.pop(0)
        if durations:
            raise OSError(errno.ENOSPC, "No space left on device")

    clock = SimpleNamespace(perf_counter=lambda: now[0], sleep=time.sleep)
    monkeypatch.setattr("dist_train.checkpoint.writer.time", clock)
    writer = CheckpointWriter(tmp_path, CheckpointSettings(), fail_once)
    writer.submit(contents(1), None)
    writer.close()
    written = writer.results()[-1]
    assert isinstance(written, Written)
    assert written.seconds == 2.0


def test_what_is_refused_to_the_end_is_reported_once(tmp_path: Path) -> None:
    writer = CheckpointWriter(tmp_path, CheckpointSettings(), refuse(100))
    writer.submit(contents(1), None)
    writer.close()
    assert [type(result) for result in writer.results()] == [NotWritten]


@pytest.mark.parametrize("times", [1, 100])
def test_a_run_fails_by_its_last_one_unless_a_later_attempt_has_written_it(tmp_path: Path, times: int) -> None:
    writer = CheckpointWriter(tmp_path, CheckpointSettings(), refuse(times))
    events: list[str] = []
    saving = Saving(SingleProcess(), lambda name, *_, **__: events.append(name), writer)
    saving.save(1, lambda: contents(1), None)
    with raises(FaultError, "checkpoint-not-written") if times > 1 else nullcontext():
        saving.finish()
    assert events == ["checkpoint_failed", "checkpoint"][: 1 if times > 1 else 2]


def test_a_step_that_the_writer_has_is_not_saved_again(tmp_path: Path) -> None:
    events: list[str] = []
    writer = CheckpointWriter(tmp_path, CheckpointSettings(), nothing)
    saving = Saving(SingleProcess(), lambda name, *_, **__: events.append(name), writer)
    for _ in range(2):
        saving.save(1, lambda: contents(1), None)
        saving.settle()
    saving.close()
    assert events == ["checkpoint"]


@pytest.mark.parametrize(
    ("number", "fix"), [(errno.ENOSPC, "space"), (errno.ENOENT, "back"), (errno.EROFS, "Fix that")]
)
def test_the_last_one_s_error_says_what_to_do(tmp_path: Path, number: int, fix: str) -> None:
    def fail() -> None:
        raise OSError(number, "refused")

    writer = CheckpointWriter(tmp_path, CheckpointSettings(background=False), fail)
    writer.submit(contents(1), None)
    writer.close()
    [result] = writer.results()
    assert isinstance(result, NotWritten)
    assert fix in str(result.fault())


def test_what_is_refused_lies_in_the_fallback_until_the_next_one_is_written(tmp_path: Path) -> None:
    disk, fallback = tmp_path / "disk", tmp_path / "elsewhere" / "run"
    disk.mkdir()
    # Refused; in the fallback written all the same; refused again as the last try.
    script = iter([True, True, True])

    def fail() -> None:
        if next(script, False):
            raise OSError(errno.EDQUOT, "Disk quota exceeded")

    writer = CheckpointWriter(disk, CheckpointSettings(), fail, fallback)
    writer.submit(contents(1), None)
    writer.wait()
    [result] = writer.results()
    assert isinstance(result, NotWritten)
    assert result.fallback is not None
    assert fallback.stat().st_mode & 0o777 == 0o700
    assert read_checkpoint(result.fallback).step == 1
    adopt(fallback, disk)
    assert ([file.step for file in list_checkpoints(disk)], list_checkpoints(fallback)) == ([1], [])
    assert read_checkpoint(disk / result.fallback.name).step == 1


def test_records_that_the_disk_refuses_lie_in_the_fallback_beside_the_checkpoint(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def fail(*_: object) -> int:
        raise OSError(errno.ENOSPC, "No space left on device")

    run, fallback = RunDirectory(tmp_path / "run"), tmp_path / "elsewhere"
    run.create()
    lines = JsonLines(run.metrics)
    writer = CheckpointWriter(run.checkpoints, CheckpointSettings(), lines.flush, fallback, lambda: lines.waiting)
    lines.record(train(1))
    monkeypatch.setattr(os, "write", fail)
    lines.record(train(2))
    assert lines.waiting.count(b"\n") == 2, "the disk may also lose the first, which nothing has flushed"
    writer.submit(contents(2), None)
    writer.close()
    monkeypatch.undo()
    adopt(fallback, run.checkpoints)
    rewind(run.metrics, 2)
    assert read_records(run.metrics) == (train(1), train(2))
    assert [file.step for file in list_checkpoints(run.checkpoints)] == [2]
    assert list(fallback.iterdir()) == []


@pytest.mark.parametrize("failing", ["remove_from_fallback", "remove_others"])
def test_what_cannot_be_deleted_in_the_fallback_does_not_make_a_written_one_fail(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture, failing: str
) -> None:
    def fail(*_: object, **__: object) -> None:
        raise OSError(errno.EIO, "Input/output error")

    monkeypatch.setattr(f"dist_train.checkpoint.writer.{failing}", fail)
    disk, fallback = tmp_path / "disk", tmp_path / "elsewhere"
    disk.mkdir()
    # Refused; in the fallback written all the same; written as the last try.
    writer = CheckpointWriter(disk, CheckpointSettings(), refuse(2), fallback)
    writer.submit(contents(1), None)
    writer.close()
    failed, written = writer.results()
    assert isinstance(failed, NotWritten)
    assert failed.fallback is not None
    assert isinstance(written, Written)
    assert "cannot be deleted: [Errno 5] Input/output error" in caplog.text


def test_the_fallback_holds_the_last_one_alone_and_none_once_there_is_room(tmp_path: Path) -> None:
    disk, fallback, full = tmp_path / "disk", tmp_path / "elsewhere", threading.Event()
    disk.mkdir()
    full.set()

    def fail() -> None:
        if full.is_set():
            raise OSError(errno.ENOSPC, "No space left on device")

    writer = CheckpointWriter(disk, CheckpointSettings(), fail, fallback)
    writer.submit(contents(1), None)
    writer.submit(contents(2), None)
    assert [type(result) for result in wait_for_results(writer, 2)] == [NotWritten, NotWritten]
    assert [file.step for file in list_checkpoints(fallback)] == [2]
    full.clear()
    writer.close()
    assert ([file.step for file in list_checkpoints(disk)], list_checkpoints(fallback)) == ([2], [])


def test_the_fallback_holds_none_once_a_later_one_is_written_without_a_retry(tmp_path: Path) -> None:
    disk, fallback = tmp_path / "disk", tmp_path / "elsewhere"
    disk.mkdir()
    writer = CheckpointWriter(disk, CheckpointSettings(background=False), refuse(1), fallback)
    writer.submit(contents(1), None)
    assert [file.step for file in list_checkpoints(fallback)] == [1]
    writer.submit(contents(2), None)
    writer.close()
    assert ([file.step for file in list_checkpoints(disk)], list_checkpoints(fallback)) == ([2], [])


@given(st.lists(st.tuples(st.integers(1, 40), st.booleans()), max_size=4))
def test_what_an_earlier_launch_has_left_in_the_fallback_does_not_cost_the_new_one(
    tmp_path_factory: pytest.TempPathFactory, left: list[tuple[int, bool]]
) -> None:
    """A damaged one may be of a later step than the launch has resumed from."""
    folder = tmp_path_factory.mktemp("fallback")
    disk, fallback = folder / "disk", folder / "elsewhere"
    for each in (disk, fallback):
        each.mkdir()
    write(disk, 8)
    for step, is_damaged in left:
        path = write(fallback, step).path
        if is_damaged:
            path.write_bytes(b"?")
    adopt(fallback, disk)
    step = list_checkpoints(disk)[-1].step + 1
    writer = CheckpointWriter(disk, CheckpointSettings(background=False), refuse(1), fallback)
    writer.submit(contents(step), None)
    writer.close()
    [result] = writer.results()
    assert isinstance(result, NotWritten)
    assert result.fallback is not None
    assert read_checkpoint(result.fallback).step == step
    assert [file.step for file in list_checkpoints(fallback)] == [step]


def test_a_whole_one_of_a_later_step_stays_in_the_fallback(tmp_path: Path) -> None:
    """The launch has not seen it, as in an old listing of a file server, or it is of a copy of the run."""
    disk, fallback = tmp_path / "disk", tmp_path / "elsewhere"
    for each in (disk, fallback):
        each.mkdir()
    write(fallback, 40)
    writer = CheckpointWriter(disk, CheckpointSettings(background=False), refuse(1), fallback)
    writer.submit(contents(9), None)
    writer.close()
    assert [file.step for file in list_checkpoints(fallback)] == [9, 40]


def test_a_fallback_that_others_could_change_is_neither_written_nor_read(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    disk, fallback = tmp_path / "disk", tmp_path / "elsewhere"
    disk.mkdir()
    fallback.mkdir()
    fallback.chmod(0o777)
    writer = CheckpointWriter(disk, CheckpointSettings(background=False), refuse(100), fallback)
    writer.submit(contents(1), None)
    [result] = writer.results()
    writer.close()
    assert isinstance(result, NotWritten)
    assert result.fallback is None
    assert str(fallback) in caplog.text
    write(fallback, 1)
    with raises(UsageError, "folder-foreign"):
        adopt(fallback, disk)
    assert list_checkpoints(disk) == []


@pytest.mark.parametrize(
    ("there", "damaged", "expected", "left"),
    [
        ((10, 20), "disk", [10, 15, 20], []),  # 20 is only named whole
        ((10,), "elsewhere", [10], [15]),
        ((20,), "", [20], []),
        ((10, 15), "", [10, 15], []),
    ],
)
def test_the_fallback_is_emptied_once_a_whole_one_is_as_new(
    tmp_path: Path, there: tuple[int, ...], damaged: str, expected: list[int], left: list[int]
) -> None:
    disk, fallback = tmp_path / "disk", tmp_path / "elsewhere"
    for folder in (disk, fallback):
        folder.mkdir()
    for step in there:
        write(disk, step)
    write(fallback, 15)
    if damaged:
        list_checkpoints(tmp_path / damaged)[-1].path.write_bytes(b"?")
    before = {path: path.stat().st_ino for path in disk.iterdir()}
    adopt(fallback, disk)
    assert {path: path.stat().st_ino for path in before} == before, "none is written again"
    assert [file.step for file in list_checkpoints(disk)] == expected
    assert [file.step for file in list_checkpoints(fallback)] == left


def test_promise_6_a_launch_killed_while_it_copies_from_the_fallback_leaves_no_record_without_its_checkpoint(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    disk, fallback = tmp_path / "disk", tmp_path / "elsewhere"
    for folder, step in ((disk, 1), (fallback, 2)):
        folder.mkdir()
        write(folder, step)
    copy, damage = atomic.write_bytes, dict[str, str]()

    def copy_and_end(path: Path, content: bytes) -> None:
        copy(path, content)
        raise KeyboardInterrupt

    monkeypatch.setattr(atomic, "write_bytes", copy_and_end)
    with pytest.raises(KeyboardInterrupt):
        adopt(fallback, disk)
    monkeypatch.undo()
    found = newest_whole(disk, damage)
    assert found is not None
    assert (found.step, damage) == (1, {})
    adopt(fallback, disk)
    assert [file.step for file in list_checkpoints(disk)] == [1, 2]


def wait_for_results(writer: CheckpointWriter, count: int) -> list[Written | NotWritten]:
    found: list[Written | NotWritten] = []

    def is_enough() -> bool:
        found.extend(writer.results())
        return len(found) >= count

    wait_until(is_enough)
    return found


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
