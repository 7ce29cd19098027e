"""status.json, counts of events and ranks.json: whole at any time, at a steady pace, whatever the disk says."""

from __future__ import annotations

import errno
import json
import logging
import math
import os
from pathlib import Path

import pytest

from dist_train.outcome import ExitCode
from dist_train.rundir import atomic
from dist_train.rundir.lock import LockRequest
from dist_train.rundir.paths import RunDirectory
from dist_train.rundir.records import EventRecord, Measurement, Outcome, RankMeasurement, StepParts
from dist_train.rundir.status import (
    LAUNCH_VARIABLE,
    EventCounts,
    RanksFile,
    RanksReading,
    StatusFile,
    another_failed,
    read_counts,
    read_ranks,
    read_status,
    record_lost,
)
from tests.unit.exporting import FACTS, OUTCOME, train


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


def test_lost_launch_is_recorded_unless_it_recorded_its_end_itself(path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    record_lost(path, "abc", "no rank is left")
    assert not path.exists()
    monkeypatch.setenv(LAUNCH_VARIABLE, "abc")
    file = StatusFile(path, 3, metrics=lambda: "http://127.0.0.1:9810/metrics")
    file.change("running", step=4)
    record_lost(path, "another", "no rank is left")
    assert read_status(path) == file.current
    record_lost(path, "abc", f"no rank is left: {'x' * 100_000}")
    status = read_status(path)
    assert status is not None
    assert (status.state, status.exit_code, status.reason[:15], status.step) == ("failed", 1, "no rank is left", 4)
    assert len(status.reason) < 600
    assert (status.finished is not None, status.metrics) == (True, "")
    file.end("stopped", ExitCode.STOPPED, "")
    record_lost(path, "abc", "no rank is left")
    assert read_status(path) == file.current


def test_lost_launch_is_recorded_on_a_full_disk_in_the_reserved_space(
    path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    StatusFile(path, 3).change("running")
    reserve, swap = RunDirectory(path.parent).reserve, atomic.swap_text
    reserve.touch()

    def swap_on_full_disk(path: Path, content: str) -> None:
        if reserve.exists():
            raise OSError(errno.ENOSPC, "no space left on device")
        swap(path, content)

    monkeypatch.setattr(atomic, "swap_text", swap_on_full_disk)
    record_lost(path, "", "no rank is left")
    status = read_status(path)
    assert status is not None
    assert status.state == "failed"


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
        ({"host": "node2", "step": 5}, False),
    ],
)
def test_a_failure_that_another_process_of_the_launch_told_is_not_overwritten_by_progress(
    path: Path, told: dict[str, object], is_another: bool
) -> None:
    file = StatusFile(path, 2)
    file.change("failed", reason="the disk is gone", step=6)
    path.write_text(json.dumps(json.loads(path.read_text()) | told))
    assert another_failed(path, since=6) == is_another
    late = StatusFile(path, 2)
    late.progress(step=7)
    status = read_status(path)
    assert status is not None
    assert (status.state == "failed") == is_another


def test_a_field_that_there_is_not_is_refused(path: Path) -> None:
    with pytest.raises(TypeError):
        StatusFile(path, 1).progress(stepp=1)  # type: ignore[call-arg]  # the mistake that is refused


@pytest.mark.parametrize("text", ["", "{", "[]", "3", '{"state": "running"}', "\xff"])
def test_what_is_no_status_reads_as_none(path: Path, text: str) -> None:
    path.write_text(text, encoding="latin-1")
    assert read_status(path) is None


def event(name: str, step: int = 1) -> EventRecord:
    return EventRecord(step, name, 1.0, {})


def test_events_are_counted_over_launches(tmp_path: Path) -> None:
    path = tmp_path / "counts.json"
    for _ in range(3):
        counts = EventCounts(path)
        counts.begin(FACTS)
        counts.record(train(1))
        counts.record(event("resumed"))
        counts.record(event("checkpoint"))
        counts.record(event("checkpoint"))
        counts.end(OUTCOME)
    assert json.loads(path.read_text()) == {"checkpoint": 6, "resumed": 3}
    assert read_counts(path) == {"checkpoint": 6, "resumed": 3}
    assert [entry.name for entry in tmp_path.iterdir()] == ["counts.json"]


def test_no_file_is_no_count(tmp_path: Path) -> None:
    assert read_counts(tmp_path / "counts.json") == {}


@pytest.mark.parametrize("content", ["", "[]", '{"checkpoint": -1}', '{"checkpoint": true}', '{"checkpoint": 1.5}'])
def test_a_broken_file_is_reported_and_begun_anew(
    content: str, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    path = tmp_path / "counts.json"
    path.write_text(content)
    with pytest.raises(ValueError, match="counts of events"):
        read_counts(path)
    counts = EventCounts(path)
    assert [record.levelname for record in caplog.records] == ["WARNING"]
    assert read_counts(path) == {}
    counts.record(event("checkpoint"))
    assert read_counts(path) == {"checkpoint": 1}


def test_a_disk_that_refuses_is_reported_once_and_caught_up_with(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    folder = tmp_path / "run"
    counts = EventCounts(folder / "counts.json")
    with caplog.at_level(logging.WARNING):
        counts.record(event("checkpoint"))
        counts.record(event("checkpoint"))
    assert len(caplog.records) == 1
    folder.mkdir()
    counts.end(OUTCOME)
    assert read_counts(folder / "counts.json") == {"checkpoint": 2}


def test_a_run_whose_directory_was_replaced_leaves_the_files_of_the_new_run_alone(
    tmp_path: Path, clock: list[float], caplog: pytest.LogCaptureFixture
) -> None:
    def begin() -> tuple[RunDirectory, StatusFile, EventCounts, RanksFile]:
        directory = RunDirectory(tmp_path / "run")
        directory.create()
        assert LockRequest(directory).wait(0)
        files = StatusFile(directory.status, 1), EventCounts(directory.event_counts), RanksFile(directory.ranks)
        files[0].change("running")
        files[1].record(event("checkpoint"))
        files[2].measurement(measurement(1, 0.4))
        return directory, *files

    directory, status, counts, ranks = begin()
    directory.root.rename(tmp_path / "moved")
    begin()
    written = {path: path.read_bytes() for path in (directory.status, directory.event_counts, directory.ranks)}
    clock[0] += 2.0
    status.progress(step=9)
    counts.record(event("checkpoint"))
    ranks.measurement(measurement(9, 0.4))
    status.end("finished", ExitCode.FINISHED, "")
    assert {path: path.read_bytes() for path in written} == written
    assert len(caplog.records) == 3


def test_a_run_whose_lock_was_deleted_still_has_a_status(tmp_path: Path) -> None:
    directory = RunDirectory(tmp_path)
    assert LockRequest(directory).wait(0)
    status = StatusFile(directory.status, 1)
    directory.lock.unlink()
    status.change("running")
    assert read_status(directory.status) is not None


END = Outcome("finished", "", 0, 9, 1.0, 1.0, None, None, None, None, None)


def measurement(step: int, *busy: float) -> Measurement:
    ranks = tuple(RankMeasurement(seconds, 0.1, 2e9, math.nan, math.nan, math.nan) for seconds in busy)
    return Measurement(step, 1000.0 + step, 0.5, StepParts(0.1, 0.2, 0.0, 0.1, 0.0, 0.0), 3.0, 1.0, ranks)


@pytest.fixture
def clock(monkeypatch: pytest.MonkeyPatch) -> list[float]:
    now = [100.0]
    monkeypatch.setattr("dist_train.rundir.status.time.monotonic", lambda: now[0])
    return now


def steps_written(path: Path, file: RanksFile, clock: list[float], seconds: float, steps: range) -> list[int]:
    written = []
    for step in steps:
        file.measurement(measurement(step, 0.4))
        clock[0] += seconds
        reading = read_ranks(path)
        assert reading is not None
        written.append(reading.step)
    return written


def test_what_was_measured_is_read_back_and_nan_is_null_in_between(tmp_path: Path) -> None:
    path = tmp_path / "ranks.json"
    RanksFile(path).measurement(measurement(7, 0.25, 0.5))
    assert json.loads(path.read_text())["ranks"][0]["device_bytes"] is None
    reading = read_ranks(path)
    assert reading is not None
    assert (reading.step, reading.time) == (7, 1007.0)
    assert [rank.busy_seconds for rank in reading.ranks] == [0.25, 0.5]
    assert math.isnan(reading.ranks[1].device_utilization)


def test_it_is_written_at_most_once_a_second_and_at_the_end(tmp_path: Path, clock: list[float]) -> None:
    path = tmp_path / "ranks.json"
    file = RanksFile(path)
    assert steps_written(path, file, clock, 0.4, range(1, 8)) == [1, 1, 1, 4, 4, 4, 7]
    file.measurement(measurement(8, 0.4))
    file.end(END)
    assert read_ranks(path) == RanksReading(8, 1008.0, read_ranks(path).ranks)  # type: ignore[union-attr]
    assert [left.name for left in tmp_path.iterdir()] == ["ranks.json"]


def test_a_disk_that_refuses_costs_one_warning_until_it_takes_again(
    tmp_path: Path, clock: list[float], caplog: pytest.LogCaptureFixture
) -> None:
    folder = tmp_path / "run"
    file = RanksFile(folder / "ranks.json")
    with caplog.at_level(logging.WARNING):
        for step in range(1, 5):
            file.measurement(measurement(step, 0.4))
            clock[0] += 2.0
        assert len(caplog.records) == 1
        folder.mkdir()
        file.measurement(measurement(5, 0.4))
    assert len(caplog.records) == 1
    reading = read_ranks(folder / "ranks.json")
    assert reading is not None
    assert reading.step == 5


@pytest.mark.parametrize("content", ["", "{", "[]", '{"step": 1, "time": 1.0, "ranks": [{}]}', '{"step": null}'])
def test_a_file_that_holds_something_else_is_none(tmp_path: Path, content: str) -> None:
    path = tmp_path / "ranks.json"
    path.write_text(content)
    assert read_ranks(path) is None
    assert read_ranks(tmp_path / "nowhere") is None
