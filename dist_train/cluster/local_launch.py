"""Several ranks on this machine by torch.distributed: what `dist-train launch` does."""

from __future__ import annotations

import ctypes
import os
import secrets
import signal
import socket
import subprocess
import sys
import time
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path

from dist_train.cluster.launch import LISTEN_FD
from dist_train.outcome import ExitCode

STOP_SIGNALS = {signal.SIGTERM, signal.SIGINT, signal.SIGUSR1, signal.SIGUSR2, signal.SIGHUP}
_INSISTING = {signal.SIGTERM, signal.SIGINT}
_INSIST_SECONDS = 2.0
"""A second signal that comes sooner is taken for the same request."""
_LOOK_SECONDS = 0.2
_LOSS_SECONDS = 40.0
"""After one rank has failed: the watchdogs of the others notice, and rank 0 writes how the run ended."""
_STUCK_SECONDS = 3.0
"""For ranks that will not end by themselves: rank 0 alone writes, so what is left when it has ended hangs, as does what
SIGSTOP has stopped."""
_TERMINATE_SECONDS = 2.0
_PR_SET_PDEATHSIG = 1
_OTHER_LAUNCHERS = ("OMPI_", "PMIX_", "HOROVOD_RANK", "HOROVOD_SIZE", "TORCHELASTIC_")


def launch_ranks(command: Sequence[str], size: int) -> int:
    """Run `command` as `size` ranks on this machine to their end, and return the exit code of the launch.

    SIGTERM, SIGINT, SIGHUP, SIGUSR1 and SIGUSR2 ask the ranks to save and stop; a second SIGTERM or SIGINT ends them.
    When one rank fails, the others end by themselves; one that does not is ended. Call it from a process without
    threads.

    Returns:
        What the first rank to fail returned; 1 where a signal ended it; 0 where none failed.
    """
    watched = STOP_SIGNALS | {signal.SIGCHLD}
    mask = signal.pthread_sigmask(signal.SIG_BLOCK, watched)
    environment = {"DIST_TRAIN_LAUNCH": secrets.token_hex(8), **os.environ}
    with socket.create_server(("127.0.0.1", 0), backlog=max(128, size)) as listener:
        place = {"MASTER_PORT": str(listener.getsockname()[1])}
        ranks = [
            start_rank(command, rank_environment(environment, rank, size, place), mask, listener.fileno())
            for rank in range(size)
        ]
    try:
        return Ranks(ranks).wait(watched)
    finally:
        for rank in ranks:
            rank.kill()
        signal.pthread_sigmask(signal.SIG_SETMASK, mask)


class Ranks:
    """The processes of a launch, by rank: waits for their end, and passes on requests to stop."""

    def __init__(self, processes: Sequence[subprocess.Popen[bytes]]) -> None:
        self._processes = list(processes)
        self._first_failure: int | None = None
        self._deadline: float | None = None
        self._asked_at: float | None = None
        self._asked: set[int] = set()
        self._ended: set[int] = set()
        self._is_ending = False

    def wait(self, watched: set[signal.Signals]) -> int:
        """Return the exit code of the launch once all have ended."""
        while self._is_running():
            received = self._await_signal(watched)
            if received is not None and received.si_signo in STOP_SIGNALS:
                self._note_request(signal.Signals(received.si_signo))
            self._collect()
            if self._asked_at is not None:
                self._ask_to_stop()
            self._end_the_lost()
            if self._deadline is not None and (0 in self._ended or self._are_stopped()):
                self._deadline = min(self._deadline, time.monotonic() + _STUCK_SECONDS)
            if self._deadline is not None and time.monotonic() > self._deadline:
                self._end_all()
        return self._code()

    def _is_running(self) -> bool:
        return len(self._ended) < len(self._processes)

    def _await_signal(self, watched: set[signal.Signals]) -> signal.struct_siginfo | None:
        return signal.sigtimedwait(watched, _LOOK_SECONDS)

    def _end_the_lost(self) -> None:
        """Give the others a time to end by themselves once one has failed."""
        if self._first_failure is not None and self._deadline is None:
            self._deadline = time.monotonic() + _LOSS_SECONDS

    def _code(self) -> int:
        return self._first_failure or ExitCode.FINISHED

    def _note_request(self, name: signal.Signals) -> None:
        now = time.monotonic()
        if self._asked_at is None:
            self._asked_at = now
            say("asked to stop: the ranks save and end")
        elif name in _INSISTING and now - self._asked_at >= _INSIST_SECONDS:
            say("asked again: ending the ranks without waiting for them")
            self._deadline = now

    def _collect(self) -> None:
        for rank, process in enumerate(self._processes):
            code = process.poll()
            if code is None or rank in self._ended:
                continue
            self._ended.add(rank)
            if code < 0 and not self._is_ending:
                say(f"{self._name(rank)} was killed by {signal.Signals(-code).name}")
            self._note_end(rank, code)

    def _name(self, rank: int) -> str:
        return f"rank {rank} (process {self._processes[rank].pid})"

    def _note_end(self, rank: int, code: int) -> None:
        if code != 0 and self._first_failure is None:
            self._first_failure = code if code > 0 else ExitCode.FAULT

    def _are_stopped(self) -> bool:
        """Whether all ranks that are left were stopped by a signal, and can notice nothing."""
        left = [process.pid for process in self._processes if process.poll() is None]
        return all(_status_field(process, "State").startswith("T") for process in left)

    def _ask_to_stop(self) -> None:
        """Ask each rank once it can be asked: before it catches the signal it would die of it."""
        for rank, process in enumerate(self._processes):
            if rank not in self._asked and process.poll() is None and _catches(process.pid, signal.SIGUSR2):
                process.send_signal(signal.SIGUSR2)
                self._asked.add(rank)

    def _end_all(self) -> None:
        self._is_ending = True
        left = [process for process in self._processes if process.poll() is None]
        for process in left:
            process.terminate()
        until = time.monotonic() + _TERMINATE_SECONDS
        for process in left:
            try:
                process.wait(max(0.0, until - time.monotonic()))
            except subprocess.TimeoutExpired:
                process.kill()
                process.wait()


@contextmanager
def threads_without_signals() -> Iterator[None]:
    """Let threads that libraries begin in the block never take the launcher's signals, of which they would die."""
    mask = signal.pthread_sigmask(signal.SIG_BLOCK, STOP_SIGNALS | {signal.SIGCHLD})
    try:
        yield
    finally:
        signal.pthread_sigmask(signal.SIG_SETMASK, mask)


def rank_environment(environment: Mapping[str, str], rank: int, size: int, place: Mapping[str, str]) -> dict[str, str]:
    """Return the environment of a rank: torch's own variables, threads, nothing of another launcher; `place`: where the
    ranks meet.
    """
    kept = {name: value for name, value in environment.items() if not name.startswith(_OTHER_LAUNCHERS)}
    threads = max(1, len(os.sched_getaffinity(0)) // size)
    kept.setdefault("OMP_NUM_THREADS", str(threads))
    number = {"RANK": rank, "WORLD_SIZE": size, "LOCAL_RANK": rank, "LOCAL_WORLD_SIZE": size}
    return {**kept, **{name: str(value) for name, value in number.items()}, "MASTER_ADDR": "127.0.0.1", **place}


def start_rank(
    command: Sequence[str],
    environment: Mapping[str, str],
    mask: set[int | signal.Signals],
    listen_fd: int | None = None,
) -> subprocess.Popen[bytes]:
    """Start `command`, which dies with this process; rank 0 gets the listening socket `listen_fd`, if there is one."""
    parent, libc = os.getpid(), ctypes.CDLL(None)
    fd = listen_fd if listen_fd is not None and environment["RANK"] == "0" else None

    def prepare() -> None:
        signal.pthread_sigmask(signal.SIG_SETMASK, mask)
        libc.prctl(_PR_SET_PDEATHSIG, signal.SIGKILL)
        if os.getppid() != parent:
            os._exit(ExitCode.FAULT)

    return subprocess.Popen(
        command,
        stdin=subprocess.DEVNULL,
        env={**environment, LISTEN_FD: str(-1 if fd is None else fd)},
        pass_fds=() if fd is None else (fd,),
        start_new_session=True,  # Ctrl-C at a terminal is for the launcher alone
        preexec_fn=prepare,  # there are no threads
    )


def _catches(process: int, name: signal.Signals) -> bool:
    return bool(int(_status_field(process, "SigCgt") or "0", 16) >> (name - 1) & 1)


def _status_field(process: int, name: str) -> str:
    """Return a field of /proc/PID/status; nothing where the process has ended."""
    try:
        lines = Path(f"/proc/{process}/status").read_text().splitlines()
    except OSError:
        return ""
    return next((line.partition(":")[2].strip() for line in lines if line.startswith(f"{name}:")), "")


def say(text: str) -> None:
    """Print what the launcher does, for those who watch it."""
    print(f"dist-train launch: {text}", file=sys.stderr, flush=True)
