"""Messages between an elastic launch's coordinator and its ranks and launchers: JSON objects, one a line, over TCP."""

from __future__ import annotations

import json
import socket
import threading
from collections.abc import Iterator, Mapping
from contextlib import suppress
from typing import Any


class MessageConnection:
    """A connection to the coordinator. Any thread may `send`; one thread at a time may receive."""

    def __init__(self, host: str, port: int, seconds: float) -> None:
        """Connect within `seconds`, which also limit each read. Raises OSError, or OverflowError for the port."""
        self.socket = socket.create_connection((host, port), seconds)
        self.socket.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
        self._received = b""
        self._sending = threading.Lock()

    def send(self, fields: Mapping[str, Any]) -> None:
        """Send a message; a broken connection is noticed by the thread that receives."""
        with self._sending, suppress(OSError):
            self.socket.sendall(json.dumps(dict(fields)).encode() + b"\n")

    def receive(self) -> None:
        """Wait for data; raise OSError if none comes because the connection is closed or silent."""
        content = self.socket.recv(1 << 16)
        if not content:
            raise OSError("it has closed the connection")
        self._received += content

    def messages(self) -> Iterator[Mapping[str, Any]]:
        """Yield the messages that have been received whole, each once."""
        *lines, self._received = self._received.split(b"\n")
        for line in lines:
            yield json.loads(line)

    def next_message(self) -> Mapping[str, Any]:
        """Wait for a message and return it. Raises OSError as `receive` does, ValueError if it is not a message."""
        while b"\n" not in self._received:
            self.receive()
        line, _, self._received = self._received.partition(b"\n")
        message: Mapping[str, Any] = json.loads(line)
        return message
