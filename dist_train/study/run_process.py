"""One run of a sweep as a process of its own: how it is started, asked to stop, and what became of it."""

from __future__ import annotations

import fcntl
import os
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Mapping
from dataclasses import dataclass

from dist_train.outcome import ExitCode
from dist_train.status import read_status
from dist_train.study.planned_runs import Plan, PlannedRun
from dist_train.study.submission import project_root

LOG_FILE = "output.log"
_LOCK_FILE = "sweep.lock"


@dataclass(frozen=True)
class Launcher:
    """How runs are started: on so many ranks each, with so many threads a rank."""

    ranks: int = 1
    threads: int = 1
    to_terminal: bool = False
    """Whether a run's output is shown, and not kept in its logs."""

    def command(self, plan: Plan, run: PlannedRun) -> list[str]:
        """Return the command line of `run`.

        Raises:
            UsageError: several ranks are asked for, but this is no checkout of the project, with its launch scripts.
        """
        if self.ranks == 1:
            program = [sys.executable, "-m", "dist_train"]
        else:
            program = [str(project_root() / "launch" / "local.sh"), "-np", str(self.ranks)]
        # A sweep that is killed takes its runs along: they save and stop.
        guard = ["setpriv", "--pdeathsig", "TERM"] if shutil.which("setpriv") else []
        return [*guard, *program, *train_arguments(plan, run)]

    def environment(self) -> Mapping[str, str]:
        """Return the variables that the run gets."""
        ours = {"OMP_NUM_THREADS": str(self.threads), "DIST_TRAIN_PYTHON": sys.executable}
        return {**ours, **os.environ}


@dataclass(frozen=True)
class Ended:
    """How a run ended: its exit code, and why where that is not 0."""

    run: PlannedRun
    code: int
    reason: str
    seconds: float


def train_arguments(plan: Plan, run: PlannedRun) -> tuple[str, ...]:
    """Return the arguments of `dist-train` that train `run`."""
    return ("train", str(plan.base_file), *run.overrides)


def share_of_threads(jobs: int, ranks: int) -> int:
    """Return the threads of a rank, when so many runs on so many ranks share this machine's cores."""
    return max(1, len(os.sched_getaffinity(0)) // (jobs * ranks))


class RunProcess:
    """A run that has been started."""

    def __init__(self, plan: Plan, run: PlannedRun, launcher: Launcher, lock: int) -> None:
        """Start `run`; `lock` is held as long as it, or we, live."""
        self.run = run
        self._lock = lock
        self._by_script = launcher.ranks > 1
        self._begun = time.monotonic()
        self._before = read_status(run.directory / "status.json")
        self._log = None if launcher.to_terminal else run.directory / "logs" / LOG_FILE
        self._process = self._start(launcher.command(plan, run), launcher.environment())

    def ended(self) -> Ended | None:
        """Return how the run ended; None while it continues."""
        code = self._process.poll()
        if code is None:
            return None
        os.close(self._lock)
        return Ended(self.run, code, "" if code == 0 else self._reason(code), time.monotonic() - self._begun)

    def stop(self) -> None:
        """Ask the run to save and stop."""
        self._process.send_signal(signal.SIGTERM)

    def end(self) -> None:
        """End the run without waiting for it to save."""
        # The launch script takes a second request so, and ends its ranks.
        self._process.send_signal(signal.SIGTERM if self._by_script else signal.SIGKILL)

    def _start(self, command: list[str], environment: Mapping[str, str]) -> subprocess.Popen[bytes]:
        # In a session of its own, a Ctrl-C at the terminal comes to the sweep alone, which hands it on.
        if self._log is None:
            return subprocess.Popen(
                command, env=environment, stdin=subprocess.DEVNULL, pass_fds=[self._lock], start_new_session=True
            )
        self._log.parent.mkdir(mode=0o700, parents=True, exist_ok=True)
        with self._log.open("ab") as log:
            return subprocess.Popen(
                command,
                env=environment,
                stdin=subprocess.DEVNULL,
                stdout=log,
                stderr=subprocess.STDOUT,
                pass_fds=[self._lock],
                start_new_session=True,
            )

    def _reason(self, code: int) -> str:
        status = read_status(self.run.directory / "status.json")
        if status is not None and status != self._before and status.exit_code == code:
            return status.reason
        if code < 0:
            where = f" at step {status.step}" if status is not None and status != self._before else ""
            return f"ended by {signal.Signals(-code).name}{where}"
        if code == ExitCode.STOPPED:
            return "stopped before it began"
        return self._last_words() or f"ended with {code}"

    def _last_words(self) -> str:
        if self._log is None:
            return ""
        try:
            lines = self._log.read_text(encoding="utf-8", errors="replace").split("dist-train: ")[-1].splitlines()
        except OSError:
            return ""
        return " ".join(" ".join(lines[:20]).split())


def take(run: PlannedRun) -> int | None:
    """Return a descriptor that holds `run` for this sweep alone; None where another process holds it."""
    run.directory.mkdir(mode=0o700, parents=True, exist_ok=True)
    descriptor = os.open(run.directory / _LOCK_FILE, os.O_RDWR | os.O_CREAT | os.O_CLOEXEC, 0o600)
    try:
        fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError:
        os.close(descriptor)
        return None
    except OSError:
        # A file system without locks: the run's status alone says whether someone is at it.
        return descriptor
    return descriptor
