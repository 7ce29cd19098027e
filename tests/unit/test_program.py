"""How the program's process ends."""

from __future__ import annotations

import os
import signal
import subprocess
import sys

import pytest

from dist_train.cluster.launch import MEMBERSHIP_VARIABLE
from dist_train.outcome import ExitCode
from tests.waiting import PATIENCE

_AT_ONCE = ""
_IN_ORDER = "in order\n"

_PROGRAM = """
import atexit
import sys
from types import ModuleType
from dist_train import __main__ as program
from dist_train.cli import main as commands

def main():
    for name in sys.argv[2:]:
        sys.modules[f"dist_train.cluster.{name}"] = ModuleType(name)
    return int(sys.argv[1])

commands.main = main
atexit.register(print, "in order")
raise SystemExit(program.run())
"""


@pytest.mark.parametrize(
    ("result", "engines", "is_elastic", "code", "end"),
    [
        ("3", ("torch_engine",), False, ExitCode.DIVERGED, _AT_ONCE),
        ("no number", ("torch_engine",), False, ExitCode.FAULT, _AT_ONCE),
        ("0", ("torch_engine",), False, ExitCode.FINISHED, _IN_ORDER),
        ("0", ("torch_engine",), True, ExitCode.FINISHED, _AT_ONCE),
        ("3", ("torch_engine", "horovod"), False, ExitCode.DIVERGED, _IN_ORDER),
        ("no number", (), False, ExitCode.FAULT, _IN_ORDER),
    ],
)
def test_a_rank_of_torch_that_fails_ends_at_once(
    result: str, engines: tuple[str, ...], is_elastic: bool, code: int, end: str
) -> None:
    kept = {name: value for name, value in os.environ.items() if name != MEMBERSHIP_VARIABLE}
    variables = {**kept, **({MEMBERSHIP_VARIABLE: "127.0.0.1:9"} if is_elastic else {})}
    command = [sys.executable, "-c", _PROGRAM, result, *engines]
    ended = subprocess.run(command, env=variables, capture_output=True, text=True, timeout=PATIENCE)
    assert (ended.returncode, ended.stdout) == (code, end), ended.stderr
    assert ("ValueError" in ended.stderr) is (result == "no number")


_INTERRUPTED = """
import sys
from dist_train import __main__ as program

interrupted = sys.argv.pop(1)

class Interrupting:
    def find_spec(self, name, path, target=None):
        if name == interrupted:
            raise KeyboardInterrupt

sys.meta_path.insert(0, Interrupting())
raise SystemExit(program.run())
"""


@pytest.mark.parametrize("module", ["dist_train.cli.main", "dist_train.config", "dist_train.sweep.planned_runs"])
def test_control_c_at_the_start_ends_the_program_by_its_signal(module: str) -> None:
    command = [sys.executable, "-c", _INTERRUPTED, module, "sweep", "nowhere.yaml"]
    ended = subprocess.run(command, capture_output=True, text=True, timeout=PATIENCE)
    assert (ended.returncode, ended.stderr) == (-signal.SIGINT, "")
