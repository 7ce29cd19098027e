"""`dist-train train`: what a rank that dies leaves on its standard error."""

from __future__ import annotations

import errno
import json
import os
import signal
import subprocess
import sys
from pathlib import Path
from unittest.mock import Mock

import pytest

from dist_train.cli.main import main
from dist_train.cluster.elastic_launch import _admitting_others
from dist_train.cluster.launch import MEMBERSHIP_VARIABLE
from dist_train.config import load_config
from dist_train.rundir.status import load_status
from tests.unit.checkpoint_files import write
from tests.unit.test_cli_commands import write_config
from tests.waiting import PATIENCE

ROOT = Path(__file__).parents[2]


@pytest.mark.parametrize(
    "override", ["run.resume=nope", "run.init_from=none.pth", "data={name: imagefolder, root: none, classes: 2}"]
)
def test_a_start_that_is_refused_leaves_no_run(tmp_path: Path, override: str) -> None:
    assert main(["train", write_config(tmp_path), override, "--run-dir", str(tmp_path / "run")]) == 2
    assert not (tmp_path / "run").exists()


def test_a_setting_without_effect_is_warned_of_once(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["train", write_config(tmp_path), "data.download=true", "--run-dir", str(tmp_path / "run")]) == 0
    assert capsys.readouterr().err.count("data.download has no effect") == 1


def test_a_start_that_is_refused_leaves_no_run_of_a_launcher_that_listens(tmp_path: Path) -> None:
    run = tmp_path / "run"
    with _admitting_others(Mock(address=("127.0.0.1", 1), token=""), run, "launch"):
        assert main(["train", write_config(tmp_path), "run.resume=nope", "--run-dir", str(run)]) == 2
    assert not run.exists()


def test_a_resume_with_other_settings_leaves_no_run(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    path, checkpoints = write_config(tmp_path), tmp_path / "other/checkpoints"
    checkpoints.mkdir(parents=True)
    write(checkpoints, 3, config=load_config(Path(path)).model_dump(mode="json"))
    resume = f"run.resume={tmp_path / 'other'}"
    assert main(["train", path, resume, "model.width=0.5", "--run-dir", str(tmp_path / "run")]) == 2
    assert "model.width" in capsys.readouterr().err
    assert not (tmp_path / "run").exists()


def test_the_same_command_with_a_relative_plugin_file_resumes(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    source = "import dist_train\n@dist_train.register('schedules', 'half')\ndef half(over): return 1 - over / 2\n"
    (tmp_path / "mine.py").write_text(source)
    words = ["train", write_config(tmp_path), "schedule.decay=half", "--plugin", "mine.py", "--run-dir", "run"]
    assert [main(words), main(words)] == [0, 0]


@pytest.mark.parametrize(
    ("number", "exit_code", "message"),
    [
        (errno.EACCES, 2, "permission denied: {} [permission-denied]"),
        (errno.EIO, 1, "Input/output error: {} [disk-failed]"),
    ],
)
def test_a_file_that_cannot_be_read_is_told_without_a_traceback(
    number: int,
    exit_code: int,
    message: str,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    def refuse(name: Path) -> Path:
        raise OSError(number, os.strerror(number), str(name / "status.json"))

    monkeypatch.setattr("dist_train.watch.run.find_run", refuse)
    assert main(["watch", str(tmp_path)]) == exit_code
    assert capsys.readouterr().err == f"dist-train: {message.format(tmp_path / 'status.json')}\n"


@pytest.mark.parametrize("variables", [{}, {MEMBERSHIP_VARIABLE: "127.0.0.1:1"}])
def test_the_exit_code_is_that_of_the_error_also_where_nothing_can_be_printed(variables: dict[str, str]) -> None:
    words = [sys.executable, "-m", "dist_train", "train", "nowhere.yaml"]
    with Path("/dev/full").open("w") as full:
        ended = subprocess.run(words, stderr=full, cwd=ROOT, env={**os.environ, **variables}, check=False)
    assert ended.returncode == 2


def test_python_finds_the_package_in_a_folder_that_holds_a_clone(tmp_path: Path) -> None:
    (tmp_path / "dist_train").symlink_to(ROOT)
    for words in (["-c", "import dist_train; dist_train.load_config"], ["-m", "dist_train", "--version"]):
        ended = subprocess.run([sys.executable, *words], capture_output=True, text=True, cwd=tmp_path)
        assert ended.returncode == 0, ended.stderr


def test_an_interrupted_command_ends_by_the_signal_without_a_traceback() -> None:
    script = (
        "import signal, dist_train.cli.main as it; it.parse = lambda words: signal.raise_signal(signal.SIGINT); "
        "from dist_train.__main__ import run; run()"
    )
    ended = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True, timeout=PATIENCE, cwd=ROOT)
    assert (ended.returncode, ended.stderr) == (-signal.SIGINT, "")


@pytest.mark.parametrize("closed", ["<&-", "<&- >&- 2>&-"])
def test_a_launch_trains_with_closed_standard_descriptors(closed: str, tmp_path: Path) -> None:
    words = ["launch", "-np", "2", "train", write_config(tmp_path), "--run-dir", str(tmp_path / "run")]
    command = ["sh", "-c", f'exec "$@" {closed}', "sh", sys.executable, "-m", "dist_train", *words]
    ended = subprocess.run(command, capture_output=True, text=True, timeout=PATIENCE, cwd=ROOT, check=False)
    assert ended.returncode == 0, ended.stderr
    assert json.loads((tmp_path / "run/run.lock").read_text())["host"]
    assert load_status(tmp_path / "run/status.json").state == "finished"


_SCRIPT = """
import os, resource, signal, sys, types
from dist_train.cli.main import main

def train_until_a_library_fails(config, run_directory):
    os.kill(os.getpid(), signal.SIGSEGV)

resource.setrlimit(resource.RLIMIT_CORE, (0, 0))
# in place of the module that imports torch
sys.modules["dist_train.launching.run"] = types.SimpleNamespace(train=train_until_a_library_fails)
main(["train", *sys.argv[1:]])
"""


def test_a_rank_that_a_fault_of_memory_kills_says_where_it_was(tmp_path: Path) -> None:
    command = [sys.executable, "-c", _SCRIPT, write_config(tmp_path)]
    ended = subprocess.run(command, capture_output=True, text=True, timeout=PATIENCE, cwd=ROOT)
    assert ended.returncode == -signal.SIGSEGV
    assert "Fatal Python error: Segmentation fault" in ended.stderr
    assert "in train_until_a_library_fails" in ended.stderr
    assert 'dist_train/cli/run_commands.py", line' in ended.stderr
