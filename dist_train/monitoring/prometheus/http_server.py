"""The HTTP server of the metrics page, with TLS, basic authentication and bearer tokens.

prometheus_client's `start_http_server` lacks authentication, limits on the number of clients and their time, TLS
handshakes in the clients' threads, HTTP/1.1, `/healthz`, the choice of the next free port, and the time of the latest
scrape.
"""

from __future__ import annotations

import base64
import errno
import gzip
import hmac
import math
import socket
import ssl
import stat
import time
from collections import OrderedDict
from collections.abc import Callable, Mapping, Sequence
from contextlib import suppress
from dataclasses import dataclass
from http import HTTPStatus
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from ipaddress import ip_address
from pathlib import Path
from socketserver import TCPServer
from threading import Lock
from typing import TYPE_CHECKING, Any, TypeAlias
from urllib.parse import parse_qs, urlsplit

from dist_train.monitoring.prometheus.messages import ServingPlan, plan_of
from dist_train.monitoring.prometheus.metrics import CONTENT_TYPE
from dist_train.outcome import UsageError

if TYPE_CHECKING:
    from dist_train.config.sections import MetricsSettings


Credentials: TypeAlias = Mapping[str, bytes]  # secrets by scheme of the Authorization header; empty: all may read
_CHALLENGES = {"bearer": 'Bearer realm="dist_train"', "basic": 'Basic realm="dist_train", charset="UTF-8"'}


def is_admitted(authorization: str, credentials: Credentials) -> bool:
    """Return whether a request with this Authorization header is accepted."""
    scheme, _, value = authorization.partition(" ")
    secret, given = credentials.get(scheme.lower()), value.strip().encode("utf-8", "surrogateescape")
    return not credentials or (secret is not None and hmac.compare_digest(given, secret))


def check_access(settings: MetricsSettings) -> None:
    """Check the files of secrets and certificates. Raises UsageError if one is missing or invalid."""
    plan = plan_of(settings)
    read_credentials(plan)
    tls_context(plan)


def access_warnings(settings: MetricsSettings) -> tuple[str, ...]:
    """Return one sentence for each setting that exposes the metrics or a secret to others."""
    plan = plan_of(settings)
    warnings = []
    is_local = plan.host == "localhost"
    with suppress(ValueError):
        is_local = ip_address(plan.host).is_loopback
    if plan.token_file is None and plan.password_file is None and not is_local:
        warnings.append(
            f"metrics.host={plan.host}: anybody on the network can read the metrics; set metrics.token_file"
            + ("" if plan.certificate_file else ", and metrics.certificate_file for TLS")
        )
    # Without a file of its own, the key is in the certificate's.
    for name in ("token_file", "password_file", "key_file" if plan.key_file else "certificate_file"):
        path = getattr(plan, name)
        if path is not None and path.stat().st_mode & stat.S_IROTH:
            warnings.append(f"metrics.{name}: everybody on this machine can read {path}; run: chmod 600 {path}")
    return tuple(warnings)


def read_credentials(plan: ServingPlan) -> Credentials:
    """Return the accepted secrets. Raises UsageError as `check_access`."""
    token, login = _secret("token_file", plan.token_file), _secret("password_file", plan.password_file)
    if not all(33 <= byte <= 126 for byte in token or b""):
        raise UsageError(
            f"metrics.token_file: the token in {plan.token_file} has characters that HTTP headers do not allow; "
            f"create one with: openssl rand -hex 32 > {plan.token_file}",
            code="token-characters",
        )
    if login is not None and not all(login.partition(b":")):
        raise UsageError(
            f"metrics.password_file: {plan.password_file} must hold user:password, on one line", code="password-form"
        )
    return {
        **({} if token is None else {"bearer": token}),
        **({} if login is None else {"basic": base64.b64encode(login)}),
    }


def tls_context(plan: ServingPlan) -> ssl.SSLContext | None:
    """Return the TLS context; None for plain HTTP. Raises UsageError as `check_access`."""
    certificate, key = plan.certificate_file, plan.key_file
    if certificate is None:
        if key is not None:
            text = "metrics.key_file needs metrics.certificate_file: name the certificate of this key"
            raise UsageError(text, code="certificate-missing")
        return None
    _content("certificate_file", certificate)
    _content("key_file", key or certificate)
    context = ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER)
    context.minimum_version = ssl.TLSVersion.TLSv1_2

    def no_password() -> str:
        raise UsageError(
            f"metrics.key_file: the key in {key or certificate} is encrypted, and its password cannot be asked for; "
            f"decrypt it with: openssl pkey -in ENCRYPTED -out {key or certificate}",
            code="key-encrypted",
        )

    try:
        context.load_cert_chain(certificate, key, password=no_password)
    except ssl.SSLError as error:
        raise UsageError(
            f"metrics.certificate_file: {certificate} and {key or 'the key in it'} cannot be used "
            f"({error.reason or error}); both must be PEM, the certificate before its chain, and the key its own",
            code="certificate-unusable",
        ) from error
    return context


def _secret(setting: str, path: Path | None) -> bytes | None:
    if path is None:
        return None
    lines = _content(setting, path).strip().splitlines()
    fix = "it must hold only the secret, on one line"
    if not lines:
        raise UsageError(f"metrics.{setting}: {path} is empty; {fix}", code="secret-empty")
    if len(lines) > 1:
        raise UsageError(f"metrics.{setting}: {path} has more than one line; {fix}", code="secret-lines")
    return lines[0]


def _content(setting: str, path: Path) -> bytes:
    try:
        return path.read_bytes()
    except OSError as error:
        raise UsageError(
            f"metrics.{setting}: {path} cannot be read ({error.strerror or error}); name a file that the trainer may "
            f"read",
            code="secret-unreadable",
        ) from error


_PORTS = 50
_CONNECTIONS = 64
_HANDSHAKE_SECONDS = 10.0
_IDLE_SECONDS = 120.0  # longer than most scrape intervals, because Prometheus keeps its connections
_PLAIN = "text/plain; charset=utf-8"
_COMPRESSION = 1  # the fastest level: of pages that repeat themselves, little is gained by the others


@dataclass(frozen=True)
class Site:
    """What is served: the metrics `page`, of type `CONTENT_TYPE`, and for `/healthz` whether the run makes progress.

    A request for the metrics that names another run than `run_id` gets 404.
    """

    page: Callable[[], bytes]
    health: Callable[[], bool]
    credentials: Credentials
    tls: ssl.SSLContext | None
    run_id: str


CANNOT_LISTEN = "set metrics.port to another (0: any free one), or metrics.host to an address of this machine"
"""What to do if `bind` raises OSError."""


def bind(host: str, port: int, site: Site) -> Server:
    """Return a server at `port` of `host`, or at the next free port above. Raises OSError if there is none."""
    ports = range(port, min(port + _PORTS, 65_536))
    for candidate in ports:
        try:
            return Server(host, candidate, site)
        except OSError as error:
            if error.errno != errno.EADDRINUSE:
                raise
    why = f"metrics ports {port} to {ports[-1]} are all in use" if ports else "there is no metrics port above 65535"
    raise OSError(errno.EADDRINUSE, why)


class Server(ThreadingHTTPServer):
    """Serves a site. If too many clients are connected, the one idle longest is disconnected."""

    request_queue_size = 128

    def __init__(self, host: str, port: int, site: Site) -> None:
        # An empty metrics.host means all interfaces.
        host = host or "0.0.0.0"  # nosec B104
        family, _, _, _, address = socket.getaddrinfo(host, port, type=socket.SOCK_STREAM)[0]
        self.address_family = family
        self.site = site
        self.last_scrape: float | None = None  # start of the latest answered scrape (monotonic)
        self._lock = Lock()
        self._clients: OrderedDict[socket.socket, float] = OrderedDict()  # latest scrapes, by latest answer
        super().__init__((str(address[0]), port), _Handler)

    def server_bind(self) -> None:
        """Bind without a reverse DNS lookup, which can take seconds on a cluster."""
        TCPServer.server_bind(self)
        self.server_name = str(self.server_address[0])
        self.server_port = int(self.server_address[1])

    def get_request(self) -> tuple[socket.socket, Any]:
        """Accept a connection; its TLS handshake is left to its thread."""
        client, address = super().get_request()
        if self.site.tls is not None:
            client = self.site.tls.wrap_socket(client, server_side=True, do_handshake_on_connect=False)
        return client, address

    def process_request(self, request: Any, client_address: Any) -> None:
        """Handle a connection in its own thread."""
        with self._lock:
            if len(self._clients) >= _CONNECTIONS:
                oldest, _ = self._clients.popitem(last=False)
                # Shut down the plain socket: its thread, which may be reading through TLS, then sees the end.
                with suppress(OSError):
                    socket.socket.shutdown(oldest, socket.SHUT_RDWR)
            self._clients[request] = -math.inf
        super().process_request(request, client_address)

    def shutdown_request(self, request: Any) -> None:
        """Close a connection."""
        with self._lock:
            self._clients.pop(request, None)
        super().shutdown_request(request)

    def note_activity(self, client: socket.socket) -> None:
        """Record that `client` has just been answered."""
        with self._lock:
            if client in self._clients:
                self._clients.move_to_end(client)

    def note_scrape(self, client: socket.socket, moment: float) -> None:
        """Record that a scrape by `client` that started at `moment` has been answered."""
        with self._lock:
            self.last_scrape = moment
            if client in self._clients:
                self._clients[client] = moment

    def all_have_scraped(self, moment: float, recent: float) -> bool:
        """Return whether every regular scraper, and at least one client, has scraped after `moment`.

        Regular scrapers are the connected clients that scraped in the `recent` seconds before `moment`, because
        Prometheus keeps its connections.
        """
        with self._lock:
            is_awaited = any(moment - recent < scraped <= moment for scraped in self._clients.values())
            return not is_awaited and self.last_scrape is not None and self.last_scrape > moment

    def handle_error(self, request: Any, client_address: Any) -> None:
        """Ignore a failed client: the exporter's process has no log."""


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
            self.close_connection = True  # the body that follows is not a request
        if self.command not in ("GET", "HEAD"):
            self.close_connection = True
            self._answer(HTTPStatus.METHOD_NOT_ALLOWED, b"GET and HEAD only\n", [("Allow", "GET, HEAD")])
            self.wfile.flush()
            return False
        return True

    def do_GET(self) -> None:
        url = urlsplit(self.path)
        match url.path:
            case "/metrics":
                self._metrics(parse_qs(url.query).get("run_id", []))
            case "/healthz":
                is_well = self.server.site.health()
                status = HTTPStatus.OK if is_well else HTTPStatus.SERVICE_UNAVAILABLE
                self._answer(status, b"ok\n" if is_well else b"no progress\n")
            case _:
                self._answer(HTTPStatus.NOT_FOUND, b"see /metrics\n")

    do_HEAD = do_GET  # noqa: N815 (the name is the library's)

    def _metrics(self, asked: Sequence[str]) -> None:
        """Answer with the page, unless other runs are `asked` for."""
        credentials = self.server.site.credentials
        if not is_admitted(self.headers.get("Authorization", ""), credentials):
            challenges = [("WWW-Authenticate", _CHALLENGES[scheme]) for scheme in credentials]
            self._answer(HTTPStatus.UNAUTHORIZED, b"authorization required\n", challenges)
            return
        if asked and self.server.site.run_id not in asked:
            self._answer(HTTPStatus.NOT_FOUND, b"another run is here\n")
            return
        begun = time.monotonic()
        page, encodings = self.server.site.page(), self.headers.get("Accept-Encoding", "").split(",")
        if "gzip" in (each.partition(";")[0].strip() for each in encodings):  # as Prometheus asks
            compressed = gzip.compress(page, _COMPRESSION)
            self._answer(HTTPStatus.OK, compressed, [("Content-Encoding", "gzip")], CONTENT_TYPE)
        else:
            self._answer(HTTPStatus.OK, page, content_type=CONTENT_TYPE)
        if self.command == "GET":
            self.wfile.flush()
            self.server.note_scrape(self.request, begun)

    def _answer(
        self, status: HTTPStatus, body: bytes, headers: Sequence[tuple[str, str]] = (), content_type: str = _PLAIN
    ) -> None:
        closing = [("Connection", "close")] if self.close_connection else []
        self.send_response(status)
        for name, value in (("Content-Type", content_type), ("Content-Length", str(len(body))), *headers, *closing):
            self.send_header(name, value)
        self.end_headers()
        if self.command != "HEAD":
            self.wfile.write(body)
        self.server.note_activity(self.request)

    def log_message(self, format: str, *args: Any) -> None:
        """Keep scrapes out of the log."""
