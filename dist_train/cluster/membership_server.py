"""The coordinator of an elastic launch: it watches the processes of the launch and decides which of them are ranks.

One object in the loop of the launcher that began the run, without a thread. Ranks, and the launchers of other nodes
(`RemoteCoordinator`), connect by TCP and send JSON, one object a line; a process that does not know the launch's token
is disconnected. A process whose connection breaks has died; one that is silent for `timeout`, or reports that its main
thread does not move on, hangs.

A launcher uses either: the `MembershipServer` of its own, or a `RemoteCoordinator`, which stands for that of another.
"""

from __future__ import annotations

import math
import os
import secrets
import select
import socket
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from itertools import count, islice
from typing import Any, TypeAlias

from pydantic import TypeAdapter

from dist_train.cluster import membership
from dist_train.cluster.heartbeats import BEATS_IN_TIMEOUT, SuspensionDetector, longest_wait
from dist_train.cluster.launch import MEMBERSHIP_VARIABLE, TOKEN_VARIABLE
from dist_train.cluster.local_launch import say
from dist_train.cluster.membership import Elasticity, Event, Membership, P, Peer, decide
from dist_train.cluster.messages import MessageConnection, MessageServer
from dist_train.outcome import ExitCode, FaultError, UsageError

ENDS_OF_A_RUN = (ExitCode.FINISHED, ExitCode.STOPPED, ExitCode.DIVERGED, ExitCode.DISAGREEMENT)
"""Exit codes that all ranks agree on: a rank that ends with one is not lost. The first that a rank has is the run's."""

_WAIT_SECONDS = 1.0  # before a launcher that joins says that it waits
START_TIMEOUTS = 4  # timeouts that a process has to connect, once it is started or awaited; loading torch takes seconds


@dataclass(frozen=True)
class View:
    """What a launcher knows of the run."""

    members: tuple[int, ...] = ()  # slots whose processes are ranks
    joiners: tuple[int, ...] = ()  # slots whose processes wait to become ranks
    holders: tuple[int, ...] = ()  # slots whose processes hold the run's state, in a group that has worked
    has_state: bool = False
    has_ended: bool = False  # the run cannot continue
    code: int | None = None  # the run's exit code, once a rank has ended with one that all ranks share
    stop_requested: bool = False  # all ranks are to save and stop


_VIEW = TypeAdapter(View)


@dataclass
class JoinedNode:
    """The launcher of `node`, connected for `wanted` ranks."""

    node: str
    process: int
    wanted: int
    slots: tuple[int, ...] = ()  # once it may start its ranks
    processes: int = 0  # how many of them are ranks or may become ranks
    sent_view: View | None = None  # the last one
    sent_at: float = 0.0

    @property
    def name(self) -> str:
        """Its identifier in messages."""
        return f"the launcher on {self.node} (process {self.process})"


@dataclass
class MembershipServer:
    """Serves until `close`; `poll` must be called at least every tenth of a second."""

    limits: Elasticity
    host: str = "127.0.0.1"
    port: int = 0
    say: Callable[[str], None] = lambda text: None
    token: str = field(default_factory=lambda: secrets.token_hex(32))
    here: int | None = None  # processes of this launcher, in slots 0, 1, ..., with which the run begins (None: all)
    launch_spec: Mapping[str, Any] = field(default_factory=dict)  # what a launcher of another node needs to start ranks
    nodes_changed: Callable[[Sequence[str]], None] = lambda nodes: None  # called with the nodes that are connected

    def __post_init__(self) -> None:
        self.state = Membership(self.limits)
        self.view = View()  # what launchers know of it
        self.timeout = self.limits.timeout
        self._here = self.limits.start_with if self.here is None else self.here
        self._own_slots = range(self._here)
        self._nodes: dict[int, JoinedNode] = {}  # the launchers of other nodes, by connection
        self._codes: list[int] = []
        self._survived = 0  # how many of them are of ranks without which the run continued
        self._alone_since = time.monotonic()
        self._server = MessageServer((self.host, self.port), self.token, self._handle, self._lose)
        self._stopping_since: dict[int, float] = {}  # when ranks that still work were told to stop, by connection
        self.expelled: list[tuple[int, int]] = []  # slots and processes of this launcher: they must not write any more
        self._suspensions = SuspensionDetector(self.timeout / BEATS_IN_TIMEOUT, time.monotonic())

    @property
    def address(self) -> tuple[str, int]:
        """Host and port where it listens."""
        return self._server.address

    def poll(self, seconds: float) -> None:
        """Handle the messages that have arrived, waiting up to `seconds` for one, and expel silent processes."""
        self._server.poll(seconds)
        now = time.monotonic()
        self._expel_silent(now)
        self._start_nodes()
        self._send_views(now)

    @property
    def expected(self) -> int:
        """How many processes are ranks or may become ranks, on all nodes."""
        return self._here + sum(node.processes for node in self._nodes.values())

    @property
    def awaits_others(self) -> bool:
        """Whether other nodes have ranks, or those that the run begins with may still come."""
        if self.expected > self._here:
            return True
        is_late = time.monotonic() - self._alone_since > START_TIMEOUTS * self.timeout
        may_begin = self.state.generation == 0 and not self.state.has_ended and self.view.code is None
        return may_begin and self._here < self.limits.start_with and not is_late

    def expect(self, processes: int) -> None:
        """Report how many of this launcher's processes are ranks or may become ranks."""
        self._here = processes
        may_grow = self.expected > len(self.state.members)
        if may_grow != self.state.may_grow:
            self._apply(membership.set_may_grow, may_grow)

    def note_code(self, code: int) -> None:
        """Record the exit code of a process, of this launcher or that of another node."""
        self._codes.append(code)
        if self.state.has_state and not (self.state.is_forming or self.state.has_ended):
            self._survived = len(self._codes)
        self._update_view()

    def first_failure(self) -> int | None:
        """Return the exit code of the first rank that failed and without which the run did not continue, if any."""
        codes = (*self._codes[self._survived :], *self._codes)
        return next((code if code > 0 else int(ExitCode.FAULT) for code in codes if code != 0), None)

    def ask_to_stop(self) -> None:
        """Make all launchers ask their ranks to save and stop; a run that has not begun just ends."""
        self._apply(membership.request_stop)
        if self.state.generation == 0:
            self.note_code(ExitCode.STOPPED)

    def abandon(self) -> None:
        """Disconnect the launchers of other nodes, which then end their ranks."""
        for connection in list(self._nodes):
            self._lose(connection, "")

    def close(self) -> None:
        """Close all connections; remaining ranks then end."""
        self._server.close()

    def _handle(self, peer_id: int, fields: Mapping[str, Any]) -> None:
        node = self._nodes.get(peer_id)
        match fields["kind"]:
            case "hello" if node is None and self.state.find(peer_id) is None:
                self._admit(peer_id, fields)
            case "processes" if node is not None:
                node.processes = int(fields["count"])
            case "ended" if node is not None:
                self.note_code(int(fields["code"]))
            case "stop" if node is not None:
                self.ask_to_stop()
            case "leave":
                self._lose(peer_id, str(fields["why"]) if node is None else "")
            case "ready" if node is None:
                host, port = fields["store"]
                store = (str(host), int(port))
                self._apply(membership.mark_ready, peer_id, int(fields["generation"]), str(fields["why"]), store)
            case "trains" if node is None:
                self._apply(membership.note_training, peer_id, bool(fields["works"]))
            case "hangs" if node is None:
                self._expel(peer_id, f"has not moved on for {self.timeout:g} s")

    def _admit(self, peer_id: int, fields: Mapping[str, Any]) -> None:
        node, process = str(fields["node"]), int(fields["process"])
        if "ranks" in fields:
            self._admit_node(peer_id, JoinedNode(node, process, int(fields["ranks"])))
            return
        slot = int(fields["slot"])
        if slot not in self._own_slots and self._owner(slot) is None:
            self._server.drop(peer_id)  # its launcher is gone
            return
        joins = self.state.generation > 0
        self._apply(membership.connect, Peer(peer_id, slot, node, process))
        self._server.send(peer_id, {"kind": "welcome", "joins": joins, "most": self.limits.max_ranks})

    def _admit_node(self, peer_id: int, node: JoinedNode) -> None:
        self._server.send(peer_id, {"kind": "limits", "timeout": self.timeout})
        if why := self._refusal(node.wanted):
            self.say(f"{node.name} may not join: {why}")
            self._server.send(peer_id, {"kind": "refused", "why": why})
            self._server.drop(peer_id)
            return
        self._nodes[peer_id] = node
        self._note_nodes()

    def _refusal(self, wanted: int) -> str:
        """Return why a launcher with `wanted` more ranks may not join; empty if it may."""
        if self.state.is_over or self.state.has_ended:
            return "the run has ended"
        promised = sum(node.processes if node.slots else node.wanted for node in self._nodes.values())
        free = self.limits.max_ranks - self._here - promised
        if wanted <= free:
            return ""
        more = f"{free} more rank{'' if free == 1 else 's'}" if free > 0 else "no more ranks"
        return f"the run takes {more}, not {wanted}: it has at most {self.limits.max_ranks} (--max-ranks)"

    def _note_nodes(self) -> None:
        self.nodes_changed(sorted(node.node for node in self._nodes.values()))

    def _owner(self, slot: int) -> int | None:
        """Return the connection of the launcher whose `slot` it is; None if it is this launcher's, or that is gone."""
        return next((connection for connection, node in self._nodes.items() if slot in node.slots), None)

    def _start_nodes(self) -> None:
        """Let the waiting launchers of other nodes start their ranks, if they may."""
        if self.state.stop_requested or self.state.is_over or self.state.has_ended:
            return
        has_begun = self.state.generation > 0 and self.state.has_state
        for connection, node in self._nodes.items():
            if node.slots or not (has_begun or self.expected + node.wanted <= self.limits.start_with):
                continue
            others = (slot for other in self._nodes.values() for slot in other.slots)
            taken = {*self._own_slots, *(peer.slot for peer in self.state.peers), *others}
            node.slots = tuple(islice((slot for slot in count() if slot not in taken), node.wanted))
            node.processes = node.wanted
            self.say(f"{node.name} starts {node.wanted} rank{'s' if node.wanted > 1 else ''}")
            welcome = {"kind": "welcome", "slots": node.slots, "size": self.limits.start_with}
            self._server.send(connection, {**welcome, **self.launch_spec})

    def _send_views(self, now: float) -> None:
        """Send the launchers of other nodes the view of the run when it changes, and regularly as a heartbeat."""
        for connection, node in self._nodes.items():
            if node.sent_view != self.view or now - node.sent_at >= self.timeout / BEATS_IN_TIMEOUT:
                node.sent_view, node.sent_at = self.view, now
                self._server.send(connection, {"kind": "view", **vars(self.view)})

    def _apply(self, event: Event[P], *args: P.args, **kwargs: P.kwargs) -> None:
        before = self.state
        self.state, messages = decide(before, event, *args, **kwargs)
        for message in messages:
            self._server.send(message.to, {"kind": message.kind, **message.fields})
        for message in {each.kind: each for each in messages}.values():
            if message.kind == "end":
                self.say(message.fields["why"])
            if message.kind == "members" and before.generation:
                self._survived = len(self._codes)
                size, lost, joined, report = (message.fields[name] for name in ("size", "lost", "joined", "report"))
                news = [*lost, *(f"{name} joins" for name in joined)]
                ranks = f"{size} rank{'s' if size > 1 else ''}"
                news = news or [f"formed anew{': ' if report else ''}{report}"]
                self.say(f"generation {message.fields['generation']} of {ranks}: {'; '.join(news)}")
        # Who was to stop so that ranks could join had more time than after a break.
        since = {} if self.state.is_broken and not before.is_broken else self._stopping_since
        at_work = [peer.id for peer in self.state.members if self.state.is_forming and not peer.is_ready]
        self._stopping_since = {peer_id: since.get(peer_id, time.monotonic()) for peer_id in at_work}
        self._update_view()

    def _update_view(self) -> None:
        self.view = View(
            members=tuple(peer.slot for peer in self.state.members),
            joiners=tuple(peer.slot for peer in self.state.joiners),
            holders=tuple(peer.slot for peer in self.state.peers if peer.has_state and not peer.is_new),
            has_state=self.state.has_state,
            has_ended=self.state.has_ended,
            code=next((int(code) for code in ENDS_OF_A_RUN if code in self._codes), None),
            stop_requested=self.state.stop_requested,
        )

    def _expel_silent(self, now: float) -> None:
        if self._suspensions.was_suspended(now):
            self._server.hear_all(now)
            self._stopping_since = dict.fromkeys(self._stopping_since, now)
            return
        limit, when = self.timeout, "the group was broken"
        if not self.state.is_broken:  # a rank may be busy after the update, as others would let it
            limit, when = self.timeout + longest_wait(self.timeout), "ranks were to join"
        for peer_id, heard in self._server.heard.items():
            if now - heard >= self.timeout:
                self._expel(peer_id, f"has not answered for {self.timeout:g} s")
            elif now - self._stopping_since.get(peer_id, now) >= limit:
                self._expel(peer_id, f"has not stopped for {limit:g} s when {when}")

    def _expel(self, peer_id: int, why: str) -> None:
        peer = self.state.find(peer_id)
        if peer is not None:
            self.say(f"{peer.name} {why}: it is expelled")
            if peer.slot in self._own_slots:
                self.expelled.append((peer.slot, peer.process))
            elif (owner := self._owner(peer.slot)) is not None:
                self._server.send(owner, {"kind": "expelled", "slot": peer.slot, "process": peer.process})
        self._lose(peer_id, why)

    def _lose(self, peer_id: int, why: str) -> None:
        self._server.drop(peer_id)
        node = self._nodes.pop(peer_id, None)
        if node is None:
            self._apply(membership.remove, peer_id, why)
            return
        if why:
            self.say(f"{node.name} {why}")
        self._alone_since = time.monotonic()
        self._note_nodes()
        for peer in self.state.peers:
            if peer.slot in node.slots:
                self._lose(peer.id, "has lost its launcher")


@dataclass(frozen=True)
class Entry:
    """Where the coordinator listens, and the token that it demands."""

    host: str
    port: int
    token: str

    @property
    def variables(self) -> Mapping[str, str]:
        """The environment variables by which ranks find it."""
        return {MEMBERSHIP_VARIABLE: f"{self.host}:{self.port}", TOKEN_VARIABLE: self.token}


class RemoteCoordinator:
    """A connection to the coordinator on another node, for a block; it has no thread: call `poll` often."""

    def __init__(self, entry: Entry, count: int) -> None:
        """Connect for `count` ranks; both sides prove that they know the token. Raises UsageError."""
        self.awaits_others = False
        self._view = View()
        self._code: int | None = None
        self.expelled: list[tuple[int, int]] = []  # slots and processes of this node: they must not write any more
        self._processes = count
        self._launch_spec: Mapping[str, Any] | None = None
        place = f"{entry.host}:{entry.port}"
        try:
            self._connection = MessageConnection(entry.host, entry.port)
        except (OSError, OverflowError) as error:
            raise UsageError(
                f"no launcher answers at {place} ({error}): the run has ended, or this node cannot reach that address",
                code="join-unanswered",
            ) from error
        node = os.environ.get("SLURMD_NODENAME", "") or socket.gethostname()
        try:
            limits = self._connection.introduce(entry.token, {"node": node, "ranks": count})
        except OSError as error:
            raise UsageError(
                f"what listens at {place} does not know this token, or is no launcher: use the token of the launch "
                f"that is running there",
                code="join-token",
            ) from error
        self.timeout = float(limits["timeout"])
        self._connection.socket.settimeout(self.timeout)
        self._heard = time.monotonic()
        self._beat = self.timeout / BEATS_IN_TIMEOUT
        self._suspensions = SuspensionDetector(self._beat, self._heard)
        self._due = 0.0

    @property
    def view(self) -> View:
        """What the coordinator has sent about the run, with the exit code that this node's ranks may know earlier."""
        return self._view if self._view.code is not None else replace(self._view, code=self._code)

    def await_start(self) -> Mapping[str, Any]:
        """Return what to launch, once the coordinator sends it. Raises UsageError or FaultError."""
        announced_at = time.monotonic() + _WAIT_SECONDS
        self._handle_messages()  # which came with the proof
        while self._launch_spec is None:
            self.poll(_WAIT_SECONDS)
            if time.monotonic() > announced_at:
                announced_at = math.inf
                say("waiting until the run has begun")
        return self._launch_spec

    def poll(self, seconds: float) -> None:
        """Handle the messages that arrive within `seconds`, and send a beat if it is due. Raises FaultError."""
        if select.select([self._connection.socket], [], [], min(seconds, self._beat))[0]:
            try:
                self._connection.receive()
            except OSError:
                raise _lost("is gone") from None
            self._heard = time.monotonic()
            self._handle_messages()
        now = time.monotonic()
        if self._suspensions.was_suspended(now):  # the coordinator may have sent beats meanwhile
            self._heard = now
        if now - self._heard >= self.timeout:
            raise _lost(f"has not answered for {self.timeout:g} s")
        if now >= self._due:
            self._due = now + self._beat
            self._connection.send({"kind": "beat"})

    def expect(self, processes: int) -> None:
        """Report how many processes are ranks or may become ranks, if that has changed."""
        if processes != self._processes:
            self._processes = processes
            self._connection.send({"kind": "processes", "count": processes})

    def note_code(self, code: int) -> None:
        """Report the exit code of a process to the coordinator."""
        if self._code is None and code in ENDS_OF_A_RUN:
            self._code = code
        self._connection.send({"kind": "ended", "code": code})

    def first_failure(self) -> int | None:
        """Return None: only this node's own ranks matter, and the launcher knows those."""
        return None

    def ask_to_stop(self) -> None:
        """Ask the coordinator to make all launchers stop their ranks."""
        self._connection.send({"kind": "stop"})

    def abandon(self) -> None:
        """Do nothing: this launcher waits for its own ranks only."""

    def __enter__(self) -> RemoteCoordinator:
        return self

    def __exit__(self, *_: object) -> None:
        self._connection.send({"kind": "leave"})
        self._connection.socket.close()

    def _handle_messages(self) -> None:
        for fields in self._connection.messages():
            match fields["kind"]:
                case "welcome":
                    self._launch_spec = fields
                case "refused":
                    raise UsageError(fields["why"], code="join-refused")
                case "expelled":
                    self.expelled.append((fields["slot"], fields["process"]))
                case "view":
                    self._view = _VIEW.validate_python(fields)


def _lost(what: str) -> FaultError:
    return FaultError(f"the launcher that began the run {what}: the ranks of this node end", code="rank-lost")


Coordinator: TypeAlias = MembershipServer | RemoteCoordinator  # its own server, or that of another node
