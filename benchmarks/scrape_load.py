"""Scrapes a page at a steady rate: `python -m benchmarks.scrape_load URL RATE`, in its own process.

For each line on standard input, a number of seconds, it scrapes for that time and then prints the number of complete
answers.
"""

from __future__ import annotations

import selectors
import socket
import sys
import time
from collections import deque
from urllib.parse import urlsplit

_CONNECTIONS = 16
_HEADERS_END = b"\r\n\r\n"


class _Client:
    """A persistent connection with one request at a time."""

    def __init__(self, host: str, port: int, path: str) -> None:
        self.socket = socket.create_connection((host, port), timeout=10)
        self.socket.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
        self._request = f"GET {path} HTTP/1.1\r\nHost: {host}\r\nAccept: text/plain\r\n\r\n".encode()
        self._buffer = memoryview(bytearray(1 << 22))
        self._got = 0
        self._size = 0

    def ask(self) -> None:
        self._got = self._size = 0
        self.socket.sendall(self._request)

    def read(self) -> bool:
        """Read received bytes; return whether the answer is complete."""
        count = self.socket.recv_into(self._buffer[self._got :])
        assert count, "the server closed a connection that was in use"
        self._got += count
        if not self._size:
            head, end, _ = bytes(self._buffer[: min(self._got, 1000)]).partition(_HEADERS_END)
            if not end:
                return False
            assert head.startswith(b"HTTP/1.1 200 "), head
            length = next(line for line in head.split(b"\r\n") if line.lower().startswith(b"content-length:"))
            self._size = len(head) + len(end) + int(length.partition(b":")[2])
        return self._got == self._size


def scrape(clients: list[_Client], rate: float, seconds: float) -> int:
    """Scrape for `seconds` at `rate` per second, or as fast as answers come; return the number of answers."""
    idle, answers = deque(clients), 0
    began = due = time.monotonic()
    with selectors.DefaultSelector() as waiting:
        while (now := time.monotonic()) < began + seconds or len(idle) < len(clients):
            while idle and due <= now < began + seconds:
                client = idle.popleft()
                client.ask()
                waiting.register(client.socket, selectors.EVENT_READ, client)
                due += 1 / rate
            for key, _ in waiting.select(max(0.0, due - time.monotonic()) if idle else None):
                if key.data.read():
                    waiting.unregister(key.fileobj)
                    idle.append(key.data)
                    answers += 1
            if len(idle) == len(clients):
                time.sleep(max(0.0, min(due, began + seconds) - time.monotonic()))
    return answers


def main() -> None:
    """Scrape once for each line of standard input."""
    url, rate = urlsplit(sys.argv[1]), float(sys.argv[2])
    assert url.hostname is not None
    assert url.port is not None
    clients = [_Client(url.hostname, url.port, url.path) for _ in range(_CONNECTIONS)]
    for line in sys.stdin:
        print(scrape(clients, rate, float(line)), flush=True)


if __name__ == "__main__":
    main()
