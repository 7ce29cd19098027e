"""Files that are whole or absent."""

from __future__ import annotations

import errno
import os
import signal
import subprocess
import sys
import textwrap
from collections.abc import Callable
from contextlib import nullcontext
from pathlib import Path

import pytest

from dist_train.rundir import atomic


def names(folder: Path) -> list[str]:
    return sorted(path.name for path in folder.iterdir())


@pytest.mark.parametrize("write", [atomic.write_text, atomic.swap_text])
def test_the_text_is_there_and_nothing_else(tmp_path: Path, write: Callable[[Path, str], None]) -> None:
    for text in ("first, and longer", "zweite ä"):
        write(tmp_path / "file", text)
        assert (tmp_path / "file").read_text(encoding="utf-8") == text
        assert names(tmp_path) == ["file"]


def test_a_file_is_the_user_s_alone_or_stays_with_those_who_could_read_it(tmp_path: Path) -> None:
    path, before = tmp_path / "file", os.umask(0o022)
    try:
        modes = []
        for is_shared, present in ((False, None), (True, None), (True, 0o640), (False, 0o644)):
            path.unlink(missing_ok=True)
            if present is not None:
                path.touch()
                path.chmod(present)
            atomic.write_bytes(path, b"", is_shared=is_shared)
            modes.append(path.stat().st_mode & 0o777)
    finally:
        os.umask(before)
    assert modes == [0o600, 0o644, 0o640, 0o600]


def test_a_block_that_raises_leaves_the_old_file_and_no_temporary(tmp_path: Path) -> None:
    atomic.write_bytes(tmp_path / "file", b"old")

    def broken_off() -> None:
        with atomic.replacing(tmp_path / "file") as file:
            file.write(b"new")
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        broken_off()
    assert (tmp_path / "file").read_bytes() == b"old"
    assert names(tmp_path) == ["file"]


def test_the_name_appears_only_when_the_block_has_ended(tmp_path: Path) -> None:
    with atomic.replacing(tmp_path / "file") as file:
        file.write(b"new")
        assert "file" not in names(tmp_path)
    assert names(tmp_path) == ["file"]


@pytest.mark.parametrize("failing", ["fsync", "replace"])
def test_a_disk_that_fails_leaves_the_old_file_and_no_temporary(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, failing: str
) -> None:
    atomic.write_bytes(tmp_path / "file", b"old")

    def fail(*_: object) -> None:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(os, failing, fail)
    with pytest.raises(OSError, match="No space left"):
        atomic.write_bytes(tmp_path / "file", b"new")
    assert (tmp_path / "file").read_bytes() == b"old"
    assert names(tmp_path) == ["file"]


def test_the_bytes_are_on_disk_before_the_name_is_and_the_name_before_the_call_returns(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    calls: list[str] = []
    fsync, replace = os.fsync, os.replace

    def noted_fsync(descriptor: int) -> None:
        calls.append(Path(os.readlink(f"/proc/self/fd/{descriptor}")).suffix or "folder")
        fsync(descriptor)

    def noted_replace(source: str, target: Path) -> None:
        calls.append("rename")
        replace(source, target)

    monkeypatch.setattr(os, "fsync", noted_fsync)
    monkeypatch.setattr(os, "replace", noted_replace)
    atomic.write_bytes(tmp_path / "file", b"new")
    assert calls == [".part", "rename", "folder"]


@pytest.mark.parametrize("code", [errno.EINVAL, errno.EBADF, errno.EIO])
def test_a_file_system_that_cannot_flush_folders_is_no_error(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, code: int
) -> None:
    def fail(descriptor: int) -> None:
        raise OSError(code, os.strerror(code))

    monkeypatch.setattr(os, "fsync", fail)
    with pytest.raises(OSError, match=os.strerror(code)) if code == errno.EIO else nullcontext():
        atomic.flush_directory(tmp_path)


WRITER = """
    import sys, time
    from pathlib import Path
    from dist_train.rundir import atomic
    with atomic.replacing(Path(sys.argv[1])) as file:
        file.write(b"half of the new")
        file.flush()
        print("written", flush=True)
        time.sleep(60)
"""


def test_promise_6_a_writer_that_is_killed_leaves_the_old_file(tmp_path: Path) -> None:
    target = tmp_path / "file"
    atomic.write_bytes(target, b"old")
    with subprocess.Popen(
        [sys.executable, "-c", textwrap.dedent(WRITER), str(target)], stdout=subprocess.PIPE, text=True
    ) as process:
        assert process.stdout is not None
        assert process.stdout.readline() == "written\n"
        process.send_signal(signal.SIGKILL)
    assert process.returncode == -signal.SIGKILL
    assert target.read_bytes() == b"old"
    atomic.write_bytes(target, b"newer")
    assert target.read_bytes() == b"newer"


def test_an_error_of_the_disk_names_the_file() -> None:
    with pytest.raises(OSError, match="/proc/self/mem"):  # of which nothing is mapped at its beginning
        atomic.read_regular(Path("/proc/self/mem"))
    with pytest.raises(OSError, match="/proc/self/mem"):
        atomic.read_end(Path("/proc/self/mem"), 100)


def test_a_last_line_that_is_kept_gets_the_newline_that_it_lacks(tmp_path: Path) -> None:
    (tmp_path / "file").write_bytes(b"one\ntwo")
    atomic.keep_lines(tmp_path / "file", lambda line: True)
    assert (tmp_path / "file").read_bytes() == b"one\ntwo\n"


def test_a_folder_that_is_not_there_is_an_error_of_the_system(tmp_path: Path) -> None:
    with pytest.raises(FileNotFoundError):
        atomic.write_text(tmp_path / "nowhere" / "file", "text")
