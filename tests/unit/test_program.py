"""How the program's process ends."""

from __future__ import annotations

import os
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

def main():
    for name in sys.argv[2:]:
        sys.modules[f"dist_train.cluster.{name}"] = ModuleType(name)
    return int(sys.argv[1])

program.main = main
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
