"""Cheap real runs: forked from a process that has imported everything, with a step every half second.

`python -m tests.services.paced_runs` reads one JSON request per line and answers with the id of the run's process.
"""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import time
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import dist_train.cluster.torch_engine
import dist_train.launching.run  # noqa: F401
from dist_train.cli.main import main
from dist_train.training.step import TrainingStep, Update

STEP_SECONDS = 0.5
ROOT = Path(__file__).parents[2]


class PacedRuns:
    """Starts runs from its own process, which `close` ends; the runs continue."""

    def __init__(self) -> None:
        environment = {**os.environ, "OMP_NUM_THREADS": "1", "PYTHONPATH": str(ROOT)}
        command = [sys.executable, "-m", __name__]
        self._server = subprocess.Popen(
            command, cwd=ROOT, env=environment, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True
        )

    def start(self, log: Path, *arguments: str, environment: Mapping[str, str] | None = None) -> int:
        """Start `dist-train ARGUMENTS` with its output in `log`; return its process id."""
        assert self._server.stdin is not None
        assert self._server.stdout is not None
        request = {"log": str(log), "arguments": arguments, "environment": dict(environment or {})}
        self._server.stdin.write(json.dumps(request) + "\n")
        self._server.stdin.flush()
        return int(self._server.stdout.readline())

    def close(self) -> None:
        """End the process that starts runs, but not the runs."""
        self._server.communicate()


def _run(log: str, arguments: Sequence[str], environment: Mapping[str, str]) -> None:
    """Turn this process into the run."""
    signal.signal(signal.SIGCHLD, signal.SIG_DFL)
    os.setsid()
    os.dup2(os.open(log, os.O_WRONLY | os.O_CREAT | os.O_APPEND), 1)
    os.dup2(1, 2)
    os.dup2(os.open(os.devnull, os.O_RDONLY), 0)
    os.environ.update(environment)
    step = TrainingStep.__call__

    def paced(self: TrainingStep, *batch: Any) -> Update:
        time.sleep(STEP_SECONDS)
        return step(self, *batch)

    TrainingStep.__call__ = paced  # type: ignore[assignment,method-assign]  # this process is one run
    code = main(list(arguments))
    sys.stdout.flush()
    sys.stderr.flush()
    os._exit(code)


def _serve() -> None:
    signal.signal(signal.SIGCHLD, signal.SIG_IGN)  # runs that end leave no zombies
    for line in sys.stdin:
        request = json.loads(line)
        if (process := os.fork()) == 0:
            _run(request["log"], request["arguments"], request["environment"])
        print(process, flush=True)


if __name__ == "__main__":
    _serve()
