"""Launches whose processes are all found, even if their parents have ended."""

from __future__ import annotations

import os
import signal
import subprocess
import time
import uuid
from collections.abc import Callable, Mapping, Sequence
from contextlib import suppress
from pathlib import Path

from tests.launching import command, environment
from tests.waiting import is_alive

_MARK_VARIABLE = "TORTURE_LAUNCH"
_POLL_SECONDS = 0.02
_SCAN_SECONDS = 0.1


class Launch:
    """`dist-train ARGUMENTS` on so many ranks, of the program in the folder `code`, with its output in `log`."""

    def __init__(
        self,
        ranks: int,
        controller: str,
        arguments: Sequence[str],
        log: Path,
        code: Path,
        extra: Mapping[str, str],
        program: Sequence[str] = ("-m", "dist_train"),
    ) -> None:
        self.ranks = ranks
        self.controller = controller
        self._mark = uuid.uuid4().hex
        self._log = log
        with log.open("wb") as output:
            self._process = subprocess.Popen(
                command(ranks, controller, *arguments, program=program),
                cwd=code,
                env=environment(**extra, **{_MARK_VARIABLE: self._mark}),
                stdin=subprocess.DEVNULL,
                stdout=output,
                stderr=subprocess.STDOUT,
                start_new_session=True,
            )

    @property
    def code(self) -> int | None:
        """The exit code; None while the launch continues."""
        return self._process.poll()

    @property
    def output(self) -> str:
        """The output so far."""
        return self._log.read_text(encoding="utf-8", errors="replace")

    def members(self) -> list[int]:
        """Return all living processes of the launch, including orphans."""
        variable = f"{_MARK_VARIABLE}={self._mark}".encode()
        return sorted(pid for pid in _processes() if variable in _variables(pid) and is_alive(pid))

    def training(self) -> list[int]:
        """Return the training processes, by rank where it is known."""
        return sorted((pid for pid in self.members() if _is_training(pid)), key=_rank)

    def wait(self, seconds: float) -> bool:
        """Wait for the end of the launch; return whether it has ended."""
        return _until(lambda: self.code is not None, seconds)

    def wait_until_gone(self, seconds: float) -> list[int]:
        """Wait for the end of all its processes; return those that are left."""
        _until(lambda: not self.members(), seconds, _SCAN_SECONDS)
        return self.members()

    def kill_all(self) -> None:
        """Send SIGKILL to all processes until none is left."""
        while pids := self.members():
            for pid in pids:
                send(pid, signal.SIGKILL)
            time.sleep(_POLL_SECONDS)
        self._process.wait()


def send(pid: int, number: signal.Signals) -> bool:
    """Send a signal; return whether the process existed."""
    with suppress(ProcessLookupError):
        os.kill(pid, number)
        return True
    return False


def _until(condition: Callable[[], bool], seconds: float, pause: float = _POLL_SECONDS) -> bool:
    deadline = time.monotonic() + seconds
    while not condition():
        if time.monotonic() >= deadline:
            return False
        time.sleep(pause)
    return True


def _processes() -> list[int]:
    return [int(name) for name in os.listdir("/proc") if name.isdecimal()]


def _variables(pid: int) -> list[bytes]:
    try:
        return Path(f"/proc/{pid}/environ").read_bytes().split(b"\0")
    except OSError:
        return []


def _arguments(pid: int) -> list[bytes]:
    try:
        return Path(f"/proc/{pid}/cmdline").read_bytes().split(b"\0")
    except OSError:
        return []


def _is_training(pid: int) -> bool:
    return [each for each in _arguments(pid)[1:5] if each != b"-P"][:3] == [b"-m", b"dist_train", b"train"]


def _rank(pid: int) -> int:
    for variable in _variables(pid):
        name, _, value = variable.partition(b"=")
        if name in (b"HOROVOD_RANK", b"OMPI_COMM_WORLD_RANK", b"RANK"):
            return int(value)
    return 0
