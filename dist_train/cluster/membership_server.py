"""The authority of an elastic launch: it listens to its ranks, and tells them who takes part.

One object in the launcher's own loop, without a thread. The ranks connect by TCP and speak lines of JSON, and so do
the launchers of other nodes (`joined_launch.py`); who does not know the launch's token is not heard. A connection that
breaks is a process that died; one that is silent for `timeout`, or says that its main thread is, is a process that
hangs.
"""

from __future__ import annotations

import hmac
import json
import secrets
import selectors
import socket
import time
from collections.abc import Callable, Mapping, Sequence
from contextlib import suppress
from dataclasses import asdict, dataclass, field
from typing import Any

from dist_train.cluster.joined_nodes import Expelled, JoinedNode, JoinedNodes, View
from dist_train.cluster.launch import MEMBERSHIP_VARIABLE
from dist_train.cluster.membership import Came, Event, Gone, MayGrow, Membership, Message, Peer, Ready, Trains, decide
from dist_train.outcome import ExitCode

TOKEN_VARIABLE = "DIST_TRAIN_MEMBERSHIP_TOKEN"  # nosec B105  # the name of a variable
SLOT_VARIABLE = "DIST_TRAIN_SLOT"
"""The launcher's number for the process: who starts in place of a lost one has its slot."""

ENDS_OF_A_RUN = (ExitCode.FINISHED, ExitCode.STOPPED, ExitCode.DIVERGED, ExitCode.DISAGREEMENT)
"""What all ranks agree on: who ends so is not missed. The first that some rank has is the run's."""

BEATS_IN_TIMEOUT = 6
START_TIMEOUTS = 4
"""Timeouts within which a process that was started, or is to be, must have come; loading torch takes seconds."""
_LONGEST_LINE = 1 << 20
_PAUSE_BEATS = 2.0
"""Between two looks; after more than that the authority itself has slept, and nobody's silence counts."""


def answer_to(token: str, challenge: str) -> str:
    """Return the proof of who knows `token`."""
    return hmac.new(token.encode(), challenge.encode(), "sha256").hexdigest()


def answer_of_authority(token: str, challenge: str) -> str:
    """Return the authority's own proof, which nobody can have from a rank."""
    return answer_to(token, f"authority {challenge}")


@dataclass
class _Connection:
    """A process, or what claims to be one until it is `known`."""

    socket: socket.socket
    challenge: str
    heard: float
    received: bytes = b""
    unsent: bytes = b""
    is_known: bool = False
    stopping_since: float | None = None
    """Since when it is expected to have stopped work."""


@dataclass
class MembershipServer:
    """Serves from its making to `close`; `poll` must be called at least every tenth of a second.

    `here`: so many of the ranks that the run begins with are processes of this launcher, with the slots 0, 1, ...
    (None: all of them). `order` is what a launcher of another node needs to know to start more; `nodes_changed` is
    called with the nodes whose launchers are connected.
    """

    size: int
    fewest: int
    most: int
    timeout: float
    host: str = "127.0.0.1"
    port: int = 0
    say: Callable[[str], None] = lambda text: None
    token: str = field(default_factory=lambda: secrets.token_hex(32))
    here: int | None = None
    order: Mapping[str, Any] = field(default_factory=dict)
    nodes_changed: Callable[[Sequence[str]], None] = lambda nodes: None

    def __post_init__(self) -> None:
        self.state = Membership(self.size, self.fewest, self.most)
        self._here = self.size if self.here is None else self.here
        self._nodes = JoinedNodes(self.size, self.most, range(self._here))
        self._codes: list[int] = []
        self._stop_requested = False
        self._alone_since = time.monotonic()
        self._listener = socket.create_server((self.host, self.port), backlog=128)
        self._listener.setblocking(False)
        self._selector = selectors.DefaultSelector()
        self._selector.register(self._listener, selectors.EVENT_READ)
        self._connections: dict[int, _Connection] = {}
        self._next_id = 1
        self._expelled: list[Expelled] = []
        self._looked = time.monotonic()

    @property
    def address(self) -> tuple[str, int]:
        """Where it listens."""
        host, port = self._listener.getsockname()[:2]
        return host, port

    def variables(self, slot: int) -> Mapping[str, str]:
        """Return the environment by which the process of `slot` finds it."""
        host, port = self.address
        return {MEMBERSHIP_VARIABLE: f"{host}:{port}", TOKEN_VARIABLE: self.token, SLOT_VARIABLE: str(slot)}

    def poll(self, seconds: float) -> None:
        """Take what has come, waiting up to `seconds` for something, and expel who does not answer."""
        for key, events in self._selector.select(seconds):
            if key.data is None:
                self._accept()
                continue
            if events & selectors.EVENT_WRITE:
                self._flush(key.data)
            if events & selectors.EVENT_READ:
                self._receive(key.data)
        now = time.monotonic()
        self._expel_the_silent(now)
        self._start_nodes()
        self._tell_nodes(now)

    @property
    def view(self) -> View:
        """What the launchers know of the run."""
        return View(
            members=frozenset(peer.slot for peer in self.state.members),
            joiners=frozenset(peer.slot for peer in self.state.joiners),
            has_state=self.state.has_state,
            has_ended=self.state.has_ended,
            code=next((int(code) for code in ENDS_OF_A_RUN if code in self._codes), None),
            stop_requested=self._stop_requested,
        )

    @property
    def expected(self) -> int:
        """How many processes are ranks or may become ones, on all nodes."""
        return self._here + self._nodes.processes

    @property
    def awaits_others(self) -> bool:
        """Whether other nodes have ranks, or those that the run begins with may still come."""
        if self._nodes.processes:
            return True
        is_late = time.monotonic() - self._alone_since > START_TIMEOUTS * self.timeout
        may_begin = self.state.generation == 0 and not self.state.has_ended and not self._stop_requested
        return may_begin and self._here < self.size and not is_late

    def expect(self, processes: int) -> None:
        """Say how many processes of this launcher are ranks or may become ones."""
        self._here = processes
        value = self.expected > len(self.state.members)
        if value != self.state.may_grow:
            self._take(MayGrow(value))

    def note_code(self, code: int) -> None:
        """Take note of how a process of this launcher has ended."""
        self._codes.append(code)

    def first_failure(self) -> int | None:
        """Return the first exit code of a rank that failed, if one did."""
        return next((code if code > 0 else int(ExitCode.FAULT) for code in self._codes if code != 0), None)

    def ask_to_stop(self) -> None:
        """Let the launchers of other nodes ask their ranks to save and stop."""
        self._stop_requested = True

    def abandon(self) -> None:
        """Let go of other nodes, whose launchers end their ranks."""
        for connection in list(self._nodes.by_connection):
            self._lose(connection, "")

    def take_expelled(self) -> list[Expelled]:
        """Return whom it has expelled of this launcher's processes since the last call."""
        expelled, self._expelled = self._expelled, []
        return expelled

    def close(self) -> None:
        """Let go of all connections; ranks that are left end."""
        for peer_id in list(self._connections):
            self._drop(peer_id)
        self._selector.close()
        self._listener.close()

    def _accept(self) -> None:
        with suppress(OSError):
            accepted, _ = self._listener.accept()
            accepted.setblocking(False)
            accepted.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
            peer_id, self._next_id = self._next_id, self._next_id + 1
            connection = _Connection(accepted, secrets.token_hex(16), time.monotonic())
            self._connections[peer_id] = connection
            self._selector.register(accepted, selectors.EVENT_READ, peer_id)
            self._send(peer_id, {"kind": "challenge", "text": connection.challenge})

    def _receive(self, peer_id: int) -> None:
        connection = self._connections.get(peer_id)
        if connection is None:
            return
        try:
            content = connection.socket.recv(1 << 16)
        except BlockingIOError:
            return
        except OSError:
            content = b""
        if not content or len(connection.received) > _LONGEST_LINE:
            self._lose(peer_id, "died")
            return
        connection.heard = time.monotonic()
        *lines, connection.received = (connection.received + content).split(b"\n")
        for line in lines:
            try:
                self._hear(peer_id, json.loads(line))
            except (ValueError, KeyError, TypeError, AttributeError):
                self._lose(peer_id, "sent what is no message")
                return

    def _hear(self, peer_id: int, fields: Mapping[str, Any]) -> None:
        connection = self._connections.get(peer_id)
        if connection is None:
            return
        kind = fields["kind"]
        if not connection.is_known:
            proof = answer_to(self.token, connection.challenge)
            if kind != "hello" or not hmac.compare_digest(str(fields["proof"]), proof):
                self._drop(peer_id)
                return
            connection.is_known = True
            self._greet(peer_id, fields)
            return
        if peer_id in self._nodes.by_connection:
            self._hear_node(peer_id, fields)
            return
        match kind:
            case "ready":
                host, port = fields["store"]
                store = (str(host), int(port))
                self._take(Ready(peer_id, int(fields["generation"]), store, str(fields["why"])))
            case "trains":
                self._take(Trains(peer_id))
            case "hangs":
                self._expel(peer_id, f"has not moved on for {self.timeout:g} s")
            case "leave":
                self._lose(peer_id, str(fields["why"]))

    def _greet(self, peer_id: int, fields: Mapping[str, Any]) -> None:
        node, process = str(fields["node"]), int(fields["process"])
        if "ranks" in fields:
            self._greet_node(peer_id, JoinedNode(node, process, int(fields["ranks"])), str(fields["challenge"]))
            return
        slot = int(fields["slot"])
        if slot not in self._nodes.own_slots and self._nodes.owner(slot) is None:
            self._drop(peer_id)  # its launcher is gone
            return
        joins = self.state.generation > 0
        self._take(Came(Peer(peer_id, slot, node, process)))
        self._send(peer_id, {"kind": "welcome", "joins": joins})

    def _greet_node(self, peer_id: int, node: JoinedNode, challenge: str) -> None:
        proof = answer_of_authority(self.token, challenge)
        self._send(peer_id, {"kind": "known", "proof": proof, "timeout": self.timeout})
        why = "the run has ended" if self.state.is_over or self.state.has_ended else ""
        if why := why or self._nodes.refusal(node.wanted, self._here):
            self.say(f"{node.name} may not join: {why}")
            self._send(peer_id, {"kind": "refused", "why": why})
            self._drop(peer_id)
            return
        self._nodes.by_connection[peer_id] = node
        self.nodes_changed(self._nodes.names)

    def _start_nodes(self) -> None:
        """Let those start their ranks that wait for it and may."""
        if self._stop_requested or self.state.is_over or self.state.has_ended:
            return
        has_begun = self.state.generation > 0 and self.state.has_state
        for connection in list(self._nodes.ready_to_start(self._here, has_begun)):
            slots = self._nodes.allot(connection, (peer.slot for peer in self.state.peers))
            node = self._nodes.by_connection[connection]
            self.say(f"{node.name} starts {node.wanted} rank{'s' if node.wanted > 1 else ''}")
            self._send(connection, {"kind": "welcome", "slots": slots, "size": self.size, **self.order})

    def _tell_nodes(self, now: float) -> None:
        """Tell the launchers of other nodes what has changed, and often enough that the authority lives."""
        if not self._nodes.by_connection:
            return
        view = self.view
        said = {**asdict(view), "members": sorted(view.members), "joiners": sorted(view.joiners)}
        for connection, node in self._nodes.by_connection.items():
            if node.told != view or now - node.told_at >= self.timeout / BEATS_IN_TIMEOUT:
                node.told, node.told_at = view, now
                self._send(connection, {"kind": "view", **said})

    def _hear_node(self, peer_id: int, fields: Mapping[str, Any]) -> None:
        match fields["kind"]:
            case "processes":
                self._nodes.by_connection[peer_id].processes = int(fields["count"])
            case "ended":
                self._codes.append(int(fields["code"]))
            case "leave":
                self._lose(peer_id, "")

    def _lose_node(self, node: JoinedNode, why: str) -> None:
        if why:
            self.say(f"{node.name} {why}")
        self._alone_since = time.monotonic()
        self.nodes_changed(self._nodes.names)
        for peer in self.state.peers:
            if peer.slot in node.slots:
                self._lose(peer.id, "has lost its launcher")

    def _take(self, event: Event) -> None:
        before = self.state
        self.state, messages = decide(before, event)
        for message in messages:
            self._send(message.to, {"kind": message.kind, **message.fields})
        for message in messages[:1]:
            if message.kind == "end":
                self.say(message.fields["why"])
            if message.kind == "members" and before.generation:
                size, lost, joined = (message.fields[name] for name in ("size", "lost", "joined"))
                news = [*lost, *(f"{name} joins" for name in joined)]
                ranks = f"{size} rank{'s' if size > 1 else ''}"
                self.say(f"generation {message.fields['generation']} of {ranks}: {'; '.join(news) or 'formed anew'}")
        self._note_who_must_stop(messages)

    def _note_who_must_stop(self, messages: tuple[Message, ...]) -> None:
        now = time.monotonic()
        for message in messages:
            connection = self._connections.get(message.to)
            if connection is not None and message.kind == "break" and connection.stopping_since is None:
                connection.stopping_since = now
        waiting = self.state.is_forming and self.state.generation > 0
        for peer in self.state.peers:
            connection = self._connections.get(peer.id)
            if connection is None:
                continue
            if peer.is_ready or not waiting or peer.rank is None:
                connection.stopping_since = None
            elif connection.stopping_since is None:
                connection.stopping_since = now

    def _expel_the_silent(self, now: float) -> None:
        slept = now - self._looked > _PAUSE_BEATS * self.timeout / BEATS_IN_TIMEOUT
        self._looked = now
        for peer_id, connection in list(self._connections.items()):
            if slept:
                connection.heard = now
                if connection.stopping_since is not None:
                    connection.stopping_since = now
            elif now - connection.heard >= self.timeout:
                self._expel(peer_id, f"has not answered for {self.timeout:g} s")
            elif connection.stopping_since is not None and now - connection.stopping_since >= self.timeout:
                self._expel(peer_id, f"has not stopped for {self.timeout:g} s when the group was broken")

    def _expel(self, peer_id: int, why: str) -> None:
        peer = self.state.find(peer_id)
        if peer is not None:
            self.say(f"{peer.name} {why}: it is expelled")
            owner = self._nodes.owner(peer.slot)
            if owner is None:
                self._expelled.append(Expelled(peer.slot, peer.process))
            else:
                self._send(owner, {"kind": "expelled", "slot": peer.slot, "process": peer.process})
        self._lose(peer_id, why)

    def _lose(self, peer_id: int, why: str) -> None:
        self._drop(peer_id)
        node = self._nodes.by_connection.pop(peer_id, None)
        if node is not None:
            self._lose_node(node, why)
        else:
            self._take(Gone(peer_id, why))

    def _drop(self, peer_id: int) -> None:
        connection = self._connections.pop(peer_id, None)
        if connection is not None:
            self._selector.unregister(connection.socket)
            connection.socket.close()

    def _send(self, peer_id: int, fields: Mapping[str, Any]) -> None:
        connection = self._connections.get(peer_id)
        if connection is not None:
            connection.unsent += json.dumps(dict(fields)).encode() + b"\n"
            self._flush(peer_id)

    def _flush(self, peer_id: int) -> None:
        connection = self._connections.get(peer_id)
        if connection is None:
            return
        with suppress(OSError):  # a broken connection is noticed where it is read
            sent = connection.socket.send(connection.unsent)
            connection.unsent = connection.unsent[sent:]
        events = selectors.EVENT_READ | (selectors.EVENT_WRITE if connection.unsent else 0)
        self._selector.modify(connection.socket, events, peer_id)
