"""The socket over which the trainer and the exporter's process talk."""

from __future__ import annotations

import mmap
import socket
from collections.abc import Iterator

from dist_train.monitoring.prometheus.codec import decode, encode
from dist_train.monitoring.prometheus.messages import Message

_BUFFER_BYTES = 4 << 20
"""Asked of the kernel, which gives at most twice that; a measurement of 1,024 ranks takes about 90 KB."""


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

    def send(self, message: Message) -> bool:
        """Send `message`; False where the buffer is full. Raises OSError where the other end is gone."""
        try:
            self._socket.send(encode(message))
        except BlockingIOError:
            return False
        return True

    def receive(self) -> Iterator[Message]:
        """Yield the messages that have come.

        Raises:
            EOFError: the other end is gone, and all that it sent has been taken.
            ValueError: what has come is no message.
        """
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
            yield decode(bytes(self._buffer[:size]))

    def close(self) -> None:
        """Let go of the socket."""
        self._socket.close()


def socket_pair() -> tuple[socket.socket, socket.socket]:
    """Return two sockets that are connected to each other, for one channel at each end."""
    return socket.socketpair(socket.AF_UNIX, socket.SOCK_SEQPACKET)
