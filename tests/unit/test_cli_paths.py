"""Paths that commands are given: names that are not UTF-8, devices and links, names that are too long."""

from __future__ import annotations

import os
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

import dist_train
from dist_train.cli.main import main
from dist_train.outcome import ExitCode, UsageError
from dist_train.report.stored_run import read_analyses
from dist_train.rundir.paths import RunDirectory
from tests.raising import raises
from tests.unit.report_study import make_run, treatments
from tests.unit.test_cli_commands import write_config
from tests.waiting import PATIENCE

pytestmark = pytest.mark.usefixtures("threads_as_before")

NOT_UTF8 = os.fsdecode(b"r\xffn")


@pytest.fixture(scope="module")
def trained(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A run that has finished."""
    folder = tmp_path_factory.mktemp("trained")
    config = write_config(folder, run={"max_steps": 1})
    assert main(["train", config, "--run-dir", str(folder / "run")]) == ExitCode.FINISHED
    return folder / "run"


@pytest.fixture
def stored(tmp_path: Path) -> Path:
    """A folder with one made-up run, `fine`."""
    make_run(tmp_path / "runs/fine", treatments()[0], 0, treatments()[0].settings)
    return tmp_path / "runs"


def test_an_export_replaces_no_pipe(trained: Path, tmp_path: Path) -> None:
    os.mkfifo(tmp_path / "pipe")
    with raises(UsageError, code="output-unwritable"):
        dist_train.export(trained, "safetensors", tmp_path / "pipe")
    assert (tmp_path / "pipe").is_fifo()


def test_an_export_to_a_link_is_written_where_that_leads(trained: Path, tmp_path: Path) -> None:
    (tmp_path / "link").symlink_to(tmp_path / "there")
    assert dist_train.export(trained, "safetensors", tmp_path / "link").path == tmp_path / "link"
    assert (tmp_path / "link").is_symlink()
    assert (tmp_path / "there").is_file()


def test_results_are_of_the_run_whose_checkpoints_are_linked_to_another_disk(
    trained: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    run = RunDirectory(shutil.copytree(trained, tmp_path / "linked"))
    run.checkpoints.rename("disk")
    run.checkpoints.symlink_to(tmp_path / "disk")
    assert main(["landscape", "direction", "linked", "--points", "3", "--samples", "8"]) == 0
    assert main(["sharpness", "linked", "--only", "rise", "--draws", "2", "--samples", "8"]) == 0
    assert len(read_analyses(run).landscapes) == len(read_analyses(run).sharpness) == 1
    assert dist_train.export("linked", "safetensors").path == Path("linked-00000001.safetensors")


@pytest.mark.parametrize("below", ["", "/run"])
def test_no_run_is_made_under_a_name_that_is_not_utf8(
    below: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    words = [write_config(tmp_path), "--run-dir", f"{tmp_path}/{NOT_UTF8}{below}"]
    assert main(["train", *words]) == main(["config", "run-directory", *words]) == ExitCode.USAGE
    told = capsys.readouterr()
    assert (told.out, told.err.count("[name-not-utf8]")) == ("", 2)
    assert not (tmp_path / NOT_UTF8).exists()


@pytest.mark.parametrize("words", ["curve {}", "report {}", "evaluate {}", "sharpness {}@1", "export {} --to onnx"])
def test_a_run_whose_name_is_not_utf8_is_refused_at_once(
    words: str, trained: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    run = shutil.copytree(trained, tmp_path / NOT_UTF8)
    assert main(words.format(run).split()) == ExitCode.USAGE
    assert "[name-not-utf8]" in capsys.readouterr().err


def test_a_checkpoint_and_an_output_in_such_a_folder_are_refused(trained: Path, tmp_path: Path) -> None:
    run = shutil.copytree(trained, tmp_path / NOT_UTF8)
    for target, output in ((RunDirectory(run).checkpoint(1), "model"), (trained, NOT_UTF8)):
        with raises(UsageError, code="name-not-utf8"):
            dist_train.export(target, "safetensors", tmp_path / output)


def test_a_report_of_a_folder_has_the_run_whose_name_is_not_utf8(stored: Path) -> None:
    (stored / "fine").rename(stored / NOT_UTF8)
    assert main(["report", str(stored)]) == ExitCode.FINISHED
    assert r"r\udcffn" in (stored / "report.html").read_text(encoding="utf-8")


def test_a_name_that_this_locale_cannot_read_is_told_with_the_way_to_read_it(stored: Path) -> None:
    (stored / "fine").rename(stored / "ünïcode")
    variables = {"LANG": "C", "LC_ALL": "C", "PYTHONUTF8": "0", "PYTHONCOERCECLOCALE": "0"}
    words: list[str | bytes] = [sys.executable, "-m", "dist_train", "report", os.fsencode(stored / "ünïcode")]
    here = {**os.environ, **variables}
    ended = subprocess.run(words, capture_output=True, text=True, timeout=PATIENCE, env=here, check=False)
    assert ended.returncode == ExitCode.USAGE
    assert "PYTHONUTF8=1" in ended.stderr
    assert "[name-not-utf8]" in ended.stderr


@pytest.mark.parametrize(("command", "written"), [("report", "fine/report.html"), ("curve", "fine/learning_curve.png")])
def test_pages_and_pictures_are_readable_as_the_umask_says_or_as_the_present_file(
    command: str, written: str, stored: Path
) -> None:
    before = os.umask(0o027)
    try:
        for mode in (0o640, 0o604):
            assert main([command, str(stored / "fine")]) == ExitCode.FINISHED
            assert (stored / written).stat().st_mode & 0o777 == mode
            (stored / written).chmod(0o604)
    finally:
        os.umask(before)


@pytest.mark.parametrize(
    ("words", "code"),
    [
        (["report", "{}", "-o", "{}"], "report-form"),
        (["report", "{}", "-o", ""], "report-form"),
        (["report", "{}", "-o", f"{300 * 'a'}.html"], "name-too-long"),
        (["watch", 300 * "a"], "name-too-long"),
        (["evaluate", 300 * "a"], "name-too-long"),
        (["replay", "{}/fine@" + 5_000 * "9"], "replay-form"),
    ],
)
def test_a_name_that_no_file_can_have_is_refused(
    words: list[str], code: str, stored: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert main([word.format(stored) for word in words]) == ExitCode.USAGE
    assert f"[{code}]" in capsys.readouterr().err


def test_a_configuration_in_the_folder_of_a_new_run_is_not_replaced(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    config = write_config(tmp_path, run={"max_steps": 1})
    before = Path(config).read_bytes()
    words = [config, "--run-dir", str(tmp_path)]
    assert main(["train", *words]) == main(["config", "check", *words]) == ExitCode.USAGE
    assert capsys.readouterr().err.count("[folder-foreign-file]") == 2
    assert Path(config).read_bytes() == before
    RunDirectory(tmp_path).create()  # as a run leaves its folder that has ended before its first checkpoint
    assert main(["train", *words]) == ExitCode.FINISHED


@pytest.mark.parametrize("words", ["train c.yaml --run-dir", "sweep s.yaml --directory", "submit c.yaml --directory"])
def test_an_empty_name_is_no_folder(words: str, capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit, match=str(ExitCode.USAGE)):
        main([*words.split(), ""])
    assert "not an empty one" in capsys.readouterr().err


@pytest.mark.parametrize("command", ["launch train", "launch lr-range", "submit --dry-run", "submit --study --dry-run"])
@pytest.mark.parametrize("name", ["pipe", "/dev/stdin", "/dev/fd/0"])
def test_what_other_processes_cannot_read_again_is_no_configuration(
    command: str, name: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.chdir(tmp_path)
    os.mkfifo("pipe")
    assert main([*command.split(), name]) == ExitCode.USAGE
    assert "[unreadable]" in capsys.readouterr().err


@pytest.mark.parametrize("folder", [f"{300 * 'a'}", f"runs/{300 * 'a'}/run", "file/run", "loop/run"])
def test_a_folder_that_cannot_be_one_is_no_fault_of_the_disk(
    folder: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.chdir(tmp_path)
    Path("file").touch()
    Path("loop").symlink_to("loop")
    assert main(["train", write_config(tmp_path), "--run-dir", folder]) == ExitCode.USAGE
    assert "[run-directory-unwritable]" in capsys.readouterr().err
