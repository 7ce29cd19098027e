"""Where a run lies, and whether it may be resumed."""

from __future__ import annotations

import errno
import os
import shutil
import subprocess
import sys
import textwrap
from collections.abc import Callable
from pathlib import Path
from typing import Any
from unittest.mock import Mock

import pytest

from dist_train.config import Config, load_config, parse_config
from dist_train.outcome import FaultError, UsageError
from dist_train.rundir.paths import (
    RunDirectory,
    StudyDirectory,
    has_run_or_study,
    oserror_to_fault,
    refuse_foreign,
    run_folder,
)
from tests.raising import raises
from tests.unit.checkpoint_files import write
from tests.unit.foreign_files import give_away, without_root


def parse(**sections: Any) -> Config:
    return parse_config(sections, source="test")


DECIDED = parse(batch={"micro_size": 64}, precision={"threads": 2})


def begun(folder: Path, *steps: int) -> RunDirectory:
    """A run that began with `DECIDED` and has saved checkpoints at `steps`."""
    directory = RunDirectory(folder / "run")
    directory.create()
    directory.save_config(DECIDED)
    for step in steps:
        write(directory.checkpoints, step)
    return directory


def test_its_folders_are_made_and_may_be_there_already(tmp_path: Path) -> None:
    directory = RunDirectory(tmp_path / "a" / "b")
    for _ in range(2):
        directory.create()
        assert directory.checkpoints.is_dir()
        assert directory.logs.is_dir()
        assert sorted(path.name for path in directory.root.iterdir()) == ["checkpoints", "logs"]


def make_run(folder: Path) -> None:
    RunDirectory(folder).create()


def make_study(folder: Path) -> None:
    folder.mkdir(parents=True, exist_ok=True)
    for file in (StudyDirectory(folder).runs, StudyDirectory(folder).study):
        file.touch()


@pytest.mark.parametrize("make", [make_run, make_study])
def test_a_folder_without_a_run_does_not_hide_the_run_of_its_name(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, make: Callable[[Path], None]
) -> None:
    monkeypatch.chdir(tmp_path)
    tmp_path.chmod(0o755)
    name, below = Path("cats"), Path("runs/cats")
    name.mkdir()
    assert run_folder(name) == name
    make(below)
    assert run_folder(name) == below
    name.chmod(0)
    for folder in (Path("runs"), below):
        folder.chmod(0o755)
    with without_root():
        assert run_folder(name) == below
    name.rmdir()
    make(name)
    assert run_folder(name) == name


@pytest.mark.parametrize("make", [make_run, make_study])
def test_a_folder_of_runs_is_not_taken_for_one_without_a_run(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, make: Callable[[Path], None]
) -> None:
    monkeypatch.chdir(tmp_path)
    tmp_path.chmod(0o755)
    make(Path("experiments/s1"))
    make(Path("runs/experiments/old"))
    make(Path("runs/experiments"))
    closed = Path("experiments/closed")
    closed.mkdir(0)
    for folder in (closed.parent, closed.parent / "s1"):
        folder.chmod(0o755)
    with without_root():
        assert run_folder(Path("experiments"), suits=has_run_or_study) == Path("experiments")
    shutil.rmtree("experiments/s1")
    assert run_folder(Path("experiments"), suits=has_run_or_study) == Path("runs/experiments")


@pytest.mark.parametrize("blocked", ["run", "run/checkpoints"])
def test_a_folder_that_cannot_be_made_is_one_clear_error(tmp_path: Path, blocked: str) -> None:
    path = tmp_path / blocked
    path.parent.mkdir(exist_ok=True)
    path.write_text("a file in the way")
    with raises(UsageError, "run-directory-unwritable"):
        RunDirectory(tmp_path / "run").create()


def test_a_folder_where_none_can_be_made_is_the_user_s_mistake() -> None:
    with raises(UsageError, "run-directory-unwritable"):
        RunDirectory(Path("/proc/runs/run")).create()


@pytest.mark.parametrize("number", [errno.EDQUOT, errno.EIO, errno.ENOSPC, errno.ESTALE])
def test_a_disk_that_fails_at_the_start_is_no_mistake_of_the_user(
    number: int, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    directory = RunDirectory(tmp_path / "run")
    monkeypatch.setattr(Path, "touch", Mock(side_effect=OSError(number, os.strerror(number))))
    with raises(FaultError, "disk-failed"), oserror_to_fault(directory):
        directory.create()


def test_saved_settings_are_read_back(tmp_path: Path) -> None:
    assert load_config(begun(tmp_path).config) == DECIDED


def test_its_folders_are_the_user_s_alone(tmp_path: Path) -> None:
    before = os.umask(0)
    try:
        directory = RunDirectory(tmp_path / "runs" / "run")
        directory.create()
    finally:
        os.umask(before)
    for folder in (directory.root, directory.checkpoints, directory.logs):
        assert folder.stat().st_mode & 0o777 == 0o700


def test_a_disk_that_fails_is_told_with_the_fix(tmp_path: Path) -> None:
    directory = RunDirectory(tmp_path / "run")
    with raises(FaultError, "disk-failed"), oserror_to_fault(directory):
        raise OSError(28, "No space left on device", str(directory.metrics))


def test_a_run_keeps_the_id_that_was_made_for_it_and_another_has_its_own(tmp_path: Path) -> None:
    directories = [RunDirectory(tmp_path / name) for name in ("a", "b")]
    for directory in directories:
        directory.create()
    first, other = (directory.run_id() for directory in directories)
    assert first != other
    assert RunDirectory(tmp_path / "a").run_id() == first
    assert len(bytes.fromhex(first)) == 8


@pytest.mark.parametrize("content", ["", "not an id", "\xff"])
def test_an_id_that_is_broken_is_made_anew(content: str, tmp_path: Path) -> None:
    directory = RunDirectory(tmp_path)
    directory.id.write_text(content, encoding="latin-1")
    assert directory.run_id() == directory.run_id()


def test_an_id_that_is_no_file_does_not_hang(tmp_path: Path) -> None:
    directory = RunDirectory(tmp_path)
    os.mkfifo(directory.id)
    with pytest.raises(OSError, match="not a regular file"):
        directory.run_id()


@pytest.mark.parametrize("folder", ["root", "checkpoints", "logs"])
def test_a_run_directory_in_which_everybody_may_write_is_refused(folder: str, tmp_path: Path) -> None:
    directory = begun(tmp_path)
    getattr(directory, folder).chmod(0o777)
    with raises(UsageError, "folder-foreign"):
        directory.create()
    getattr(directory, folder).chmod(0o770)
    directory.create()


def test_the_folders_above_a_run_directory_may_be_like_tmp(tmp_path: Path) -> None:
    tmp_path.chmod(0o1777)
    begun(tmp_path)
    refuse_foreign(tmp_path, "")


def test_a_folder_of_another_user_is_refused(tmp_path: Path) -> None:
    directory = begun(tmp_path)
    if not give_away(directory.root):
        pytest.skip("this process may not give a folder away")
    with raises(UsageError, "folder-foreign"):
        directory.create()


def test_root_s_own_folders_are_fine() -> None:
    program = """
        import os
        import sys
        from pathlib import Path
        from dist_train.rundir.paths import refuse_foreign
        try:
            os.setuid(12_345)
        except OSError:
            sys.exit(75)
        refuse_foreign(Path("/usr"), "")
        refuse_foreign(Path("/tmp"), "")
    """
    ended = subprocess.run(
        [sys.executable, "-c", textwrap.dedent(program)], capture_output=True, text=True, check=False
    )
    if ended.returncode == 75:
        pytest.skip("this process may not become another user")
    assert ended.returncode == 0, ended.stderr


def test_a_closed_folder_of_runs_does_not_hide_a_run_beside_it(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    tmp_path.chmod(0o755)
    name, missing = Path("cats"), Path("dogs")
    make_run(name)
    for folder, mode in ((name, 0o755), (Path("runs"), 0)):
        folder.mkdir(exist_ok=True)
        folder.chmod(mode)
    with without_root():
        assert run_folder(name) == name
        with raises(UsageError, "run-missing"):
            run_folder(missing)


def test_the_name_of_no_checkpoint_of_a_run_leads_to_the_run(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    make_run(Path("runs/cp"))
    with raises(UsageError, "run-missing") as refused:
        run_folder(Path("cp@last"))
    assert "did you mean runs/cp?" in str(refused.value)
    with raises(UsageError, "run-missing") as refused:
        run_folder(Path("another"))
    assert "dist-train runs lists what is there" in str(refused.value)


def test_a_folder_above_runs_does_not_hide_the_run_of_its_name(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    Path("mnist/project/checkpoints").mkdir(parents=True)
    make_run(Path("runs/mnist"))
    assert run_folder(Path("mnist")) == Path("runs/mnist")


def test_names_that_are_not_those_of_steps_are_no_checkpoints(tmp_path: Path) -> None:
    directory = begun(tmp_path, 3)
    for name in ("step-best.json", "step-\u00b2.json"):
        (directory.checkpoints / name).touch()
    assert directory.checkpoint_steps() == (3,)
