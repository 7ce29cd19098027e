"""What the program must not do: run what a file says, start a shell, let others read a run, write secrets down."""

from __future__ import annotations

import ast
import json
import os
import shlex
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest

from dist_train.cli.main import main
from dist_train.cluster.local_launch import say
from dist_train.rundir.records import EvaluationRecord, EventRecord, Record
from tests.unit.foreign_files import give_away
from tests.unit.test_cli_commands import write_config
from tests.unit.test_watch_run_table import make_run

PACKAGE = Path(__file__).parents[2] / "dist_train"
FILES = sorted(PACKAGE.rglob("*.py"))


def calls(path: Path) -> Iterator[tuple[str, ast.Call]]:
    for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
        if isinstance(node, ast.Call):
            yield ast.unparse(node.func), node


def named(path: Path) -> str:
    return str(path.relative_to(PACKAGE.parent))


def keyword(call: ast.Call, name: str) -> object:
    for given in call.keywords:
        if given.arg == name:
            return given.value.value if isinstance(given.value, ast.Constant) else ast.unparse(given.value)
    return None


@pytest.mark.parametrize("path", FILES, ids=named)
def test_nothing_is_evaluated_unpickled_or_given_to_a_shell(path: Path) -> None:
    imported = {
        name.name.split(".")[0]
        for node in ast.walk(ast.parse(path.read_text(encoding="utf-8")))
        if isinstance(node, ast.Import | ast.ImportFrom)
        for name in (node.names if isinstance(node, ast.Import) else [ast.alias(node.module or "")])
    }
    assert not imported & {"pickle", "_pickle", "shelve", "marshal", "dill", "cloudpickle", "joblib"}
    for name, call in calls(path):
        assert name not in {"eval", "exec", "compile", "os.system", "os.popen", "__import__"}, name
        assert keyword(call, "shell") is None, f"{name} with a shell"
        if name == "torch.load":
            assert keyword(call, "weights_only") is True
        if name in {"np.load", "numpy.load", "np.lib.format.read_array"}:
            assert keyword(call, "allow_pickle") is False
        assert name not in {"yaml.load", "yaml.full_load", "yaml.unsafe_load", "tempfile.mktemp", "tarfile.extractall"}
        assert not name.endswith(".extractall")


def test_the_loader_of_yaml_is_a_safe_one() -> None:
    import yaml

    from dist_train.config import loading

    assert issubclass(loading._Loader, yaml.SafeLoader)


@pytest.mark.parametrize("file", ["token_file", "password_file"])
def test_a_run_is_the_user_s_alone_and_holds_no_secret(file: str, tmp_path: Path) -> None:
    secret = "3f9c0ffee0ddba11"
    (tmp_path / "secret").write_text(f"{secret}\n" if file == "token_file" else f"user:{secret}\n")
    (tmp_path / "secret").chmod(0o644)
    settings = {"enabled": True, "port": 0, "last_scrape_seconds": 0}
    config = write_config(tmp_path, metrics={**settings, file: str(tmp_path / "secret")}, run={"max_steps": 2})
    before = os.umask(0o022)
    try:
        assert main(["train", config, "--run-dir", str(tmp_path / "run")]) == 0
    finally:
        os.umask(before)
    assert (tmp_path / "run").stat().st_mode & 0o077 == 0
    found = [path for path in (tmp_path / "run").rglob("*") if path.is_file() and secret.encode() in path.read_bytes()]
    assert not found
    json.loads((tmp_path / "run" / "status.json").read_text())
    assert f"metrics.{file}: everybody" in (tmp_path / "run" / "logs" / "rank-0.log").read_text()


@pytest.mark.parametrize("command", [["runs"], ["watch", "--once"]], ids=["runs", "watch"])
def test_what_is_printed_of_a_run_does_nothing_to_the_terminal(command: list[str], tmp_path: Path) -> None:
    escape = "\x1b]0;pwned\x07\0\r"
    records: list[Record] = [
        EvaluationRecord(1, 1.0, f"test{escape}", 0.5, 0.5, 10, 1.0),
        EventRecord(1, f"signal{escape}", 1.0, {f"name{escape}": f"SIGTERM{escape}"}),
    ]
    config = f"model: {{name: {json.dumps(escape)}}}\nnoise: {{method: {json.dumps(escape)}, amplitude: 1}}\n"
    name = "odd\x1b[31m\x9b\udcff"
    run = make_run(tmp_path / name, records, config, state="failed", reason=f"why{escape}", host=f"host{escape}")
    program = [sys.executable, "-m", "dist_train", *command, str(tmp_path if command == ["runs"] else run)]
    printed = subprocess.run(program, capture_output=True, check=True, env={**os.environ, "COLUMNS": "200"}).stdout
    assert b"odd\\x1b[31m" in printed
    assert not [each for each in printed.decode() if each != "\n" and not each.isprintable()]


def test_what_a_launcher_says_of_a_lost_rank_does_nothing_to_the_terminal(capsys: pytest.CaptureFixture[str]) -> None:
    say("rank 1 failed: the image a\x1b]0;pwned\x07.png cannot be read")
    said = "dist-train launch: rank 1 failed: the image a\\x1b]0;pwned\\x07.png cannot be read\n"
    assert capsys.readouterr().err == said


@pytest.mark.parametrize(
    ("mode", "is_ours", "is_fine"),
    [(0o700, True, True), (0o777, True, False), (0o1777, True, True), (0o755, False, False)],
)
def test_no_wheel_is_taken_from_a_folder_of_others(mode: int, is_ours: bool, is_fine: bool, tmp_path: Path) -> None:
    folder = tmp_path / "wheels"
    folder.mkdir()
    folder.chmod(mode)
    if not (is_ours or give_away(folder)):
        pytest.skip("this process may not give a folder away")
    script = f". {shlex.quote(str(PACKAGE.parent))}/docker/common.sh; own_folders {folder} {tmp_path}/nowhere"
    ended = subprocess.run(["bash", "-euo", "pipefail", "-c", script], capture_output=True, text=True, check=False)
    assert (ended.returncode == 0) == is_fine, ended.stderr
    assert ("DIST_TRAIN_CACHE" in ended.stderr) != is_fine
    assert not list(folder.iterdir())
