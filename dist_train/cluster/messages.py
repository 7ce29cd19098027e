"""Messages between an elastic launch's coordinator and its ranks and launchers: JSON objects, one a line, over TCP."""

from __future__ import annotations

import hmac
import json
import os
import secrets
import selectors
import socket
import threading
import time
from collections.abc import Callable, Iterator, Mapping
from contextlib import suppress
from dataclasses import dataclass
from typing import Any, Literal

from dist_train import __version__
from dist_train.cluster.heartbeats import resolve
from dist_train.outcome import UsageError

_LONGEST_LINE = 1 << 20
_CONNECT_SECONDS = 10.0


def proof_of(sender: Literal["coordinator", "peer"], token: str, challenge: str) -> str:
    """Return the proof that `sender` knows `token`; whatever the challenge, that of a peer is no coordinator's."""
    return hmac.new(token.encode(), f"{sender} {challenge}".encode(), "sha256").hexdigest()


class MessageConnection:
    """A connection to the coordinator. Any thread may `send`; one thread at a time may receive."""

    def __init__(self, host: str, port: int) -> None:
        """Connect within 10 s, which also limit each read. Raises OSError, or OverflowError for the port."""
        self.socket = socket.create_connection((host, port), _CONNECT_SECONDS)
        self.socket.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
        self._received = b""
        self._sending = threading.Lock()

    def introduce(self, token: str, fields: Mapping[str, Any]) -> Mapping[str, Any]:
        """Prove that this process knows `token`, as the coordinator does; describe it by `fields`; return the answer.

        Raises OSError, and closes the connection, if the other end is no coordinator that knows `token`; UsageError if
        it is one of another version, whose messages may have another form.
        """
        try:
            proof, challenge = proof_of("peer", token, str(self.next_message()["text"])), secrets.token_hex(16)
            self.send({"kind": "hello", "proof": proof, "challenge": challenge, "process": os.getpid(), **fields})
            known = self.next_message()
            if not hmac.compare_digest(str(known["proof"]), proof_of("coordinator", token, challenge)):
                raise ValueError("the proof is wrong")
            if (version := known.get("version", "of another version")) != __version__:
                raise UsageError(
                    f"the launcher that began the run is dist_train {version}, this one {__version__}: install the "
                    f"same on all nodes, and start again",
                    code="join-version",
                )
            return self.next_message()
        except UsageError:
            self.socket.close()
            raise
        except (OSError, ValueError, KeyError, TypeError) as error:
            self.socket.close()
            raise OSError(str(error)) from error

    def send(self, fields: Mapping[str, Any]) -> None:
        """Send a message; a broken connection is noticed by the thread that receives."""
        with self._sending, suppress(OSError):
            self.socket.sendall(_encode(fields))

    def receive(self) -> None:
        """Wait for data; raise OSError if none comes because the connection is closed or silent."""
        content = self.socket.recv(1 << 16)
        if not content:
            raise OSError("it has closed the connection")
        self._received += content

    def messages(self) -> Iterator[Mapping[str, Any]]:
        """Yield the messages that have been received whole, each once."""
        while b"\n" in self._received:
            yield self.next_message()

    def next_message(self) -> Mapping[str, Any]:
        """Wait for a message and return it. Raises OSError as `receive` does, ValueError if it is not a message."""
        while b"\n" not in self._received:
            self.receive()
        line, _, self._received = self._received.partition(b"\n")
        message: Mapping[str, Any] = json.loads(line)
        return message


@dataclass
class _Peer:
    """A connection to the coordinator; nothing is known about its process until `is_known`."""

    socket: socket.socket
    challenge: str
    heard: float
    received: bytes = b""
    unsent: bytes = b""
    is_known: bool = False


class MessageServer:
    """The coordinator's end of the connections, by number; it has no thread and never blocks: call `poll` often.

    A process that does not prove by its first message, `hello`, that it knows `token` is disconnected. To the others it
    proves that it knows `token`, too.
    """

    def __init__(
        self,
        address: tuple[str, int],
        token: str,
        handle: Callable[[int, Mapping[str, Any]], None],
        lose: Callable[[int, str], None],
    ) -> None:
        """Listen at `address` (port 0: a free one). Raises OSError, or OverflowError for the port.

        `handle` is called with each message of a process that knows the token, and may raise what a message of another
        form makes it raise; `lose` with a connection that broke, or brought no message, and why: it must `drop` it.
        """
        self._token = token
        self._handle = handle
        self._lose = lose
        host, port = resolve(address[0]), address[1]
        family = socket.AF_INET6 if ":" in host else socket.AF_INET
        self._listener = socket.create_server((host, port), family=family, backlog=128)
        self._listener.setblocking(False)
        self._selector = selectors.DefaultSelector()
        self._selector.register(self._listener, selectors.EVENT_READ)
        self._peers: dict[int, _Peer] = {}
        self._next_id = 1

    @property
    def address(self) -> tuple[str, int]:
        """Host and port where it listens."""
        host, port = self._listener.getsockname()[:2]
        return host, port

    @property
    def heard(self) -> dict[int, float]:
        """When each connection last brought something, by the monotonic clock."""
        return {peer_id: peer.heard for peer_id, peer in self._peers.items()}

    def hear_all(self, now: float) -> None:
        """Count every connection as heard `now`."""
        for peer in self._peers.values():
            peer.heard = now

    def poll(self, seconds: float) -> None:
        """Handle the messages that have arrived, waiting up to `seconds` for one."""
        for key, events in self._selector.select(seconds):
            if key.data is None:
                self._accept()
                continue
            peer = self._peers.get(key.data)  # None: dropped meanwhile
            if peer and events & selectors.EVENT_WRITE:
                self._flush(key.data, peer)
            if peer and events & selectors.EVENT_READ:
                self._receive(key.data, peer)

    def send(self, peer_id: int, fields: Mapping[str, Any]) -> None:
        """Send a message, unless the connection is gone."""
        peer = self._peers.get(peer_id)
        if peer is not None:
            peer.unsent += _encode(fields)
            self._flush(peer_id, peer)

    def drop(self, peer_id: int) -> None:
        """Close a connection."""
        peer = self._peers.pop(peer_id, None)
        if peer is not None:
            self._selector.unregister(peer.socket)
            peer.socket.close()

    def close(self) -> None:
        """Close all connections."""
        for peer_id in list(self._peers):
            self.drop(peer_id)
        self._selector.close()
        self._listener.close()

    def _accept(self) -> None:
        with suppress(OSError):
            accepted, _ = self._listener.accept()
            accepted.setblocking(False)
            accepted.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
            peer_id, self._next_id = self._next_id, self._next_id + 1
            peer = self._peers[peer_id] = _Peer(accepted, secrets.token_hex(16), time.monotonic())
            self._selector.register(accepted, selectors.EVENT_READ, peer_id)
            self.send(peer_id, {"kind": "challenge", "text": peer.challenge})

    def _receive(self, peer_id: int, peer: _Peer) -> None:
        try:
            content = peer.socket.recv(1 << 16)
        except BlockingIOError:
            return
        except OSError:
            content = b""
        if not content or len(peer.received) > _LONGEST_LINE:
            self._lose(peer_id, "died")
            return
        peer.heard = time.monotonic()
        *lines, peer.received = (peer.received + content).split(b"\n")
        for line in lines:
            try:
                fields = json.loads(line)
                if not peer.is_known and not self._knows_token(peer, fields):
                    self.drop(peer_id)
                if peer_id not in self._peers:
                    return
                if not peer.is_known:
                    peer.is_known = True
                    proof = proof_of("coordinator", self._token, str(fields["challenge"]))
                    self.send(peer_id, {"kind": "known", "proof": proof, "version": __version__})
                self._handle(peer_id, fields)
            except (ValueError, KeyError, TypeError, AttributeError, RecursionError):
                self._lose(peer_id, "sent what is no message")
                return

    def _knows_token(self, peer: _Peer, fields: Mapping[str, Any]) -> bool:
        proof = proof_of("peer", self._token, peer.challenge)
        return fields["kind"] == "hello" and hmac.compare_digest(str(fields["proof"]), proof)

    def _flush(self, peer_id: int, peer: _Peer) -> None:
        with suppress(OSError):  # a broken connection is noticed where it is read
            sent = peer.socket.send(peer.unsent)
            peer.unsent = peer.unsent[sent:]
        events = selectors.EVENT_READ | (selectors.EVENT_WRITE if peer.unsent else 0)
        self._selector.modify(peer.socket, events, peer_id)


def _encode(fields: Mapping[str, Any]) -> bytes:
    return json.dumps(dict(fields)).encode() + b"\n"
