"""Several ranks on this machine over torch.distributed: `dist-train launch`."""

from __future__ import annotations

import ctypes
import os
import secrets
import signal
import socket
import subprocess
import time
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path

from dist_train.cluster.launch import LISTEN_FD, without_launcher
from dist_train.outcome import ExitCode, FaultError, printable, say_on_stderr, signal_name
from dist_train.rundir.paths import RunDirectory
from dist_train.rundir.status import LAUNCH_VARIABLE, read_status, record_lost
from dist_train.start_up import stop_ignoring_sigchld, usable_cores

_STOP_SIGNALS = {signal.SIGTERM, signal.SIGINT, signal.SIGUSR1, signal.SIGUSR2, signal.SIGHUP}
SIGNALS = _STOP_SIGNALS | {signal.SIGCHLD}
_INSISTING = {signal.SIGTERM, signal.SIGINT}
_INSIST_SECONDS = 2.0  # a second signal that comes sooner counts as the same request
_POLL_SECONDS = 0.2
_LOSS_SECONDS = 40.0  # for the others to end after a failure: watchdogs notice, rank 0 records the end
_STUCK_SECONDS = 3.0  # for ranks that will not end themselves: after rank 0, the only writer, or stopped by SIGSTOP
_TERMINATE_SECONDS = 2.0
_PR_SET_PDEATHSIG = 1


def launch_ranks(command: Sequence[str], size: int, run: Path | None = None, *, saves: bool = True) -> int:
    """Run `command` as `size` ranks on this machine until they end, and return the exit code of the launch.

    SIGTERM, SIGINT, SIGHUP, SIGUSR1 and SIGUSR2 ask the ranks to save and stop; a second SIGTERM or SIGINT ends them,
    and so does the first signal if `command` does not save on request. When one rank fails, the others end by
    themselves, or are terminated. If none of them could record in the status of the directory `run` how the launch
    ended, this does. Call it from a process without threads.
    Returns the exit code that the status has. Without one, that of the first rank that failed, 1 if a signal killed it;
    0 if none failed.
    """
    environment = {LAUNCH_VARIABLE: secrets.token_hex(8), **os.environ}
    with blocked_signals() as mask:
        with socket.create_server(("127.0.0.1", 0), backlog=max(128, size)) as listener:
            port, fd = {"MASTER_PORT": str(listener.getsockname()[1])}, listener.fileno()
            ranks = [
                start_rank(command, rank_environment(environment, rank, size, port), mask, fd if rank == 0 else -1)
                for rank in range(size)
            ]
        return Ranks(ranks, saves).wait_and_record(run, environment[LAUNCH_VARIABLE])


class Ranks:
    """The processes of a launch, by rank: waits until they end, and forwards requests to stop."""

    _others_continue = False  # after one has failed; otherwise they have a limited time to end, too

    def __init__(self, processes: Sequence[subprocess.Popen[bytes]], saves: bool = True) -> None:
        self._processes = list(processes)
        self._saves = saves
        self._first_failure: int | None = None
        self._deadline: float | None = None
        self._stop_requested_at: float | None = None  # by this launcher's first signal, or another launcher
        self._first_signal_at: float | None = None
        self._signalled: set[int] = set()
        self._ended: set[int] = set()
        self._is_terminating = False
        self._first_end = ""  # of a rank that failed, for people

    def wait_and_record(self, run: Path | None, launch: str) -> int:
        """Wait; if no rank of `launch` has recorded an end in the status of `run`, record that all are lost.

        Returns the exit code that the status has; without one, that of the first rank that failed.
        """
        code = self.wait()
        if run is not None:
            path = RunDirectory(run).status
            status = read_status(path)
            if status is not None and status.launch == launch and status.exit_code is not None:
                code = status.exit_code  # which a rank does not change that dies while rank 0 waits for a last scrape
            record_lost(path, launch, f"no rank is left: {self._why_none_is_left()}")
        while signal.sigtimedwait(_STOP_SIGNALS, 0):  # requests to stop that came too late must not kill this process
            pass
        return code

    def _why_none_is_left(self) -> str:
        return self._first_end

    def wait(self) -> int:
        """Return the exit code of the launch once all have ended; if that fails, kill what still runs."""
        try:
            while self._is_running():
                received = self._poll()
                if received is not None and received.si_signo in _STOP_SIGNALS:
                    self._note_stop_request(signal.Signals(received.si_signo))
                self._collect()
                if self._stop_requested_at is not None:
                    self._ask_to_stop()
                if self._first_failure is not None and self._deadline is None and not self._others_continue:
                    self._deadline = time.monotonic() + _LOSS_SECONDS
                if self._deadline is not None and (0 in self._ended or self._are_stopped()):
                    self._deadline = min(self._deadline, time.monotonic() + _STUCK_SECONDS)
                if self._deadline is not None and time.monotonic() > self._deadline:
                    self._terminate_all()
            return self._code()
        finally:
            for process in self._processes:
                process.kill()

    def _is_running(self) -> bool:
        return len(self._ended) < len(self._processes)

    def _poll(self) -> signal.struct_siginfo | None:
        return signal.sigtimedwait(SIGNALS, _POLL_SECONDS)

    def _code(self) -> int:
        return self._first_failure or ExitCode.FINISHED

    def _note_stop_request(self, name: signal.Signals) -> None:
        now = time.monotonic()
        if not self._saves:
            say("asked to stop: ending the ranks")
            self._deadline = now
        elif self._first_signal_at is None:
            self._first_signal_at = now
            self._stop_requested_at = self._stop_requested_at or now
            say("asked to stop: the ranks save and end")
        elif name in _INSISTING and now - self._first_signal_at >= _INSIST_SECONDS:
            say("asked again: ending the ranks without waiting for them")
            self._deadline = now

    def _collect(self) -> None:
        codes = {rank: process.poll() for rank, process in enumerate(self._processes) if rank not in self._ended}
        # Of those that have ended since the last look, who ended with 1 may have done so because another had failed.
        for rank, code in sorted(codes.items(), key=lambda each: each[1] == ExitCode.FAULT):
            if code is None:
                continue
            self._ended.add(rank)
            how = f"was killed by {signal_name(-code)}" if code < 0 else f"ended with code {code}"
            end = f"{self._name(rank)} {how}"
            self._first_end = self._first_end or (end if code else "")
            if code < 0 and not self._is_terminating:
                say(end)
            self._note_end(rank, code)

    def _name(self, rank: int) -> str:
        return f"rank {rank} (process {self._processes[rank].pid})"

    def _note_end(self, rank: int, code: int) -> None:
        if code != 0 and self._first_failure is None:
            self._first_failure = code if code > 0 else ExitCode.FAULT

    def _are_stopped(self) -> bool:
        """Whether a signal has stopped all remaining ranks, so that they notice nothing."""
        running = [process.pid for process in self._processes if process.poll() is None]
        return all(_status_field(process, "State").startswith("T") for process in running)

    def _ask_to_stop(self) -> None:
        """Signal each rank once it has installed its handler: before that the signal would kill it."""
        for rank, process in enumerate(self._processes):
            if rank not in self._signalled and process.poll() is None and _catches(process.pid, signal.SIGUSR2):
                process.send_signal(signal.SIGUSR2)
                self._signalled.add(rank)

    def _terminate_all(self) -> None:
        self._is_terminating = True
        running = [process for process in self._processes if process.poll() is None]
        for process in running:
            process.terminate()
        until = time.monotonic() + _TERMINATE_SECONDS
        for process in running:
            try:
                process.wait(max(0.0, until - time.monotonic()))
            except subprocess.TimeoutExpired:
                process.kill()
                process.wait()


@contextmanager
def blocked_signals() -> Iterator[set[int | signal.Signals]]:
    """Block the launcher's signals, also in threads that start in the block; yield the mask before it.

    SIGINT and SIGHUP that are ignored, as under nohup, stay so: blocked, they would arrive.
    """
    stop_ignoring_sigchld()
    ignored = {each for each in (signal.SIGINT, signal.SIGHUP) if signal.getsignal(each) == signal.SIG_IGN}
    mask = signal.pthread_sigmask(signal.SIG_BLOCK, SIGNALS - ignored)
    try:
        yield mask
    finally:
        signal.pthread_sigmask(signal.SIG_SETMASK, mask)


def rank_environment(environment: Mapping[str, str], rank: int, size: int, more: Mapping[str, str]) -> dict[str, str]:
    """Return a rank's environment: `environment` without other launchers' variables, torch's own, threads, and `more`,
    such as where the ranks meet.
    """
    kept = without_launcher(environment)
    threads = max(1, usable_cores() // size)
    kept.setdefault("OMP_NUM_THREADS", str(threads))
    numbers = {"RANK": rank, "WORLD_SIZE": size, "LOCAL_RANK": rank, "LOCAL_WORLD_SIZE": size}
    return {**kept, **{name: str(value) for name, value in numbers.items()}, "MASTER_ADDR": "127.0.0.1", **more}


def start_rank(
    command: Sequence[str],
    environment: Mapping[str, str],
    mask: set[int | signal.Signals],
    listen_fd: int = -1,
) -> subprocess.Popen[bytes]:
    """Start `command`, which is killed when this process ends; it gets the listening socket `listen_fd` (-1: none).

    Raises FaultError if the system starts no process.
    """
    parent, libc = os.getpid(), ctypes.CDLL(None)

    def prepare() -> None:
        signal.pthread_sigmask(signal.SIG_SETMASK, mask)
        libc.prctl(_PR_SET_PDEATHSIG, signal.SIGKILL)
        if os.getppid() != parent:
            os._exit(ExitCode.FAULT)

    try:
        return subprocess.Popen(
            command,
            stdin=subprocess.DEVNULL,
            env={**environment, LISTEN_FD: str(listen_fd)},
            pass_fds=() if listen_fd < 0 else (listen_fd,),
            start_new_session=True,  # Ctrl-C at a terminal reaches the launcher alone
            preexec_fn=prepare,  # safe without threads
        )
    except (OSError, subprocess.SubprocessError) as error:
        raise FaultError(
            f"the process of a rank cannot be started ({error}): start fewer ranks, end other programs, or raise this "
            f"node's limits of memory and processes",
            code="rank-not-started",
        ) from error


def _catches(process: int, name: signal.Signals) -> bool:
    return bool(int(_status_field(process, "SigCgt") or "0", 16) >> (name - 1) & 1)


def _status_field(process: int, name: str) -> str:
    """Return a field of /proc/PID/status; empty if the process has ended."""
    try:
        lines = Path(f"/proc/{process}/status").read_text().splitlines()
    except OSError:
        return ""
    return next((line.partition(":")[2].strip() for line in lines if line.startswith(f"{name}:")), "")


def say(text: str) -> None:
    """Print a message of the launcher to standard error, if that can be written."""
    say_on_stderr(f"dist-train launch: {printable(text)}")
