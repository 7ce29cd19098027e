"""Launches whose every process can be found again, whatever has become of its parent."""

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

_MARK = "TORTURE_LAUNCH"
_POLL_SECONDS = 0.02
_SCAN_SECONDS = 0.1


class Launch:
    """`dist-train ARGUMENTS`, of the program in the folder `code`, on so many ranks; its output in a file."""

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
                env=environment(**extra, **{_MARK: self._mark}),
                stdin=subprocess.DEVNULL,
                stdout=output,
                stderr=subprocess.STDOUT,
                start_new_session=True,
            )

    @property
    def launcher(self) -> int:
        """The process that was started."""
        return self._process.pid

    @property
    def code(self) -> int | None:
        """The exit code; None while the launch continues."""
        return self._process.poll()

    @property
    def output(self) -> str:
        """What has been printed."""
        return self._log.read_text(encoding="utf-8", errors="replace")

    def members(self) -> list[int]:
        """Return every living process of the launch, also those whose parent has gone."""
        sought = f"{_MARK}={self._mark}".encode()
        return sorted(pid for pid in _processes() if sought in _variables(pid) and _lives(pid))

    def training(self) -> list[int]:
        """Return the processes that train, by rank as far as they say."""
        return sorted((pid for pid in self.members() if _trains(pid)), key=_rank)

    def wait(self, seconds: float) -> bool:
        """Wait until the launch has ended; whether it has."""
        return _until(lambda: self.code is not None, seconds)

    def wait_until_gone(self, seconds: float) -> list[int]:
        """Wait until none of its processes is left; return those that are."""
        _until(lambda: not self.members(), seconds, _SCAN_SECONDS)
        return self.members()

    def kill_all(self) -> None:
        """SIGKILL every process at once."""
        while pids := self.members():
            for pid in pids:
                send(pid, signal.SIGKILL)
            time.sleep(_POLL_SECONDS)
        self._process.wait()


def send(pid: int, number: signal.Signals) -> bool:
    """Send a signal; whether there was still somebody to take it."""
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


def _words(pid: int) -> list[bytes]:
    try:
        return Path(f"/proc/{pid}/cmdline").read_bytes().split(b"\0")
    except OSError:
        return []


def _lives(pid: int) -> bool:
    try:
        return Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0] not in "ZX"
    except OSError:
        return False


def _trains(pid: int) -> bool:
    words = _words(pid)
    return words[1:4] == [b"-m", b"dist_train", b"train"]


def _rank(pid: int) -> int:
    for variable in _variables(pid):
        name, _, value = variable.partition(b"=")
        if name in (b"HOROVOD_RANK", b"OMPI_COMM_WORLD_RANK", b"RANK"):
            return int(value)
    return 0
