from __future__ import annotations

import errno
import json
import logging
import os
import resource
import signal
import subprocess
import sys
import tracemalloc
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from tempfile import TemporaryDirectory
from unittest.mock import Mock

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from dist_train.rundir import metrics_file
from dist_train.rundir.metrics_file import JsonLines, from_json, read_last_records, read_records, rewind, to_json
from dist_train.rundir.records import EvaluationRecord, EventRecord, Outcome, Record, TrainRecord
from tests.unit.records import evaluation, train
from tests.waiting import wait_for

OUTCOME = Outcome("finished", "", 0, 1, 1.0, 1.0, None, None, None, None, None)


def event(step: int, name: str) -> EventRecord:
    return EventRecord(step, name, 5.0, {"ranks": 2})


small_steps = st.integers(0, 6)
any_record: st.SearchStrategy[Record] = st.one_of(
    st.builds(train, small_steps, loss=st.sampled_from([0.5, 1.0])),
    st.builds(evaluation, small_steps, st.sampled_from(["train", "test"])),
    st.builds(event, small_steps, st.sampled_from(["resumed", "checkpoint", "signal"])),
)


def identity(record: Record) -> tuple[str, int, str]:
    match record:
        case TrainRecord():
            return ("train", record.step, "")
        case EvaluationRecord():
            return ("eval", record.step, record.split)
        case EventRecord():
            return ("event", record.step, record.event)


def write(path: Path, *records: Record) -> None:
    lines = JsonLines(path)
    for record in records:
        lines.record(record)
    lines.end(OUTCOME)


@contextmanager
def files_limited_to(size: int) -> Iterator[None]:
    """No file may grow beyond `size` bytes: what a full disk does to a write, the torn line included."""
    soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
    handler = signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
    resource.setrlimit(resource.RLIMIT_FSIZE, (size, hard))
    try:
        yield
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))
        signal.signal(signal.SIGXFSZ, handler)


def test_a_record_is_in_the_file_as_soon_as_it_is_recorded(tmp_path: Path) -> None:
    path = tmp_path / "metrics.jsonl"
    lines = JsonLines(path)
    for step in (1, 2):
        lines.record(train(step))
        assert path.read_text().count("\n") == step
    lines.flush()
    lines.end(OUTCOME)
    assert path.read_text() == f"{to_json(train(1))}\n{to_json(train(2))}\n"


def test_a_record_that_is_there_is_not_written_again(tmp_path: Path) -> None:
    path = tmp_path / "metrics.jsonl"
    write(path, train(1), evaluation(1), event(1, "checkpoint"), train(1, loss=9.0))
    write(path, evaluation(1), evaluation(1, "train"), event(1, "checkpoint"), event(1, "signal"), train(2))
    assert [identity(record) for record in read_records(path)] == [
        ("train", 1, ""),
        ("eval", 1, "test"),
        ("event", 1, "checkpoint"),
        ("eval", 1, "train"),
        ("event", 1, "signal"),
        ("train", 2, ""),
    ]


def test_of_a_long_file_the_latest_records_alone_are_remembered(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    path = tmp_path / "metrics.jsonl"
    monkeypatch.setattr(metrics_file, "_BACKLOG_LIMIT", 3)
    write(path, *map(train, (1, 2, 3, 4, 3, 1)))
    assert [record.step for record in read_records(path)] == [1, 2, 3, 4, 1]
    monkeypatch.setattr(metrics_file, "RECENT_BYTES", 2 * len(to_json(train(1))))
    write(path, *map(train, (1, 2)))
    assert [record.step for record in read_records(path)] == [1, 2, 3, 4, 1, 2]


@pytest.mark.parametrize(
    ("name", "detail", "values"),
    [
        ("rank_lost", "generation", (2, 3)),
        ("corrupt_checkpoint", "path", ("step-00000004.pt", "step-00000005.pt")),
        ("micro_size", "now", (32, 16)),
        ("requeued", "restart", (1, 2)),
    ],
)
def test_events_of_one_step_that_differ_are_two_and_known_again_by_their_lines(
    tmp_path: Path, name: str, detail: str, values: tuple[str | int, ...]
) -> None:
    path = tmp_path / "metrics.jsonl"
    both = [EventRecord(3, name, 5.0, {detail: value}) for value in values]
    write(path, *both, both[0])
    write(path, *both)
    assert read_records(path) == tuple(both)
    rewind(path, 3)
    assert read_records(path) == tuple(both)


def test_a_record_that_json_cannot_hold_is_warned_of_and_the_others_are_kept(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    path = tmp_path / "metrics.jsonl"
    write(path, train(1), EventRecord(2, "signal", 2.0, {"value": Path()}), train(3))  # type: ignore[dict-item]
    assert [record.step for record in read_records(path)] == [1, 3]
    assert "step 2" in caplog.text


@pytest.mark.parametrize("torn", [to_json(train(2))[:40], "[" * 100_000])
def test_a_record_after_a_torn_line_is_whole(torn: str, tmp_path: Path) -> None:
    path = tmp_path / "metrics.jsonl"
    path.write_text(f"{to_json(train(1))}\n{torn}")
    write(path, train(2))
    assert [record.step for record in read_records(path)] == [1, 2]


def test_a_full_disk_tears_no_line_and_loses_no_record_when_there_is_room_again(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    path = tmp_path / "metrics.jsonl"
    lines = JsonLines(path)
    lines.record(train(1))
    with caplog.at_level(logging.WARNING):
        with files_limited_to(path.stat().st_size + 50):
            lines.record(train(2))
            lines.record(train(3))
            with pytest.raises(OSError, match=r"metrics\.jsonl") as refused:
                lines.flush()  # a checkpoint must not count on these records
            assert refused.value.errno == errno.EFBIG, "what is wrong, though the disk took a part of a line"
            assert path.read_text() == to_json(train(1)) + "\n"
        lines.record(train(4))
    lines.end(OUTCOME)
    assert [record.step for record in read_records(path)] == [1, 2, 3, 4]
    (warning,) = caplog.records
    assert "records wait in memory" in warning.getMessage()


def test_the_first_flush_also_keeps_the_name_of_the_file(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    path, flushed, fsync = tmp_path / "metrics.jsonl", [], os.fsync

    def note(descriptor: int) -> None:
        flushed.append(os.fstat(descriptor).st_ino)
        fsync(descriptor)

    monkeypatch.setattr(os, "fsync", note)
    lines = JsonLines(path)
    for step in (1, 2):
        lines.record(train(step))
        lines.flush()
    file, folder = path.stat().st_ino, tmp_path.stat().st_ino
    assert flushed == [file, folder, file]


def test_lines_that_a_file_server_drops_at_a_flush_are_written_again(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    path = tmp_path / "metrics.jsonl"
    lines = JsonLines(path)
    lines.record(train(1))
    lines.flush()
    durable = path.stat().st_size
    lines.record(train(2))
    lines.record(train(3))

    def drop(descriptor: int) -> None:
        os.truncate(path, durable)
        raise OSError(errno.EDQUOT, "Disk quota exceeded")

    with monkeypatch.context() as patch:
        patch.setattr(os, "fsync", drop)
        with pytest.raises(OSError, match="quota"):
            lines.flush()
    lines.record(train(4))
    lines.flush()
    assert [record.step for record in read_records(path)] == [1, 2, 3, 4]
    lines.end(OUTCOME)


def test_a_record_after_a_failed_flush_of_many_is_kept(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(metrics_file, "_BACKLOG_LIMIT", 3)
    path = tmp_path / "metrics.jsonl"
    lines = JsonLines(path)
    for step in range(1, 6):
        lines.record(train(step))
    with monkeypatch.context() as patch:
        patch.setattr(os, "fsync", Mock(side_effect=OSError(errno.EIO, "Input/output error")))
        for _ in range(2):
            with pytest.raises(OSError, match="Input"):
                lines.flush()
    lines.record(train(6))
    lines.end(OUTCOME)
    assert lines.waiting == b""
    assert [record.step for record in read_records(path)] == [1, 2, 3, 4, 5, 6]


def test_a_torn_line_that_cannot_be_removed_at_once_is_removed_before_the_next(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    path = tmp_path / "metrics.jsonl"
    lines = JsonLines(path)
    lines.record(train(1))
    with monkeypatch.context() as patch, files_limited_to(path.stat().st_size + 50):
        for name in ("ftruncate", "fstat"):
            patch.setattr(os, name, Mock(side_effect=OSError(errno.EIO, "Input/output error")))
        lines.record(train(2))
    lines.record(train(3))
    lines.end(OUTCOME)
    assert path.read_text() == "".join(f"{to_json(train(step))}\n" for step in (1, 2, 3))


def test_records_that_never_found_room_are_reported_as_lost(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    lines = JsonLines(tmp_path / "metrics.jsonl")
    with caplog.at_level(logging.WARNING), files_limited_to(0):
        lines.record(train(1))
        lines.end(OUTCOME)
    assert caplog.records[-1].levelname == "WARNING"


def test_sync_after_the_end_does_nothing(tmp_path: Path) -> None:
    lines = JsonLines(tmp_path / "metrics.jsonl")
    lines.end(OUTCOME)
    lines.flush()
    lines.end(OUTCOME)


def test_rewind_drops_what_the_checkpoint_has_not_seen(tmp_path: Path) -> None:
    path = tmp_path / "metrics.jsonl"
    kept: list[Record] = [
        train(1),
        train(2),
        evaluation(2),
        evaluation(2, "train"),
        event(2, "checkpoint"),
        event(1, "resumed"),
        event(2, "versions_changed"),
    ]
    dropped: list[Record] = [
        *(event(2, name) for name in ("resumed", "lengthened", "initialized", "plugins_changed", "data_changed")),
        train(3),
        evaluation(3),
        event(3, "signal"),
        event(9, "resumed"),
    ]
    path.write_text("".join(to_json(record) + "\n" for record in kept + dropped) + '{"kind": "tra')
    rewind(path, 2)
    assert read_records(path) == tuple(kept)
    assert path.read_text() == "".join(to_json(record) + "\n" for record in kept)


@pytest.mark.parametrize("mode", [0o644, 0o660])
def test_rewind_lets_those_read_the_file_who_could(tmp_path: Path, mode: int) -> None:
    path = tmp_path / "metrics.jsonl"
    write(path, train(1), train(2))
    path.chmod(mode)
    rewind(path, 1)
    assert [record.step for record in read_records(path)] == [1]
    assert path.stat().st_mode & 0o777 == mode


def test_rewind_leaves_a_file_that_needs_nothing_untouched(tmp_path: Path) -> None:
    path = tmp_path / "metrics.jsonl"
    write(path, train(1), train(2))
    before = path.stat()
    rewind(path, 2)
    assert (path.stat().st_ino, path.stat().st_mtime_ns) == (before.st_ino, before.st_mtime_ns)


@pytest.mark.parametrize("step", [2000, 1990])
def test_rewind_does_not_take_the_memory_of_a_long_file(tmp_path: Path, step: int) -> None:
    path = tmp_path / "metrics.jsonl"
    lines = [f"{to_json(train(each))}\n" for each in range(1, 2001)]
    path.write_text("".join(lines))
    tracemalloc.start()
    try:
        rewind(path, step)
        _, peak = tracemalloc.get_traced_memory()
    finally:
        tracemalloc.stop()
    assert path.read_text() == "".join(lines[:step])
    assert peak < path.stat().st_size / 5


def test_rewind_drops_a_line_that_is_not_text(tmp_path: Path) -> None:
    path = tmp_path / "metrics.jsonl"
    line = f"{to_json(train(1))}\n".encode()
    path.write_bytes(line.replace(b"accuracy", b"acc\xffracy") + line)
    rewind(path, 1)
    assert path.read_bytes() == line


def test_rewind_of_a_file_that_is_not_there_makes_none(tmp_path: Path) -> None:
    rewind(tmp_path / "metrics.jsonl", 5)
    assert list(tmp_path.iterdir()) == []


def test_rewind_keeps_lines_of_kinds_that_it_does_not_know(tmp_path: Path) -> None:
    path = tmp_path / "metrics.jsonl"
    line = '{"kind": "rank", "step": 1, "rank": 3}\n'
    path.write_text(line + '{"kind": "rank", "step": 4}\n')
    rewind(path, 1)
    assert path.read_text() == line


@settings(deadline=None, max_examples=200)
@given(st.lists(any_record, max_size=25), small_steps, st.data())
def test_rewind_is_right_for_any_records_cut_off_at_any_byte(
    records: list[Record], step: int, data: st.DataObject
) -> None:
    content = "".join(to_json(record) + "\n" for record in records).encode()
    content = content[: data.draw(st.integers(0, len(content)), label="cut")]
    whole = [record for line in content.split(b"\n") if (record := from_json(line))]
    with TemporaryDirectory() as directory:
        path = Path(directory) / "metrics.jsonl"
        path.write_bytes(content)
        rewind(path, step)
        after = path.read_bytes()
        rewind(path, step)
        assert path.read_bytes() == after
        kept = read_records(path)
        assert os.listdir(directory) == ["metrics.jsonl"]
    assert after == b"".join(to_json(record).encode() + b"\n" for record in kept)
    names = [identity(record) for record in kept]
    wanted = {identity(record) for record in whole if record.step <= step} - {("event", step, "resumed")}
    assert len(names) == len(set(names))
    assert set(names) == wanted
    firsts: dict[tuple[str, int, str], Record] = {}
    for record in whole:
        firsts.setdefault(identity(record), record)
    assert all(firsts[identity(record)] == record for record in kept)


@settings(deadline=None, max_examples=60)
@given(st.lists(st.integers(0, 400), min_size=1, max_size=6), st.integers(1, 5))
def test_a_run_killed_at_any_byte_again_and_again_has_no_step_twice_and_none_missing(
    cuts: list[int], every: int
) -> None:
    """Each life resumes from the last checkpoint whose records were synced, and dies at another byte."""
    last = 12
    with TemporaryDirectory() as directory:
        path = Path(directory) / "metrics.jsonl"
        for cut in [*cuts, None]:
            checkpoint = max((record.step for record in _read(path) if isinstance(record, EventRecord)), default=0)
            rewind(path, checkpoint)
            lines = JsonLines(path)
            durable = path.stat().st_size
            for step in range(checkpoint + 1, last + 1):
                lines.record(train(step))
                if step % every == 0:
                    lines.record(evaluation(step))
                    lines.record(event(step, "checkpoint"))
                    durable = path.stat().st_size
                if cut is not None and path.stat().st_size >= durable + cut:
                    os.truncate(path, durable + cut)
                    break
            lines.end(OUTCOME)
        steps = [record.step for record in read_records(path) if isinstance(record, TrainRecord)]
        tested = [record.step for record in read_records(path) if isinstance(record, EvaluationRecord)]
    assert steps == list(range(1, last + 1))
    assert tested == list(range(every, last + 1, every))


def _read(path: Path) -> tuple[Record, ...]:
    return read_records(path) if path.exists() else ()


def test_a_process_killed_while_it_writes_leaves_whole_lines_that_a_resume_goes_on_from(
    tmp_path: Path,
) -> None:
    path = tmp_path / "metrics.jsonl"
    program = (
        "import sys; from pathlib import Path; sys.path.insert(0, sys.argv[2])\n"
        "from tests.unit.test_rundir_metrics_file import JsonLines, train\n"
        "lines = JsonLines(Path(sys.argv[1]))\n"
        "for step in range(1, 10**9): lines.record(train(step))\n"
    )
    writer = subprocess.Popen([sys.executable, "-c", program, str(path), str(Path(__file__).parents[2])])
    try:
        wait_for(lambda: path.exists() and path.stat().st_size > 20_000, "records")
    finally:
        writer.kill()
        writer.wait()
    checkpoint = read_records(path)[-1].step - 7
    rewind(path, checkpoint)
    write(path, *(train(step) for step in range(checkpoint + 1, checkpoint + 20)))
    steps = [json.loads(line)["step"] for line in path.read_text().splitlines()]
    assert steps == list(range(1, checkpoint + 20))


def test_the_last_records_are_read_without_the_rest(tmp_path: Path) -> None:
    path = tmp_path / "metrics.jsonl"
    write(path, *(train(step) for step in range(1, 1000)))
    last = read_last_records(path, size=1000)
    assert [record.step for record in last] == list(range(1000 - len(last), 1000))
    assert 3 <= len(last) <= 6
