"""What the trainer and the exporter's process say to each other, and the socket over which they do."""

from __future__ import annotations

import mmap
import pickle
import socket
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from dist_train.monitoring.prometheus.serving_plan import ServingPlan
from dist_train.monitoring.records import Outcome, RunFacts

_BUFFER_BYTES = 4 << 20
"""Asked of the kernel, which gives at most twice that; a measurement of 1,024 workers takes about 80 KB."""


@dataclass(frozen=True)
class Begin:
    """To the exporter: serve this run. `counts`: its events before this launch, by kind."""

    plan: ServingPlan
    facts: RunFacts
    counts: Mapping[str, int]


@dataclass(frozen=True)
class End:
    """To the exporter: the run has ended."""

    outcome: Outcome


@dataclass(frozen=True)
class Serving:
    """From the exporter: it serves at `address`, and has entered itself in the file `target`."""

    address: str
    target: Path | None


@dataclass(frozen=True)
class Warned:
    """From the exporter: something that the user should know."""

    text: str


@dataclass(frozen=True)
class Ending:
    """From the exporter: it ends within so many seconds; `for_scrape` of them for a last scrape."""

    seconds: float
    for_scrape: float


@dataclass(frozen=True)
class Failed:
    """From the exporter: it cannot go on."""

    reason: str


class Channel:
    """One end of a pair of sockets that carries whole messages, never blocks, and tells when the other end is gone."""

    def __init__(self, end: socket.socket) -> None:
        end.setblocking(False)
        end.setsockopt(socket.SOL_SOCKET, socket.SO_SNDBUF, _BUFFER_BYTES)
        self._socket = end
        self._buffer: memoryview | None = None

    def fileno(self) -> int:
        """Return the descriptor, for select."""
        return self._socket.fileno()

    def send(self, message: object) -> bool:
        """Send `message`; False where the buffer is full. Raises OSError where the other end is gone."""
        try:
            self._socket.send(pickle.dumps(message, pickle.HIGHEST_PROTOCOL))
        except BlockingIOError:
            return False
        return True

    def receive(self) -> Iterator[Any]:
        """Yield the messages that have come. Raises EOFError after the last one of an end that is gone."""
        if self._buffer is None:
            # of which only the pages that messages reach take memory
            self._buffer = memoryview(mmap.mmap(-1, 2 * _BUFFER_BYTES))
        while True:
            try:
                size = self._socket.recv_into(self._buffer)
            except BlockingIOError:
                return
            except ConnectionResetError:
                continue  # told once, where the other end had not read all; what it sent comes after
            if size == 0:
                raise EOFError
            yield pickle.loads(self._buffer[:size])

    def close(self) -> None:
        """Let go of the socket."""
        self._socket.close()


def socket_pair() -> tuple[socket.socket, socket.socket]:
    """Return two sockets that are connected to each other, for one channel at each end."""
    return socket.socketpair(socket.AF_UNIX, socket.SOCK_SEQPACKET)
