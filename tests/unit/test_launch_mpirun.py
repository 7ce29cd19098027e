"""launch/mpirun.sh as far as it goes without MPI: the command that it composes."""

from __future__ import annotations

import os
import subprocess
import sys
from itertools import pairwise
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]


def command_of(folder: Path, *arguments: str, **variables: str) -> list[str]:
    """Return the arguments that mpirun gets."""
    programs = folder / "programs"
    programs.mkdir()
    for name, line in (("python", f'exec "{sys.executable}" "$@"'), ("mpirun", f"printf '%s\\n' \"$@\" >{folder}/out")):
        (programs / name).write_text(f"#!/bin/sh\n{line}\n")
        (programs / name).chmod(0o755)
    environment = {"PATH": os.environ["PATH"], "DIST_TRAIN_PYTHON": str(programs / "python"), **variables}
    script = str(ROOT / "launch/mpirun.sh")
    ended = subprocess.run([script, *arguments], cwd=folder, env=environment, capture_output=True, text=True)
    assert ended.returncode == 0, ended.stderr
    return (folder / "out").read_text().splitlines()


@pytest.mark.parametrize(
    "options", [("-np", "3", "--hostfile", "hosts"), ("--np", "3", "--hostfile=hosts"), ("--np=3", "--hostfile=hosts")]
)
def test_options_are_understood_as_mpirun_understands_them(options: tuple[str, ...], tmp_path: Path) -> None:
    (tmp_path / "hosts").write_text("node1 slots=3\n")
    command = command_of(tmp_path, *options, "runs")
    assert command[:2] == ["-np", "3"]
    assert command[command.index("--hostfile") + 1] == "hosts"
    assert command[-1] == "runs"


def test_ranks_on_other_machines_get_the_variables_of_libraries_and_caches(tmp_path: Path) -> None:
    (tmp_path / "hosts").write_text("node1 slots=3\n")
    names = ("UCX_TLS", "GLOO_SOCKET_IFNAME", "TORCH_LOGS", "NCCL_DEBUG", "DIST_TRAIN_CACHE", "XDG_CACHE_HOME")
    command = command_of(tmp_path, "--hostfile", "hosts", "runs", EDITOR="vi", **dict.fromkeys(names, "x"))
    passed = {name for option, name in pairwise(command) if option == "-x"}
    assert passed >= {*names, "PATH"}
    assert "EDITOR" not in passed
