"""The authority of an elastic launch: it listens to its ranks, and tells them who takes part.

One object in the launcher's own loop, without a thread. The ranks connect by TCP and speak lines of JSON; who does
not know the launch's token is not heard. A connection that breaks is a process that died; one that is silent for
`timeout` is a process that hangs.
"""

from __future__ import annotations

import hmac
import json
import secrets
import selectors
import socket
import time
from collections.abc import Callable, Mapping
from contextlib import suppress
from dataclasses import dataclass, field
from typing import Any

from dist_train.cluster.launch import MEMBERSHIP_VARIABLE
from dist_train.cluster.membership import Came, Event, Gone, MayGrow, Membership, Message, Peer, Ready, Trains, decide

TOKEN_VARIABLE = "DIST_TRAIN_MEMBERSHIP_TOKEN"  # nosec B105  # the name of a variable
SLOT_VARIABLE = "DIST_TRAIN_SLOT"
"""The launcher's number for the process: who starts in place of a lost one has its slot."""

BEATS_IN_TIMEOUT = 6
_LONGEST_LINE = 1 << 20
_PAUSE_BEATS = 2.0
"""Between two looks; after more than that the authority itself has slept, and nobody's silence counts."""


def answer_to(token: str, challenge: str) -> str:
    """Return the proof of who knows `token`."""
    return hmac.new(token.encode(), challenge.encode(), "sha256").hexdigest()


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


@dataclass(frozen=True)
class Expelled:
    """A process that does not answer and is no longer one of the run: it must not write any more."""

    slot: int
    process: int


@dataclass
class MembershipServer:
    """Serves from its making to `close`; `poll` must be called at least every tenth of a second."""

    size: int
    fewest: int
    most: int
    timeout: float
    host: str = "127.0.0.1"
    say: Callable[[str], None] = lambda text: None
    token: str = field(default_factory=lambda: secrets.token_hex(32))

    def __post_init__(self) -> None:
        self.state = Membership(self.size, self.fewest, self.most)
        self._listener = socket.create_server((self.host, 0), backlog=128)
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
        self._expel_the_silent(time.monotonic())

    def expect_more(self, value: bool) -> None:
        """Say whether processes may still be started, or are on their way."""
        if value != self.state.may_grow:
            self._take(MayGrow(value))

    def take_expelled(self) -> list[Expelled]:
        """Return whom it has expelled since the last call."""
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
            joins = self.state.generation > 0
            node, process = str(fields["node"]), int(fields["process"])
            self._take(Came(Peer(peer_id, int(fields["slot"]), node, process)))
            self._send(peer_id, {"kind": "welcome", "joins": joins})
            return
        match kind:
            case "ready":
                host, port = fields["store"]
                store = (str(host), int(port))
                self._take(Ready(peer_id, int(fields["generation"]), store, str(fields["why"])))
            case "trains":
                self._take(Trains(peer_id))
            case "leave":
                self._lose(peer_id, str(fields["why"]))

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
            self._expelled.append(Expelled(peer.slot, peer.process))
            self.say(f"{peer.name} {why}: it is expelled")
        self._lose(peer_id, why)

    def _lose(self, peer_id: int, why: str) -> None:
        self._drop(peer_id)
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
