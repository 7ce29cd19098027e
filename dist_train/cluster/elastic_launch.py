"""Ranks on this machine that may die, hang, be restarted and join: `dist-train launch --min-ranks`.

The launcher that begins the run is the coordinator (`MembershipServer`): it alone decides which processes are ranks.
Launchers of other nodes join it (`dist-train launch --join`) over a connection (`RemoteCoordinator`): both prove that
they know the token before the second runs the command that it is sent. Its ranks then connect to the coordinator
themselves; they end if the coordinator is gone or silent. Each launcher manages the processes of its own node.
"""

from __future__ import annotations

import json
import os
import secrets
import signal
import stat
import time
from collections.abc import Iterator, Mapping, Sequence
from contextlib import closing, contextmanager, nullcontext, suppress
from dataclasses import dataclass
from pathlib import Path
from subprocess import Popen

from dist_train.cluster.heartbeats import is_loopback
from dist_train.cluster.launch import TOKEN_VARIABLE
from dist_train.cluster.local_launch import SIGNALS, Ranks, blocked_signals, rank_environment, say, start_rank
from dist_train.cluster.membership import Elasticity
from dist_train.cluster.membership_server import (
    START_TIMEOUTS,
    Coordinator,
    Entry,
    MembershipServer,
    RemoteCoordinator,
)
from dist_train.outcome import ExitCode, FaultError, UsageError
from dist_train.rundir import atomic
from dist_train.rundir.paths import RunDirectory, oserror_to_fault, refusing_unusable
from dist_train.rundir.status import LAUNCH_VARIABLE
from dist_train.start_up import allow_open_files, own_command

_POLL_SECONDS = 0.05
_FIRST_PAUSE_SECONDS = 0.5
_LONGEST_PAUSE_SECONDS = 30.0  # before a restart; doubled after each whose process did not become a rank


def launch_elastic(
    words: Sequence[str], count: int, limits: Elasticity, run: Path, listen: tuple[str, int] | None = None
) -> int:
    """Run `dist-train WORDS` as `count` ranks on this machine until they end, and return the run's exit code.

    Like `launch_ranks`, for the run in the directory `run`, except that the others continue without a lost rank, which
    is restarted. Call it from a process without threads. With an address to `listen` at (port 0: a free one), ranks of
    other nodes may join, or be the only ranks; a file in `run` tells them the address.

    Returns the code with which the ranks ended the run; if none did, that of the first rank that failed and without
    which the run did not continue, 1 if a signal killed it. Raises UsageError if it cannot listen there, or write that
    file.
    """
    launch = os.environ.get(LAUNCH_VARIABLE, "") or secrets.token_hex(8)
    spec = {"words": list(words), "folder": os.getcwd(), "launch": launch, "restarts": limits.restarts}
    host, port = listen or ("127.0.0.1", 0)
    allow_open_files()  # for a connection to each rank
    try:
        server = MembershipServer(limits, host, port, say, here=count, launch_spec=spec)
    except (OSError, OverflowError) as error:
        if listen is None:  # a loopback address that cannot be used is no mistake of the user
            raise
        raise UsageError(
            f"--listen {host}:{port}: this machine cannot listen there ({error}): name one of its addresses that the "
            f"other nodes can reach, and a free port or none",
            code="listen-address",
        ) from error
    with closing(server), _admitting_others(server, run, launch) if listen else nullcontext():
        local = LocalProcesses(words, range(count), launch, Entry(*server.address, server.token), limits.start_with)
        code = _run_ranks(local, server, limits.restarts, run)
        if server.state.generation == 0 and not server.state.has_ended:
            say(f"the run has not begun: there were fewer than the {limits.start_with} ranks that it begins with")
        return code


@contextmanager
def _admitting_others(server: MembershipServer, run: Path, launch: str) -> Iterator[None]:
    """Keep a file, readable by this user alone, by which launchers of other nodes can join during the block."""
    host, port = server.address
    place = f"[{host}]:{port}" if ":" in host else f"{host}:{port}"
    path = run / f"join-{launch}.json"

    def write(nodes: Sequence[str]) -> None:
        content = {"address": place, "token": server.token, "nodes": list(nodes)}
        atomic.write_text(path, json.dumps(content) + "\n")

    def rewrite(nodes: Sequence[str]) -> None:
        with suppress(OSError):  # the file has the address already
            write(nodes)

    with oserror_to_fault(RunDirectory(run)), refusing_unusable(run):
        is_new = not run.exists()
        run.mkdir(mode=0o700, parents=True, exist_ok=True)
        write(())
    if is_loopback(host):
        say(f"only this machine can reach {host}")
    say(f"listens at {place}; other nodes join by: dist-train launch -np N --join {path}")
    server.nodes_changed = rewrite
    try:
        yield
    finally:
        server.nodes_changed = lambda nodes: None
        with suppress(OSError):
            path.unlink()
            if is_new:
                run.rmdir()  # of a run that was refused: otherwise it is not empty


def entry_of(place: str, environment: Mapping[str, str] = os.environ) -> Entry:
    """Return the entry at `place`: HOST:PORT, or the file that the coordinator wrote. Raises UsageError."""
    host, _, port = place.rpartition(":")
    if host and port.isdecimal() and "/" not in host:
        token = environment.get(TOKEN_VARIABLE, "")
        if not token:
            raise UsageError(
                f"--join {place}: the token is missing: set {TOKEN_VARIABLE}, or name the file join-*.json of the run "
                f"directory in place of the address",
                code="join-token",
            )
        return Entry(host.strip("[]"), int(port), token)
    path = Path(place)
    try:
        with atomic.open_regular(path) as file:
            mode = os.fstat(file.fileno()).st_mode
            fields = json.loads(file.read())
        host, _, port = str(fields["address"]).rpartition(":")
        entry = Entry(host.strip("[]"), int(port), str(fields["token"]))
    except (OSError, ValueError, KeyError, TypeError) as error:
        raise UsageError(
            f"--join takes HOST:PORT, or the file join-*.json in the directory of a run whose launcher has --listen "
            f"and is running, not {place} ({getattr(error, 'strerror', None) or 'it is no such file'})",
            code="join-place",
        ) from error
    if mode & (stat.S_IRWXG | stat.S_IRWXO):
        raise UsageError(f"{path}: others can read its token; run: chmod 600 {path}", code="join-token")
    return entry


def launch_joining(entry: Entry, count: int) -> int:
    """Run `count` ranks on this machine until they end, in the run that begins or is under way at `entry`.

    Returns the run's exit code; if the run continues without these ranks, that of the first of them that failed.
    Raises UsageError if nobody answers there, the token is wrong, or the run takes no more ranks; FaultError if the
    connection broke.
    """
    with RemoteCoordinator(entry, count) as coordinator:
        spec = coordinator.await_start()
        try:
            os.chdir(spec["folder"])
        except OSError as error:
            raise UsageError(
                f"the run was started in {spec['folder']}, which this node does not have ({error.strerror}): all "
                f"nodes need the same folders",
                code="join-folder",
            ) from error
        local = LocalProcesses(spec["words"], spec["slots"], spec["launch"], entry, spec["size"])
        return _run_ranks(local, coordinator, spec["restarts"])


@dataclass(frozen=True)
class LocalProcesses:
    """The processes of a launcher: `dist-train WORDS` for each of `slots`, which join `launch`."""

    words: Sequence[str]
    slots: Sequence[int]
    launch: str
    entry: Entry  # of the coordinator
    size: int  # how many ranks the run begins with

    def start(self, index: int, mask: set[int | signal.Signals]) -> Popen[bytes]:
        """Start the process of `slots[index]`; restarted, it keeps that number."""
        numbers = {"RANK": str(self.slots[index]), "WORLD_SIZE": str(self.size), "MASTER_PORT": "0"}
        variables = {**self.entry.variables, **numbers}
        environment = {**os.environ, LAUNCH_VARIABLE: self.launch}
        return start_rank(
            own_command(*self.words), rank_environment(environment, index, len(self.slots), variables), mask
        )


def _run_ranks(local: LocalProcesses, coordinator: Coordinator, restarts: int, run: Path | None = None) -> int:
    """Start the `local` processes, restart each up to `restarts` times, and return the run's exit code when it ends."""
    with blocked_signals() as mask:
        return _ElasticRanks(local, mask, coordinator, restarts).wait_and_record(run, local.launch)


class _ElasticRanks(Ranks):
    """The launcher's processes by index; the process of an index is replaced when it is restarted."""

    _others_continue = True  # and the coordinator expels those that hang

    def __init__(
        self, local: LocalProcesses, mask: set[int | signal.Signals], coordinator: Coordinator, restarts: int
    ) -> None:
        count = len(local.slots)
        super().__init__([local.start(index, mask) for index in range(count)])
        self._local = local
        self._mask = mask
        self._coordinator = coordinator
        self._restarts = restarts
        self._restarted = [0] * count
        self._futile_restarts = [0] * count
        self._restart_due: dict[int, float] = {}
        self._joining = dict.fromkeys(range(count), time.monotonic())
        """Start times of the processes that are not ranks yet."""

    def _is_running(self) -> bool:
        return super()._is_running() or bool(self._restart_due) or self._coordinator.awaits_others

    def _poll(self) -> signal.struct_siginfo | None:
        self._coordinator.poll(_POLL_SECONDS)
        while self._coordinator.expelled:
            slot, pid = self._coordinator.expelled.pop()
            process = self._processes[self._local.slots.index(slot)]
            if process.pid == pid:
                process.kill()
        if self._coordinator.view.stop_requested and self._stop_requested_at is None:
            self._stop_requested_at = time.monotonic()  # announced by the launcher that received the signal
        self._restart_processes()
        self._kill_late_processes()
        self._coordinator.expect(len(self._restart_due) + len(self._processes) - len(self._ended))
        return signal.sigtimedwait(SIGNALS, 0)

    def _note_stop_request(self, name: signal.Signals) -> None:
        super()._note_stop_request(name)
        self._coordinator.ask_to_stop()

    def _restart_processes(self) -> None:
        if self._stop_requested_at is not None or self._has_ended:
            self._restart_due.clear()
        for index in [index for index, due in self._restart_due.items() if time.monotonic() >= due]:
            del self._restart_due[index]
            try:
                self._processes[index] = self._local.start(index, self._mask)
            except FaultError as error:  # of this node: no memory, or a file system that is away
                say(f"a lost rank is not restarted: {error}")
                self._plan_restart(index)
                continue
            self._ended.discard(index)
            self._joining[index] = time.monotonic()

    def _kill_late_processes(self) -> None:
        view = self._coordinator.view
        for index, slot in enumerate(self._local.slots):
            if slot in view.members:
                self._joining.pop(index, None)
            if slot in view.holders:
                self._futile_restarts[index] = 0
        seconds = START_TIMEOUTS * self._coordinator.timeout
        latest = time.monotonic() - seconds
        for index, started in list(self._joining.items()):
            # The coordinator notices silent joiners; processes that begin the run give up by themselves.
            is_late = view.has_state and started < latest and self._local.slots[index] not in view.joiners
            if self._has_ended or is_late:
                if self._has_ended:
                    self._is_terminating = True  # it is killed without a message
                else:
                    say(f"{self._name(index)} has not connected within {seconds:g} s: it is killed")
                del self._joining[index]
                self._processes[index].kill()

    @property
    def _has_ended(self) -> bool:
        view = self._coordinator.view
        return view.has_ended or view.code is not None

    def _name(self, rank: int) -> str:
        return f"a rank (process {self._processes[rank].pid})"

    def _terminate_all(self) -> None:
        super()._terminate_all()
        self._coordinator.abandon()

    def _note_end(self, rank: int, code: int) -> None:
        super()._note_end(rank, code)
        self._coordinator.poll(0.0)  # whether the others continue without it
        self._coordinator.note_code(code)
        self._joining.pop(rank, None)
        is_worthwhile = code != ExitCode.USAGE and self._coordinator.view.has_state and not self._has_ended
        if is_worthwhile:
            self._plan_restart(rank)

    def _plan_restart(self, rank: int) -> None:
        """Restart the process of `rank` after a pause, unless that has been done or tried as often as allowed."""
        if self._restarted[rank] < self._restarts:
            pause = min(_LONGEST_PAUSE_SECONDS, _FIRST_PAUSE_SECONDS * 2 ** self._futile_restarts[rank])
            self._restarted[rank] += 1
            self._futile_restarts[rank] += 1
            self._restart_due[rank] = time.monotonic() + pause

    def _why_none_is_left(self) -> str:
        lost = self._coordinator.state.lost if isinstance(self._coordinator, MembershipServer) else ()
        return "; ".join(lost) or super()._why_none_is_left()

    def _code(self) -> int:
        code = self._coordinator.view.code
        if code is not None:
            return code
        return self._coordinator.first_failure() or self._first_failure or ExitCode.FAULT
