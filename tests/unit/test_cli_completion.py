"""Completion by a real bash, and a real zsh where there is one."""

from __future__ import annotations

import os
import platform
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

from dist_train.cli.main import main


@pytest.fixture(scope="module")
def script(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("completion") / "script"
    printed = subprocess.run(
        [sys.executable, "-m", "dist_train", "completion", "bash"], capture_output=True, text=True, check=True
    )
    path.write_text(printed.stdout)
    return path


def completed(script: Path, *words: str) -> list[str]:
    """Return what bash offers for the last of `words`, which it has cut at each equals sign."""
    program = (
        'source "$1"; shift; COMP_WORDS=("$@"); COMP_CWORD=$(($# - 1)); _dist_train; printf "%s\\n" "${COMPREPLY[@]}"'
    )
    command = ["bash", "--norc", "-u", "-c", program, "bash", str(script), "dist-train", *words]
    ended = subprocess.run(command, capture_output=True, text=True, check=True)
    assert ended.stderr == ""
    return ended.stdout.split()


@pytest.mark.parametrize(
    ("words", "found"),
    [
        (["sw"], ["sweep"]),
        (["config", "ch"], ["check"]),
        (["train", "--r"], ["--run-dir"]),
        (["train", "configs/demo.yaml", "noise.me"], ["noise.method=", "noise.memory="]),
        (["train", "configs/demo.yaml", "noise.method", "=", "sm"], ["smoothout"]),
        (
            ["train", "configs/demo.yaml", "noise.method", "="],
            ["none", "smoothout", "arwp", "langevin", "sgld", "fsgld", "sam", "asam", "ivon"],
        ),
        (["train", "configs/demo.yaml", "noise.method=sm"], ["noise.method=smoothout"]),
        (["train", "configs/demo.yaml", "noise.method", "=", "sam", "data.down"], ["data.download="]),
        (["train", "configs/demo.yaml", "noise.schedule.kind", "=", "c"], ["constant", "cosine"]),
        (["train", "configs/demo.yaml", "data.download", "=", "t"], ["true"]),
        (["launch", "-np", "2", "train", "--r"], ["--run-dir"]),
        (["evaluate", "runs/demo", "--split", "te"], ["test"]),
        (["landscape", "pl"], ["plane"]),
        (["landscape", "plane", "--no"], ["--normalization"]),
        (["train", ""], []),
        (["train", "con"], []),
        (["train", "configs/demo.yaml", "--run-dir", "r"], []),
    ],
)
def test_bash_completes(script: Path, words: list[str], found: list[str]) -> None:
    """Nothing found: bash itself then completes names of files."""
    assert completed(script, *words) == found


def test_files_are_offered_beside_the_settings_that_begin_like_them(
    script: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    for name in ("model.yaml", "model.name d.yaml", "other.yaml"):
        (tmp_path / name).touch()
    (tmp_path / "models").mkdir()
    found = completed(script, "train", "mo")
    assert {"model.name=", "model.yaml", "models/"} <= set(found)
    assert completed(script, "train", "model.na") == ["model.name=", "model.name\\", "d.yaml"]
    assert completed(script, "train", "configs/demo.yaml", "model.n", "=", "mo") == []


def test_every_command_and_every_setting_is_offered(script: Path) -> None:
    assert {"train", "report", "completion"} <= set(completed(script, ""))
    assert len(completed(script, "train", "configs/demo.yaml", "m")) > 20


def test_the_script_is_plain_bash(script: Path) -> None:
    shellcheck = shutil.which("shellcheck", path=f"{Path(sys.executable).parent}:{os.environ['PATH']}")
    if shellcheck is None and platform.machine() == "aarch64":
        pytest.skip("shellcheck is missing; make setup does not install it on ARM")
    assert shellcheck, "make setup installs it"
    subprocess.run([shellcheck, "--shell=bash", str(script)], check=True)


@pytest.mark.skipif(not shutil.which("zsh"), reason="needs zsh")
def test_zsh_takes_the_script(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["completion", "zsh"]) == 0
    (tmp_path / "script").write_text(capsys.readouterr().out)
    # as zsh's own compgen calls it; by what was typed, zsh chooses itself
    program = (
        "source ./script; COMP_WORDS=(dist-train train configs/demo.yaml noise.method=sm); COMP_CWORD=3; "
        'emulate sh; setopt kshglob noshglob braceexpand; _dist_train; print -l "${COMPREPLY[@]}"'
    )
    ended = subprocess.run(["zsh", "-f", "-c", program], cwd=tmp_path, capture_output=True, text=True, check=False)
    assert "noise.method=smoothout" in ended.stdout.split(), ended.stderr
