"""`/metrics` and `/healthz` over HTTP or HTTPS, and nothing else; no client can hold up another."""

from __future__ import annotations

import errno
import logging
import socket
import ssl
import time
from collections.abc import Callable
from http import HTTPStatus
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from socketserver import TCPServer
from threading import Lock
from typing import Any
from urllib.parse import urlsplit

from dist_train.monitoring.prometheus.access import Credentials
from dist_train.monitoring.prometheus.page import CONTENT_TYPE

_logger = logging.getLogger(__name__)

_PORTS = 50
_CONNECTIONS = 64
_HANDSHAKE_SECONDS = 10.0
_IDLE_SECONDS = 120.0
"""Longer than Prometheus waits between scrapes, as a rule: it keeps its connections."""
_PLAIN = "text/plain; charset=utf-8"

Page = Callable[[], bytes]
"""Makes the page of metrics, of type `CONTENT_TYPE`."""


def bind(host: str, port: int, page: Page, credentials: Credentials, tls: ssl.SSLContext | None) -> Server:
    """Return a server at `port` of `host`, or at the next free port above. Raises OSError where none can be had."""
    for candidate in range(port, min(port + _PORTS, 65_536)):
        try:
            return Server(host, candidate, page, credentials, tls)
        except OSError as error:
            if error.errno != errno.EADDRINUSE:
                raise
    raise OSError(errno.EADDRINUSE, f"metrics ports {port} to {port + _PORTS - 1} are all in use")


class Server(ThreadingHTTPServer):
    """Serves `page`. Where too many clients are connected, the one that was idle longest gives way."""

    request_queue_size = 128

    def __init__(self, host: str, port: int, page: Page, credentials: Credentials, tls: ssl.SSLContext | None) -> None:
        # an empty metrics.host asks for every interface
        host = host or "0.0.0.0"  # nosec B104
        family, _, _, _, address = socket.getaddrinfo(host, port, type=socket.SOCK_STREAM)[0]
        self.address_family = family
        self.page = page
        self.credentials = credentials
        self.last_scrape: float | None = None
        """When the latest scrape that was answered began (monotonic)."""
        self._tls = tls
        self._lock = Lock()
        self._clients: dict[socket.socket, float] = {}
        super().__init__((str(address[0]), port), _Handler)

    def server_bind(self) -> None:
        """Bind, without asking the name service for a name: it can take seconds on a cluster."""
        TCPServer.server_bind(self)
        self.server_name = str(self.server_address[0])
        self.server_port = int(self.server_address[1])

    def get_request(self) -> tuple[socket.socket, Any]:
        """Take a connection; its handshake is left to its own thread."""
        client, address = super().get_request()
        if self._tls is not None:
            client = self._tls.wrap_socket(client, server_side=True, do_handshake_on_connect=False)
        return client, address

    def process_request(self, request: Any, client_address: Any) -> None:
        """Handle a connection in a thread of its own."""
        with self._lock:
            if len(self._clients) >= _CONNECTIONS:
                oldest = min(self._clients, key=self._clients.__getitem__)
                del self._clients[oldest]
                # of the plain socket: its thread may be reading by TLS, and finds the end of the stream
                with_no_tls = socket.socket.shutdown
                try:
                    with_no_tls(oldest, socket.SHUT_RDWR)
                except OSError:
                    _logger.debug("the client that gives way is gone already")
            self._clients[request] = time.monotonic()
        super().process_request(request, client_address)

    def shutdown_request(self, request: Any) -> None:
        """Close a connection."""
        with self._lock:
            self._clients.pop(request, None)
        super().shutdown_request(request)

    def note_activity(self, client: socket.socket) -> None:
        """Note that `client` has just been answered."""
        with self._lock:
            if client in self._clients:
                self._clients[client] = time.monotonic()

    def handle_error(self, request: Any, client_address: Any) -> None:
        """Keep the faults of clients to the debug log."""
        _logger.debug("a client of the metrics page failed: %s", client_address, exc_info=True)


class _Handler(BaseHTTPRequestHandler):
    protocol_version = "HTTP/1.1"
    server_version = "dist_train"
    sys_version = ""
    timeout = _IDLE_SECONDS
    disable_nagle_algorithm = True
    wbufsize = -1
    server: Server

    def setup(self) -> None:
        if isinstance(self.request, ssl.SSLSocket):
            self.request.settimeout(_HANDSHAKE_SECONDS)
            self.request.do_handshake()
        super().setup()

    def parse_request(self) -> bool:
        if not super().parse_request():
            return False
        if "Content-Length" in self.headers or "Transfer-Encoding" in self.headers:
            self.close_connection = True  # what follows is not a request
        if self.command not in ("GET", "HEAD"):
            self.close_connection = True
            self._answer(HTTPStatus.METHOD_NOT_ALLOWED, b"GET and HEAD only\n", _PLAIN, ("Allow", "GET, HEAD"))
            self.wfile.flush()
            return False
        return True

    def do_GET(self) -> None:
        match urlsplit(self.path).path:
            case "/metrics":
                self._metrics()
            case "/healthz":
                self._answer(HTTPStatus.OK, b"ok\n", _PLAIN)
            case _:
                self._answer(HTTPStatus.NOT_FOUND, b"see /metrics\n", _PLAIN)

    def do_HEAD(self) -> None:
        self.do_GET()

    def _metrics(self) -> None:
        credentials = self.server.credentials
        if not credentials.admit(self.headers.get("Authorization", "")):
            challenges = (("WWW-Authenticate", challenge) for challenge in credentials.challenges)
            self._answer(HTTPStatus.UNAUTHORIZED, b"who is asking?\n", _PLAIN, *challenges)
            return
        begun = time.monotonic()
        self._answer(HTTPStatus.OK, self.server.page(), CONTENT_TYPE)
        if self.command == "GET":
            self.wfile.flush()
            self.server.last_scrape = begun

    def _answer(self, status: HTTPStatus, body: bytes, content_type: str, *headers: tuple[str, str]) -> None:
        self.send_response(status)
        self.send_header("Content-Type", content_type)
        self.send_header("Content-Length", str(len(body)))
        for name, value in headers:
            self.send_header(name, value)
        if self.close_connection:
            self.send_header("Connection", "close")
        self.end_headers()
        if self.command != "HEAD":
            self.wfile.write(body)
        self.server.note_activity(self.request)

    def log_message(self, format: str, *args: Any) -> None:
        """Keep scrapes out of the log."""
