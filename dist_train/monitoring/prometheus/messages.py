"""The messages between a trainer and its exporter's process, in MessagePack, and the channel that carries them.

A message is (`_FORM`, the name of its type, its fields by name). msgspec validates the fields against the type's
declaration; NaN and infinities pass unchanged. We use msgspec because it needs a fraction of pydantic's memory, and
every rank may have an exporter's process.
"""

from __future__ import annotations

import mmap
import os
import select
import socket
import zlib
from collections import deque
from collections.abc import Iterator, Mapping
from contextlib import suppress
from dataclasses import dataclass, fields
from pathlib import Path
from typing import TYPE_CHECKING, Any, TypeAlias, get_args

import msgspec

from dist_train.rundir.records import EvaluationRecord, EventRecord, Measurement, Outcome, RunFacts, TrainRecord

if TYPE_CHECKING:
    # Its import would double the memory of the exporter's process.
    from dist_train.config.sections import MetricsSettings

_EVERYWHERE = frozenset({"", "0.0.0.0", "::"})  # nosec B104


@dataclass(frozen=True)
class ServingPlan:
    """The `metrics.*` settings of the same names; paths are absolute."""

    host: str
    port: int
    token_file: Path | None = None
    password_file: Path | None = None
    certificate_file: Path | None = None
    key_file: Path | None = None
    targets_directory: Path | None = None
    advertised_host: str | None = None
    pushgateway: str | None = None
    last_scrape_seconds: float = 0.0

    @property
    def scheme(self) -> str:
        """The scheme of the address."""
        return "https" if self.certificate_file else "http"

    def host_for_others(self, node: str) -> str:
        """Return the host under which others reach the node called `node`; in brackets if it is an IPv6 address."""
        host = self.advertised_host or ((node or socket.gethostname()) if self.host in _EVERYWHERE else self.host)
        return f"[{host}]" if ":" in host else host


def plan_of(settings: MetricsSettings) -> ServingPlan:
    """Return the part of `settings` that the exporter's process needs."""
    values = {field.name: getattr(settings, field.name) for field in fields(ServingPlan)}
    paths = {name: path.absolute() for name, path in values.items() if isinstance(path, Path)}
    return ServingPlan(**values | paths)


@dataclass(frozen=True)
class Begin:
    """To the exporter: serve this run. `counts` are its events before this launch, by kind."""

    plan: ServingPlan
    facts: RunFacts
    counts: Mapping[str, int]


@dataclass(frozen=True)
class Progress:
    """To the exporter: `step` updates are done."""

    step: int


@dataclass(frozen=True)
class Serving:
    """From the exporter: it serves at `address` and has written the target file `target`; None if it could not."""

    address: str
    target: Path | None


@dataclass(frozen=True)
class Warned:
    """From the exporter: a warning for the user."""

    text: str


@dataclass(frozen=True)
class Ending:
    """From the exporter: it ends within `seconds`, of which it waits `for_scrape` for a last scrape."""

    seconds: float
    for_scrape: float


ToExporter: TypeAlias = Begin | Progress | TrainRecord | EvaluationRecord | EventRecord | Measurement | Outcome
FromExporter: TypeAlias = Serving | Warned | Ending
Message: TypeAlias = ToExporter | FromExporter


def _to_builtin(value: object) -> object:
    """Convert `value`, of a type that msgspec does not know, to a MessagePack type."""
    if isinstance(value, Path):
        return os.fsencode(value)  # a file's name need not be UTF-8
    raise TypeError(f"{value!r} cannot be sent")


def _from_builtin(declared: type, value: Any) -> Path:
    if declared is Path and isinstance(value, bytes):
        return Path(os.fsdecode(value))
    raise TypeError(f"expected {declared}, got {value!r}")


def _printable(value: Any) -> Any:
    """Return `value`, made of builtins, with invalid UTF-8 in its strings escaped."""
    match value:
        case str():
            return value.encode("utf-8", "backslashreplace").decode()
        case dict():
            return {name: _printable(inner) for name, inner in value.items()}
        case list() | tuple():
            return [_printable(inner) for inner in value]
    return value


_ENCODER = msgspec.msgpack.Encoder(enc_hook=_to_builtin)
_ENVELOPE = msgspec.msgpack.Decoder(tuple[int, str, msgspec.Raw])
_DECODERS: Mapping[str, msgspec.msgpack.Decoder[Any]] = {
    declared.__name__: msgspec.msgpack.Decoder(declared, dec_hook=_from_builtin) for declared in get_args(Message)
}
_SCHEMA = msgspec.json.schema_components(get_args(Message), schema_hook=lambda declared: {"type": "string"})
_FORM = zlib.crc32(repr(_SCHEMA).encode())  # differs if the installed code was replaced in between


def encode(message: Message) -> bytes:
    """Return `message` as MessagePack. Raises TypeError if it holds other than plain values."""
    name = type(message).__name__
    try:
        return _ENCODER.encode((_FORM, name, message))
    except UnicodeEncodeError:
        plain = msgspec.to_builtins(message, enc_hook=_to_builtin, builtin_types=(bytes,))
        return _ENCODER.encode((_FORM, name, _printable(plain)))


def decode(content: bytes | memoryview) -> Message:
    """Return the message in `content`. Raises ValueError if it is truncated or not a message (msgspec.DecodeError), or
    if its version or its fields do not match (msgspec.ValidationError).
    """
    form, name, fields = _ENVELOPE.decode(content)
    if form != _FORM or name not in _DECODERS:
        raise msgspec.ValidationError(f"{name!r} is not a message of this version")
    message: Message = _DECODERS[name].decode(fields)
    return message


_KEPT = 1000
_BUFFER_BYTES = 4 << 20  # the kernel grants at most twice that; a measurement of 1,024 ranks takes 150 KB


class Channel:
    """One end of a socket pair that carries whole messages, never blocks, and detects that the other end is gone."""

    def __init__(self, end: socket.socket) -> None:
        end.setblocking(False)
        end.setsockopt(socket.SOL_SOCKET, socket.SO_SNDBUF, _BUFFER_BYTES)
        self._socket = end
        # Only the pages that messages touch take memory.
        self._buffer = memoryview(mmap.mmap(-1, 2 * _BUFFER_BYTES))
        self._waiting: deque[Message] = deque(maxlen=_KEPT)

    def fileno(self) -> int:
        """Return the descriptor, to wait for messages."""
        return self._socket.fileno()

    def send(self, message: Message) -> bool:
        """Send `message` and return whether it was sent. If the other end is behind, the message waits for the next
        call, or is dropped if later messages supersede it. Raises OSError if the other end is gone.
        """
        self.flush()
        with suppress(BlockingIOError):
            if not self._waiting:
                self._socket.send(encode(message))
                return True
        if not isinstance(message, TrainRecord | Measurement | Progress):
            self._waiting.append(message)
        return False

    def flush(self) -> None:
        """Send waiting messages, as far as the buffer has space. Raises OSError if the other end is gone."""
        with suppress(BlockingIOError):
            while self._waiting:
                self._socket.send(encode(self._waiting[0]))
                self._waiting.popleft()

    def receive(self) -> Iterator[Message]:
        """Yield the received messages. Raises EOFError once the other end is gone and all its messages were received;
        ValueError if something else was received.
        """
        while True:
            try:
                size = self._socket.recv_into(self._buffer)
            except BlockingIOError:
                return
            except ConnectionResetError:
                continue  # reported once if the other end left messages unread; the messages that it sent follow
            if size == 0:
                raise EOFError
            yield decode(self._buffer[:size])

    def close(self) -> None:
        """Close the socket."""
        self._socket.close()


def await_input(seconds: float, *files: Channel | int) -> None:
    """Wait until one of `files` can be read, up to `seconds`. Unlike select, poll takes descriptors beyond 1,023."""
    poll = select.poll()
    for file in files:
        poll.register(file, select.POLLIN)
    poll.poll(seconds * 1000)


def socket_pair() -> tuple[socket.socket, socket.socket]:
    """Return two connected sockets, one for each channel."""
    return socket.socketpair(socket.AF_UNIX, socket.SOCK_SEQPACKET)
