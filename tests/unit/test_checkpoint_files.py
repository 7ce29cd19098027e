"""Promise 6: a checkpoint is whole or absent."""

from __future__ import annotations

import errno
import hashlib
import json
import os
import signal
import subprocess
import sys
import textwrap
import threading
from pathlib import Path
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from dist_train.checkpoint import files
from dist_train.checkpoint.files import (
    Contents,
    DamagedCheckpointError,
    NoCompleteCheckpointError,
    find_checkpoint,
    has_checkpoints,
    has_published,
    list_checkpoints,
    newest_whole,
    prune,
    read_checkpoint,
    read_same,
    read_stored,
    remove_checkpoint,
    set_aside,
    write_checkpoint,
)
from dist_train.cluster.communicator import SingleProcess
from dist_train.outcome import PeerFailedError, UsageError
from dist_train.rundir import atomic
from dist_train.rundir.metrics_file import JsonLines, rewind
from dist_train.rundir.paths import RunDirectory
from dist_train.rundir.records import EventRecord
from tests.raising import raises
from tests.unit.checkpoint_files import contents, write
from tests.unit.simulated_ranks import SimulatedRanks, on_ranks, results


def names(folder: Path) -> list[str]:
    return sorted(path.name for path in folder.iterdir())


def newest(folder: Path) -> tuple[Contents | None, dict[str, str]]:
    damage: dict[str, str] = {}
    found = newest_whole(folder, damage)
    return found, damage


def test_what_is_written_is_read_again(tmp_path: Path) -> None:
    file = write(tmp_path, 40)
    assert names(tmp_path) == ["step-00000040.json", "step-00000040.pt"]
    read = read_checkpoint(file.path)
    assert (read.step, read.epoch, read.config, read.metrics) == (
        40,
        10.0,
        {"run": {"seed": 0}},
        {"best_accuracy": 0.5, "best_step": 1},
    )
    assert torch.equal(read.model["weight"], torch.full((3,), 40.0))
    assert torch.equal(read.optimizer["state"][0]["momentum_buffer"], torch.full((3,), 40.0))


def test_a_checkpoint_is_a_plain_dict_with_a_record_beside_it(tmp_path: Path) -> None:
    file = write(tmp_path, 40)
    fields = torch.load(file.path, weights_only=True)
    assert list(fields)[:7] == ["format", "step", "epoch", "model", "optimizer", "config", "metrics"]
    assert list(fields)[7:] == ["plugins", "data", "normalization", "class_names", "average", "noise", "grid_exponents"]
    record = json.loads(file.path.with_suffix(".json").read_text())
    content = file.path.read_bytes()
    assert record == {
        "sha256": hashlib.sha256(content).hexdigest(),
        "bytes": len(content),
        "step": 40,
        "epoch": 10.0,
        "metrics": {"best_accuracy": 0.5, "best_step": 1},
    }


def test_a_record_stands_for_its_checkpoint(tmp_path: Path) -> None:
    """It is not told to be damaged where tab completion gave its name."""
    file = write(tmp_path, 40)
    stored = read_stored(file.path.with_suffix(".json"))
    assert (stored.path, stored.contents.step) == (file.path, 40)


def test_a_file_that_is_no_record_is_named_itself(tmp_path: Path) -> None:
    (tmp_path / "status.json").write_text("{}")
    with pytest.raises(UsageError, match=r"status\.json"):
        read_stored(tmp_path / "status.json")


@pytest.fixture(scope="module")
def pristine(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, bytes]:
    folder = tmp_path_factory.mktemp("damage")
    small = {"model": {"w": torch.ones(2)}, "optimizer": {}, "config": {}, "metrics": {}}
    file = write(folder, 1, **small)
    return file.path, file.path.read_bytes()


@settings(deadline=None, max_examples=80)
@given(st.floats(0, 1, exclude_max=True), st.integers(1, 255))
def test_promise_6_a_change_of_any_byte_is_found(pristine: tuple[Path, bytes], place: float, change: int) -> None:
    path, content = pristine
    damaged = bytearray(content)
    damaged[int(place * len(content))] ^= change
    path.write_bytes(damaged)
    with raises(DamagedCheckpointError, "checkpoint-digest"):
        read_checkpoint(path)
    path.write_bytes(content)
    read_checkpoint(path)


@settings(deadline=None, max_examples=25)
@given(st.floats(0, 1, exclude_max=True))
def test_promise_6_one_of_another_size_is_found(pristine: tuple[Path, bytes], part: float) -> None:
    path, content = pristine
    for other in (content[: int(part * len(content))], content + b"x"):
        path.write_bytes(other)
        with raises(DamagedCheckpointError, "checkpoint-size"):
            read_checkpoint(path)
    path.write_bytes(content)


@pytest.mark.parametrize(
    "record",
    [None, "", "{", "[]", "{}", '{"sha256": "x", "bytes": "many"}', "\0", '{"step": 1e999}', "[" * 100_000],
)
def test_promise_6_a_record_that_cannot_be_read_is_damage(tmp_path: Path, record: str | None) -> None:
    file = write(tmp_path, 1)
    path = file.path.with_suffix(".json")
    if record is None:
        path.unlink()
    else:
        path.write_text(record)
    with raises(DamagedCheckpointError, "checkpoint-record") as refused:
        read_checkpoint(file.path)
    missing = f"there is no {path.name} beside it"
    assert (missing in str(refused.value)) is (record is None)
    assert list_checkpoints(tmp_path) == []


def test_what_is_no_checkpoint_is_told_so(tmp_path: Path) -> None:
    with raises(UsageError, "checkpoint-missing"):
        read_checkpoint(tmp_path / "step-00000001.pt")
    file = write(tmp_path, 1)
    torch.save({"format": 99}, file.path)
    record = json.loads(file.path.with_suffix(".json").read_text())
    content = file.path.read_bytes()
    record.update(bytes=len(content), sha256=hashlib.sha256(content).hexdigest())
    file.path.with_suffix(".json").write_text(json.dumps(record))
    with raises(UsageError, "checkpoint-format"):
        read_checkpoint(file.path)


class TestNewestWhole:
    def test_there_is_none_at_the_beginning(self, tmp_path: Path) -> None:
        assert newest(tmp_path) == (None, {})
        assert newest(tmp_path / "nowhere") == (None, {})

    def test_it_is_the_one_of_the_last_step(self, tmp_path: Path) -> None:
        for step in (7, 40, 12):
            write(tmp_path, step)
        found, damage = newest(tmp_path)
        assert found is not None
        assert (found.step, damage) == (40, {})

    def test_promise_6_a_damaged_one_is_reported_and_set_aside_and_the_one_before_used(self, tmp_path: Path) -> None:
        for step in (1, 2, 3):
            write(tmp_path, step)
        for step in (2, 3):
            path = tmp_path / f"step-{step:08d}.pt"
            path.write_bytes(path.read_bytes()[:-1] + b"?")
        before = names(tmp_path)
        for _ in range(2):  # a launch that is refused leaves them to the next
            found, damage = newest(tmp_path)
            assert found is not None
            assert found.step == 1
            assert list(damage) == ["step-00000003.pt", "step-00000002.pt"]
        assert names(tmp_path) == before
        set_aside(tmp_path, damage)
        assert names(tmp_path) == [
            "step-00000001.json",
            "step-00000001.pt",
            "step-00000002.json.damaged",
            "step-00000002.pt.damaged",
            "step-00000003.json.damaged",
            "step-00000003.pt.damaged",
        ]
        again, damage = newest(tmp_path)
        assert again is not None
        assert (again.step, damage) == (1, {})

    def test_a_launch_killed_while_it_sets_one_aside_leaves_no_record_of_it(
        self, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        directory = RunDirectory(tmp_path)
        directory.create()
        for step in (1, 2):
            write(directory.checkpoints, step)
        directory.checkpoint(2).write_bytes(b"")
        rename = os.rename

        def rename_and_end(*paths: Path) -> None:
            rename(*paths)
            raise KeyboardInterrupt

        _, damage = newest(directory.checkpoints)
        monkeypatch.setattr(os, "rename", rename_and_end)
        with pytest.raises(KeyboardInterrupt):
            set_aside(directory.checkpoints, damage)
        assert directory.checkpoint_steps() == (1,)
        found, damage = newest(directory.checkpoints)
        assert found is not None
        assert (found.step, damage) == (1, {})

    def test_promise_6_one_without_a_record_was_never_published(self, tmp_path: Path) -> None:
        write(tmp_path, 1)
        write(tmp_path, 2).path.with_suffix(".json").unlink()
        found, damage = newest(tmp_path)
        assert found is not None
        assert (found.step, damage) == (1, {})
        prune(tmp_path, keep=1, best_step=None)
        assert "step-00000002.pt" in names(tmp_path), "its record may be on its way"
        write(tmp_path, 3)
        prune(tmp_path, keep=1, best_step=None)
        assert names(tmp_path) == ["step-00000003.json", "step-00000003.pt"]

    def test_promise_6_several_without_records_are_not_passed_over(self, tmp_path: Path) -> None:
        for step in (1, 2):
            write(tmp_path, step).path.with_suffix(".json").unlink()
        before = names(tmp_path)
        with raises(NoCompleteCheckpointError, "no-whole-checkpoint"):
            newest(tmp_path)
        assert names(tmp_path) == before
        (tmp_path / "step-00000002.pt").unlink()
        assert newest(tmp_path) == (None, {}), "the run was killed while it published its first"

    def test_promise_6_one_without_its_record_is_not_passed_over_if_the_run_has_written_one(
        self, tmp_path: Path
    ) -> None:
        directory = RunDirectory(tmp_path)
        directory.create()
        write(directory.checkpoints, 2).path.with_suffix(".json").unlink()
        for event in ("signal", "checkpoint"):
            assert newest(directory.checkpoints) == (None, {})
            lines = JsonLines(directory.metrics)
            lines.record(EventRecord(2, event, 5.0, {}))
            lines.flush()
        with raises(NoCompleteCheckpointError, "no-whole-checkpoint"):
            newest(directory.checkpoints)

    def test_promise_6_one_of_which_only_the_record_is_there_is_not_passed_over(self, tmp_path: Path) -> None:
        """A copy was interrupted, in which names that end in .json come first; or the large files were deleted."""
        for step in (1, 2):
            write(tmp_path, step)
        (tmp_path / "step-00000002.pt").unlink()
        assert [file.step for file in list_checkpoints(tmp_path)] == [1]
        found, damage = newest(tmp_path)
        assert found is not None
        assert (found.step, list(damage)) == (1, ["step-00000002.pt"])
        (tmp_path / "step-00000001.pt").unlink()
        with raises(NoCompleteCheckpointError, "no-whole-checkpoint"):
            newest(tmp_path)
        assert has_checkpoints(tmp_path)
        set_aside(tmp_path, damage)
        assert names(tmp_path) == ["step-00000001.json", "step-00000002.json.damaged"]
        (tmp_path / "step-00000001.json").unlink()
        with raises(NoCompleteCheckpointError, "no-whole-checkpoint"):
            newest(tmp_path)

    def test_promise_6_one_that_cannot_be_read_at_the_moment_is_not_damaged(
        self, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        for step in (1, 2):
            write(tmp_path, step)

        def fail(path: Path) -> bytes:
            raise OSError(errno.ESTALE, os.strerror(errno.ESTALE), str(path))

        before = names(tmp_path)
        with monkeypatch.context() as patched:
            patched.setattr(atomic, "read_regular", fail)
            with pytest.raises(OSError, match=r"step-00000002\.json"):
                newest(tmp_path)
        assert names(tmp_path) == before
        found, damage = newest(tmp_path)
        assert found is not None
        assert (found.step, damage) == (2, {})

    def test_promise_6_one_that_torch_cannot_load_here_is_not_damaged(
        self, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        for step in (1, 2):
            write(tmp_path, step)

        def fail(*_: object, **__: object) -> None:
            raise RuntimeError("DefaultCPUAllocator: can't allocate memory")

        before = names(tmp_path)
        with monkeypatch.context() as patched:
            patched.setattr(torch, "load", fail)
            with raises(UsageError, "checkpoint-unreadable"):
                newest(tmp_path)
        assert names(tmp_path) == before
        assert newest(tmp_path)[1] == {}

    def test_when_every_one_is_damaged_the_run_does_not_silently_start_anew(self, tmp_path: Path) -> None:
        damage: dict[str, str] = {}
        for step in (1, 2):
            write(tmp_path, step).path.write_bytes(b"")
        for _ in range(2):  # nor when it is started once more
            with raises(NoCompleteCheckpointError, "no-whole-checkpoint"):
                newest_whole(tmp_path, damage)
        set_aside(tmp_path, damage)
        assert names(tmp_path) == [f"step-0000000{step}.{kind}.damaged" for step in (1, 2) for kind in ("json", "pt")]
        with raises(NoCompleteCheckpointError, "no-whole-checkpoint"):
            newest(tmp_path)

    def test_other_files_are_not_taken_for_checkpoints(self, tmp_path: Path) -> None:
        write(tmp_path, 1)
        for name in ("step-x.pt", "step-00000009.pt.damaged", ".step-00000009.pt.abc.part", "best.pt"):
            (tmp_path / name).write_bytes(b"?")
        found, damage = newest(tmp_path)
        assert found is not None
        assert (found.step, damage) == (1, {})


class TestPrune:
    @pytest.mark.parametrize(
        ("keep", "best", "left"),
        [
            (1, None, [9]),
            (3, None, [7, 8, 9]),
            (99, None, [5, 6, 7, 8, 9]),
            (2, 5, [5, 8, 9]),
            (2, 9, [8, 9]),
            (2, 1, [8, 9]),
        ],
    )
    def test_the_last_ones_and_the_best_are_kept(
        self, tmp_path: Path, keep: int, best: int | None, left: list[int]
    ) -> None:
        for step in range(5, 10):
            write(tmp_path, step)
        prune(tmp_path, keep=keep, best_step=best)
        assert [file.step for file in list_checkpoints(tmp_path)] == left
        assert len(names(tmp_path)) == 2 * len(left)

    def test_one_that_cannot_be_deleted_does_not_keep_the_others(self, tmp_path: Path) -> None:
        for step in range(1, 7):
            write(tmp_path, step)
        write(tmp_path, 4).path.with_suffix(".json").unlink()  # never published
        for step in (2, 3):  # no more to be deleted than an immutable file
            path = tmp_path / f"step-{step:08d}.pt"
            path.unlink()
            path.mkdir()
        for _ in range(2):  # also with the next checkpoint, when these have no records any more
            with pytest.raises(OSError, match="step-00000002"):
                prune(tmp_path, keep=1, best_step=None)
            left = ["step-00000002.pt", "step-00000003.pt", "step-00000006.json", "step-00000006.pt"]
            assert names(tmp_path) == left

    def test_a_best_that_could_not_be_written_leaves_the_best_before_it(self, tmp_path: Path) -> None:
        directory = RunDirectory(tmp_path)
        directory.create()
        for step, best in ((2, 2), (4, 4), (12, 8)):
            write(directory.checkpoints, step, metrics={"best_saved_step": best})
        prune(directory.checkpoints, keep=1, best_step=8)
        assert [file.step for file in list_checkpoints(directory.checkpoints)] == [4, 12]
        assert find_checkpoint(Path(f"{tmp_path}@best")) == directory.checkpoint(4)

    def test_steps_are_counted_as_numbers(self, tmp_path: Path) -> None:
        for step in (99_999_999, 100_000_000):
            write(tmp_path, step)
        prune(tmp_path, keep=1, best_step=None)
        assert [file.step for file in list_checkpoints(tmp_path)] == [100_000_000]


class TestReadingWhileTheRunTrains:
    @pytest.fixture
    def directory(self, tmp_path: Path) -> RunDirectory:
        directory = RunDirectory(tmp_path)
        directory.create()
        write(directory.checkpoints, 4)
        return directory

    def test_what_was_read_is_known_although_it_is_gone(
        self, directory: RunDirectory, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        (file,), load = list_checkpoints(directory.checkpoints), torch.load

        def load_and_delete(*values: Any, **options: Any) -> Any:
            remove_checkpoint(file.path)
            return load(*values, **options)

        monkeypatch.setattr(torch, "load", load_and_delete)
        stored = read_stored(directory.root)
        assert (stored.path, stored.sha256, stored.contents.step) == (file.path, file.sha256, 4)

    @pytest.mark.parametrize("suffixes", [(".json",), (".json", ".pt")])
    def test_the_newer_one_is_read_where_the_last_was_deleted(
        self, directory: RunDirectory, monkeypatch: pytest.MonkeyPatch, suffixes: tuple[str, ...]
    ) -> None:
        def find(target: Path) -> Path:
            found = find_checkpoint(target)
            if found.name == "step-00000004.pt":
                write(directory.checkpoints, 8)
                for suffix in suffixes:
                    found.with_suffix(suffix).unlink()
            return found

        monkeypatch.setattr(files, "find_checkpoint", find)
        assert read_stored(directory.root).contents.step == 8

    def test_the_newer_one_is_read_where_a_file_server_deletes_the_open_one(
        self, directory: RunDirectory, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        read = atomic.read_regular

        def lose(path: Path) -> bytes:
            if path == directory.checkpoint(4):
                write(directory.checkpoints, 8)
                remove_checkpoint(path)
                raise OSError(errno.ESTALE, os.strerror(errno.ESTALE), str(path))
            return read(path)

        monkeypatch.setattr(atomic, "read_regular", lose)
        assert read_stored(directory.root).contents.step == 8

    def test_it_is_read_although_all_that_were_being_listed_are_deleted(
        self, directory: RunDirectory, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        listed = files._step_files

        def list_late(folder: Path) -> list[Path]:
            found = listed(folder)
            if found == [directory.checkpoint(4)]:
                write(directory.checkpoints, 8)
                remove_checkpoint(directory.checkpoint(4))
            return found

        monkeypatch.setattr(files, "_step_files", list_late)
        assert read_stored(directory.root).contents.step == 8

    def test_all_ranks_read_the_one_that_rank_0_finds_and_look_again_if_it_is_deleted(
        self, directory: RunDirectory
    ) -> None:
        looks: dict[int, int] = {}

        def work(comm: SimulatedRanks) -> list[int]:
            def choose() -> list[Path]:
                looks[comm.rank] = looks.get(comm.rank, 0) + 1
                found = find_checkpoint(directory.root)
                write(directory.checkpoints, 4 + 4 * looks[comm.rank])  # the run trains on before it is read
                if looks[comm.rank] == 1:
                    remove_checkpoint(found)
                return [found]

            return [each.contents.step for each in read_same(comm, choose)]

        assert (results(3, work), looks) == ([[8]] * 3, {0: 2})
        assert find_checkpoint(directory.root) == directory.checkpoint(12)

    def test_a_rank_with_another_file_of_that_name_is_refused(
        self, directory: RunDirectory, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        here, read, other = threading.local(), files._read_verified, write(directory.root, 4, epoch=9.0)
        monkeypatch.setattr(files, "_read_verified", lambda path: read(other.path if here.rank else path))

        def work(comm: SimulatedRanks) -> None:
            here.rank = comm.rank
            read_same(comm, lambda: [directory.checkpoint(4)])

        first, second = on_ranks(2, work)
        assert isinstance(first, PeerFailedError)
        assert isinstance(second, UsageError)
        assert second.code == "ranks-differ-in-checkpoint"

    def test_a_damaged_one_is_refused_at_once(self, directory: RunDirectory) -> None:
        directory.checkpoint(4).write_bytes(b"?")
        choices = iter([[directory.checkpoint(4)]])
        with raises(DamagedCheckpointError, "checkpoint-size"):
            read_same(SingleProcess(), lambda: next(choices))


def test_promise_6_a_full_disk_is_an_error_and_costs_nothing(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    write(tmp_path, 1)
    monkeypatch.setattr(os, "fsync", lambda descriptor: (_ for _ in ()).throw(OSError(errno.ENOSPC, "full")))
    with pytest.raises(OSError, match="full"):
        write(tmp_path, 2)
    monkeypatch.undo()
    for step in (1, 2):
        with pytest.raises(OSError, match="records"):
            write_checkpoint(
                tmp_path, contents(step), lambda: (_ for _ in ()).throw(OSError(errno.ENOSPC, "no records"))
            )
    found, damage = newest(tmp_path)
    assert found is not None
    assert (found.step, found.epoch, damage) == (1, 0.25, {})
    assert names(tmp_path) == ["step-00000001.json", "step-00000001.pt"]


def test_promise_6_a_folder_that_cannot_be_flushed_keeps_no_record_without_its_checkpoint(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    faults = iter([None, OSError(errno.EIO, "Input/output error")])

    def flush(folder: Path) -> None:
        if fault := next(faults):
            raise fault

    monkeypatch.setattr(atomic, "flush_directory", flush)
    with pytest.raises(OSError, match="Input/output"):
        write(tmp_path, 1)
    assert names(tmp_path) == []


def test_promise_6_its_bytes_and_the_records_are_on_disk_before_the_checkpoint_has_its_name(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    flushed: list[int] = []
    seen: list[tuple[int, list[str]]] = []
    monkeypatch.setattr(os, "fsync", flushed.append)
    write_checkpoint(tmp_path, contents(3), lambda: seen.append((len(flushed), names(tmp_path))))
    [(flushes, there)] = seen
    assert flushes == 1
    assert [name for name in there if name.startswith("step")] == []


def test_promise_6_a_writer_that_is_interrupted_leaves_no_record_of_what_it_replaced(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def interrupt(*_: object) -> None:
        raise KeyboardInterrupt

    write(tmp_path, 1).path.write_bytes(b"damaged since")
    monkeypatch.setattr(atomic, "write_text", interrupt)
    with pytest.raises(KeyboardInterrupt):
        write(tmp_path, 1)
    assert list_checkpoints(tmp_path) == []


def test_promise_6_a_writer_that_is_killed_leaves_the_one_before(tmp_path: Path) -> None:
    points = ("before", "between")
    script = """
        import os, signal, sys
        from pathlib import Path
        from dist_train.rundir import atomic
        from tests.unit.checkpoint_files import contents, write
        from dist_train.checkpoint.files import write_checkpoint
        die = lambda *_: os.kill(os.getpid(), signal.SIGKILL)
        for point in sys.argv[2:]:
            folder = Path(sys.argv[1], point)
            folder.mkdir()
            write(folder, 1)
            if os.fork() == 0:
                if point == "between":
                    atomic.write_text = die
                write_checkpoint(folder, contents(2), die if point == "before" else lambda: None)
                os._exit(0)
            print(os.waitstatus_to_exitcode(os.wait()[1]))
    """
    ended = subprocess.run(
        [sys.executable, "-c", textwrap.dedent(script), str(tmp_path), *points],
        cwd=Path(__file__).parents[2],
        check=True,
        capture_output=True,
        text=True,
    )
    assert [int(code) for code in ended.stdout.split()] == [-signal.SIGKILL] * 2
    for point in points:
        found, damage = newest(tmp_path / point)
        assert found is not None
        assert (found.step, damage) == (1, {})


@pytest.mark.parametrize("error", [KeyboardInterrupt, OSError])
def test_promise_6_a_whole_one_is_never_written_again(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, error: type[BaseException]
) -> None:
    known = write(tmp_path, 2)
    before = {path.name: path.read_bytes() for path in tmp_path.iterdir()}
    published: list[bool] = []
    flushed: list[Path] = []
    monkeypatch.setattr(atomic, "flush_directory", flushed.append)
    # As if a power failure, or a full disk, came between the two files.
    monkeypatch.setattr(atomic, "write_text", lambda *_: (_ for _ in ()).throw(error))
    assert write_checkpoint(tmp_path, contents(2), lambda: published.append(True)) == known
    assert published == [True]
    assert flushed == [tmp_path], "its writer may have ended before it did this"
    assert {path.name: path.read_bytes() for path in tmp_path.iterdir()} == before


@pytest.mark.parametrize("damaged", ["step-00000002.pt", "step-00000002.json"])
def test_promise_6_a_damaged_one_is_written_again(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, damaged: str
) -> None:
    write(tmp_path, 1)
    write(tmp_path, 2)
    (tmp_path / damaged).write_bytes(b"?")
    with monkeypatch.context() as patch:
        patch.setattr(atomic, "write_text", lambda *_: (_ for _ in ()).throw(KeyboardInterrupt))
        with pytest.raises(KeyboardInterrupt):
            write(tmp_path, 2)
    found, damage = newest(tmp_path)
    assert found is not None
    assert (found.step, damage) == (1, {}), "one that was not published is not taken for damage"
    write(tmp_path, 2)
    found, damage = newest(tmp_path)
    assert found is not None
    assert (found.step, damage) == (2, {})


def test_atomic_is_what_writes(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    written: list[Path] = []
    monkeypatch.setattr(atomic, "flush_directory", lambda folder: written.append(folder))
    write(tmp_path, 1)
    assert written == [tmp_path, tmp_path]


@pytest.mark.parametrize("code", [errno.ESTALE, errno.EIO, errno.EACCES])
def test_a_folder_that_cannot_be_listed_is_not_an_empty_one(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, code: int
) -> None:
    def fail(*_: object) -> None:
        raise OSError(code, os.strerror(code))

    write(tmp_path, 1)
    for name in ("listdir", "scandir"):
        monkeypatch.setattr(os, name, fail)
    for read in (lambda: newest_whole(tmp_path, {}), lambda: list_checkpoints(tmp_path)):
        with pytest.raises(OSError, match=os.strerror(code)):
            read()


def test_a_file_of_which_nobody_can_tell_whether_it_exists_is_not_taken_for_missing(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(Path, "exists", os.path.exists)  # as in Python 3.14
    run = RunDirectory(tmp_path / ("x" * 300))
    for look in (
        lambda: run.has_begun,
        lambda: has_published(run.checkpoints),
        lambda: rewind(run.metrics, 1),
        lambda: read_checkpoint(run.checkpoint(1)),
    ):
        with pytest.raises(OSError, match=os.strerror(errno.ENAMETOOLONG)):
            look()


def test_a_folder_that_does_not_exist_holds_no_checkpoint(tmp_path: Path) -> None:
    assert newest_whole(tmp_path / "absent", {}) is None
    assert list_checkpoints(tmp_path / "absent") == []
