"""Several ranks on this machine that may die, hang, be started anew and join: `dist-train launch --min-ranks`.

The launcher that begins the run is the authority (`MembershipServer`); those of other nodes join it
(`joined_launch.py`). What they do with the processes of their own node is the same, and stands here.
"""

from __future__ import annotations

import ipaddress
import json
import os
import secrets
import signal
import sys
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from pathlib import Path
from subprocess import Popen
from typing import Protocol

from dist_train.cluster.joined_nodes import Expelled, View
from dist_train.cluster.local_launch import STOP_SIGNALS, Ranks, rank_environment, say, start_rank
from dist_train.cluster.membership_server import START_TIMEOUTS, MembershipServer
from dist_train.outcome import ExitCode, UsageError
from dist_train.rundir import atomic
from dist_train.rundir.status import LAUNCH_VARIABLE

_POLL_SECONDS = 0.05
_FIRST_PAUSE_SECONDS = 0.5
_LONGEST_PAUSE_SECONDS = 30.0
"""Between the end of a rank and its next start; twice as long as the one before where that start came to nothing."""


@dataclass(frozen=True)
class Elasticity:
    """The run begins with `first` ranks, continues with `fewest` or more, and takes `most`; each launcher starts a rank
    that is lost anew up to `restarts` times.

    `timeout`: seconds of silence after which a rank is lost.
    """

    first: int
    fewest: int
    most: int
    restarts: int
    timeout: float


@dataclass(frozen=True)
class Entrance:
    """Where launchers of other nodes can join: at the address `host`, which they reach, and `port` (0: a free one).

    `folder`: the run's, for the file with address and token.
    """

    host: str
    port: int
    folder: Path


class Authority(Protocol):
    """Who decides which processes take part, as a launcher of some of them sees it."""

    timeout: float

    @property
    def view(self) -> View:
        """What is known of the run."""

    @property
    def awaits_others(self) -> bool:
        """Whether this launcher must stay for the ranks of others."""

    def poll(self, seconds: float) -> None:
        """Take what has come, waiting up to `seconds` for something."""

    def expect(self, processes: int) -> None:
        """Say how many processes of this launcher are ranks or may become ones."""

    def take_expelled(self) -> list[Expelled]:
        """Return whom of this launcher's processes it has expelled since the last call."""

    def note_code(self, code: int) -> None:
        """Take note of how a process of this launcher has ended."""

    def first_failure(self) -> int | None:
        """Return the exit code of the first rank that failed, if one did."""

    def ask_to_stop(self) -> None:
        """Take note that this launcher was asked to stop the run."""

    def abandon(self) -> None:
        """Wait for nobody else any more."""


def launch_elastic(words: Sequence[str], count: int, elasticity: Elasticity, entrance: Entrance | None = None) -> int:
    """Run `dist-train WORDS` as `count` ranks on this machine to their end, and return the exit code of the run.

    As `launch_ranks`, but for a rank that is lost: the others continue without it, and it is started anew. Call it
    from a process without threads. With an `entrance` ranks of other nodes may join these, or be all that there are.

    Returns:
        How the ranks ended that brought the run to an end; where none did, as `launch_ranks`.

    Raises:
        UsageError: it cannot listen where it should, or write down where that is.
    """
    launch = os.environ.get(LAUNCH_VARIABLE, "") or secrets.token_hex(8)
    environment = {**os.environ, LAUNCH_VARIABLE: launch}
    order = {"words": list(words), "folder": os.getcwd(), "launch": launch, "restarts": elasticity.restarts}
    server = _serve(count, elasticity, entrance, order)
    try:
        with _open_to_others(server, entrance, launch):
            place = {"MASTER_PORT": "0", "WORLD_SIZE": str(elasticity.first)}
            ours = OurProcesses(words, range(count), environment, lambda slot: {**place, **server.variables(slot)})
            code = run_ranks(ours, server, elasticity.restarts)
            if server.state.generation == 0 and not server.state.has_ended:
                say(f"the run has not begun: there were fewer than the {elasticity.first} ranks that it begins with")
            return code
    finally:
        server.close()


def _serve(
    count: int, elasticity: Elasticity, entrance: Entrance | None, order: Mapping[str, object]
) -> MembershipServer:
    limits = elasticity.first, elasticity.fewest, elasticity.most, elasticity.timeout
    if entrance is None:
        return MembershipServer(*limits, say=say)
    try:
        return MembershipServer(*limits, entrance.host, entrance.port, say, here=count, order=order)
    except (OSError, OverflowError) as error:
        raise UsageError(
            f"--listen {entrance.host}:{entrance.port}: this machine cannot listen there ({error}): name an address of "
            f"its own that the other nodes reach, and a free port or none",
            code="listen-address",
        ) from error


@contextmanager
def _open_to_others(server: MembershipServer, entrance: Entrance | None, launch: str) -> Iterator[None]:
    """Write down where others can join, for the user alone to read, and say so; until the block ends."""
    if entrance is None:
        yield
        return
    host, port = server.address
    path = entrance.folder / f"join-{launch}.json"

    def write(nodes: Sequence[str]) -> None:
        content = {"address": f"{host}:{port}", "token": server.token, "nodes": list(nodes)}
        atomic.write_text(path, json.dumps(content) + "\n")

    def rewrite(nodes: Sequence[str]) -> None:
        with suppress(OSError):  # the address is there
            write(nodes)

    try:
        entrance.folder.mkdir(mode=0o700, parents=True, exist_ok=True)
        write(())
    except OSError as error:
        raise UsageError(
            f"{path} cannot be written: {error.strerror or error}; choose another folder by --run-dir",
            code="run-directory-unwritable",
        ) from error
    if ipaddress.ip_address(host).is_loopback:
        say(f"{host} is an address that this machine alone reaches")
    say(f"listens at {host}:{port}; other nodes join by: dist-train launch -np N --join {path}")
    server.nodes_changed = rewrite
    try:
        yield
    finally:
        server.nodes_changed = lambda nodes: None
        with suppress(OSError):
            path.unlink()


@dataclass(frozen=True)
class OurProcesses:
    """How a launcher starts its processes: `dist-train WORDS` for each of `slots`; `place` returns the variables that a
    slot alone has.
    """

    words: Sequence[str]
    slots: Sequence[int]
    environment: Mapping[str, str]
    place: Callable[[int], Mapping[str, str]]

    def start(self, number: int, mask: set[int | signal.Signals]) -> Popen[bytes]:
        """Start the process of the slot with that number."""
        slot = self.slots[number]
        place = {"RANK": str(slot), **self.place(slot)}
        program = [sys.executable, "-m", "dist_train", *self.words]
        return start_rank(program, rank_environment(self.environment, number, len(self.slots), place), mask)


def run_ranks(ours: OurProcesses, authority: Authority, restarts: int) -> int:
    """Start the processes of `ours`, each again up to `restarts` times, and return the run's exit code at its end."""
    watched = STOP_SIGNALS | {signal.SIGCHLD}
    mask = signal.pthread_sigmask(signal.SIG_BLOCK, watched)
    ranks = _ElasticRanks(len(ours.slots), lambda number: ours.start(number, mask), ours.slots, authority, restarts)
    try:
        return ranks.wait(watched)
    finally:
        ranks.kill()
        signal.pthread_sigmask(signal.SIG_SETMASK, mask)


class _ElasticRanks(Ranks):
    """The processes, by their number among those of this launcher; a slot has several one after the other."""

    def __init__(
        self,
        count: int,
        start: Callable[[int], Popen[bytes]],
        slots: Sequence[int],
        authority: Authority,
        restarts: int,
    ) -> None:
        super().__init__([start(number) for number in range(count)])
        self._start = start
        self._slots = slots
        self._authority = authority
        self._restarts = restarts
        self._started = [0] * count
        self._in_vain = [0] * count
        self._due: dict[int, float] = {}
        self._joining = dict.fromkeys(range(count), time.monotonic())
        """When those were started that are not ranks yet."""

    def kill(self) -> None:
        """End whatever still runs."""
        for process in self._processes:
            process.kill()

    def _is_running(self) -> bool:
        return super()._is_running() or bool(self._due) or self._authority.awaits_others

    def _await_signal(self, watched: set[signal.Signals]) -> signal.struct_siginfo | None:
        self._authority.poll(_POLL_SECONDS)
        for expelled in self._authority.take_expelled():
            process = self._processes[self._slots.index(expelled.slot)]
            if process.pid == expelled.process:
                process.kill()
        if self._authority.view.stop_requested and self._asked_at is None:
            self._asked_at = time.monotonic()  # said by the launcher that was asked
        self._start_what_is_due()
        self._end_those_who_do_not_come()
        self._authority.expect(len(self._due) + len(self._processes) - len(self._ended))
        return signal.sigtimedwait(watched, 0)

    def _note_request(self, name: signal.Signals) -> None:
        super()._note_request(name)
        self._authority.ask_to_stop()

    def _start_what_is_due(self) -> None:
        if self._asked_at is not None or self._has_ended:
            self._due.clear()
        for number in [number for number, due in self._due.items() if time.monotonic() >= due]:
            del self._due[number]
            self._processes[number] = self._start(number)
            self._ended.discard(number)
            self._joining[number] = time.monotonic()

    def _end_those_who_do_not_come(self) -> None:
        view = self._authority.view
        for number, slot in enumerate(self._slots):
            if slot in view.members:
                self._joining.pop(number, None)
                self._in_vain[number] = 0
        latest = time.monotonic() - START_TIMEOUTS * self._authority.timeout
        for number, begun in list(self._joining.items()):
            # Of one that has come, silence is noticed; those that begin the run give up by themselves.
            is_late = view.has_state and begun < latest and self._slots[number] not in view.joiners
            if self._has_ended or is_late:
                del self._joining[number]
                self._processes[number].kill()

    @property
    def _has_ended(self) -> bool:
        view = self._authority.view
        return view.has_ended or view.code is not None

    def _name(self, rank: int) -> str:
        return f"a rank (process {self._processes[rank].pid})"

    def _end_the_lost(self) -> None:
        """Nobody: who hangs is expelled."""

    def _end_all(self) -> None:
        super()._end_all()
        self._authority.abandon()

    def _note_end(self, rank: int, code: int) -> None:
        super()._note_end(rank, code)
        self._authority.note_code(code)
        self._joining.pop(rank, None)
        is_worthwhile = code != ExitCode.USAGE and self._authority.view.has_state and not self._has_ended
        if is_worthwhile and self._started[rank] < self._restarts:
            pause = min(_LONGEST_PAUSE_SECONDS, _FIRST_PAUSE_SECONDS * 2 ** self._in_vain[rank])
            self._started[rank] += 1
            self._in_vain[rank] += 1
            self._due[rank] = time.monotonic() + pause

    def _code(self) -> int:
        code = self._authority.view.code
        if code is not None:
            return code
        return self._first_failure or self._authority.first_failure() or ExitCode.FAULT
