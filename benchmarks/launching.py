"""Runs programs of several ranks; rank 0 prints what it measured as a marked line of JSON."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import tempfile
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager, suppress
from pathlib import Path
from types import MappingProxyType
from typing import Any

_MARK = "measured: "
_ROOT = Path(__file__).parents[1]


class NotMeasuredError(RuntimeError):
    """A program ended without a result; the message has its output."""


def tell(measured: object) -> None:
    """Print `measured` so that `measure` finds it among other output."""
    print(_MARK + json.dumps(measured), flush=True)


def measure(command: Sequence[str], variables: Mapping[str, str] | None = None) -> Any:
    """Run `command` with `variables` added to its environment, and return the value that it passed to `tell`.

    Raises:
        NotMeasuredError: it printed no result.
    """
    ended = run(command, variables)
    results = [line.split(_MARK, 1)[1] for line in ended.stdout.splitlines() if _MARK in line]
    if len(results) != 1:
        raise _without_result(ended)
    return json.loads(results[0])


def finish(command: Sequence[str]) -> None:
    """Run `command` to its end.

    Raises:
        NotMeasuredError: its exit code is not 0.
    """
    ended = run(command)
    if ended.returncode != 0:
        raise _without_result(ended)


def run(command: Sequence[str], variables: Mapping[str, str] | None = None) -> subprocess.CompletedProcess[str]:
    """Run `command` in the project's folder with `variables` added to its environment."""
    return subprocess.run(
        command,
        cwd=_ROOT,
        env=environment(variables or {}),
        stdin=subprocess.DEVNULL,
        capture_output=True,
        text=True,
        check=False,
    )


def _without_result(ended: subprocess.CompletedProcess[str]) -> NotMeasuredError:
    output = f"{ended.stdout[-2000:]}{ended.stderr[-4000:]}"
    return NotMeasuredError(f"no result (exit code {ended.returncode}) from {' '.join(ended.args)}:\n{output}")


@contextmanager
def running(command: Sequence[str], variables: Mapping[str, str]) -> Iterator[subprocess.Popen[bytes]]:
    """Run `command` in the package's environment with `variables` during the block, then kill all of its processes."""
    with tempfile.TemporaryFile() as output:
        process = subprocess.Popen(
            command,
            env={**os.environ, "OMP_NUM_THREADS": "1", "PYTHONPATH": str(_ROOT), **variables},
            stdin=subprocess.DEVNULL,
            stdout=output,
            stderr=output,
            start_new_session=True,
        )
        try:
            yield process
        finally:
            for pid in [process.pid, *descendants(process.pid)]:
                with suppress(ProcessLookupError):
                    os.kill(pid, signal.SIGKILL)
            process.wait()


def descendants(pid: int) -> list[int]:
    """Return the descendants of process `pid`."""
    return [each for child in children_of(pid) for each in (child, *descendants(child))]


def children_of(pid: int) -> list[int]:
    """Return the children of process `pid`."""
    found: list[int] = []
    for children in Path(f"/proc/{pid}/task").glob("*/children"):
        with suppress(FileNotFoundError, ProcessLookupError):
            found += [int(child) for child in children.read_text().split()]
    return found


def environment(variables: Mapping[str, str]) -> dict[str, str]:
    """Return a program's environment: one thread per rank, MPI allowed to run as root, and `variables`."""
    allowed = {"OMPI_ALLOW_RUN_AS_ROOT": "1", "OMPI_ALLOW_RUN_AS_ROOT_CONFIRM": "1"} if os.geteuid() == 0 else {}
    return {**os.environ, "OMP_NUM_THREADS": "1", "OMPI_MCA_mpi_yield_when_idle": "1", **allowed, **variables}


def on_ranks(controller: str, ranks: int, program: Sequence[str]) -> list[str]:
    """Return the command that runs `program` on `ranks` ranks over `controller`: torch, gloo, mpi, or alone."""
    if controller == "torch" and list(program[:3]) == module("dist_train"):
        return [*program[:3], "launch", "-np", str(ranks), *program[3:]]
    return [*_LAUNCHERS[controller](ranks), *program]


def module(name: str, *arguments: object) -> list[str]:
    """Return the command line of a module run by this Python."""
    return [sys.executable, "-m", name, *map(str, arguments)]


def beside_python(name: str) -> str:
    """Return the program `name` beside this Python, or else its bare name, for the PATH."""
    beside = Path(sys.executable).with_name(name)
    return str(beside) if beside.exists() else name


def _alone(ranks: int) -> list[str]:
    assert ranks == 1
    return []


_LAUNCHERS: Mapping[str, Callable[[int], list[str]]] = MappingProxyType(
    {
        "alone": _alone,
        "torch": lambda ranks: [
            beside_python("torchrun"), "--standalone", "--nproc-per-node", str(ranks), "--no-python",
        ],
        "gloo": lambda ranks: [
            beside_python("horovodrun"), "-np", str(ranks), "--gloo", "--network-interface", "lo",
        ],
        "mpi": lambda ranks: [
            beside_python("mpirun"), "-np", str(ranks), "--bind-to", "none", "--oversubscribe",
        ],
    }
)  # fmt: skip
