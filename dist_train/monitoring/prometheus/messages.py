"""What the trainer and its exporter send each other, and how it is encoded.

Values without names: with them a measurement of many ranks would take three times the room, and a socket's buffer may
hold 400 KB only. The standard library alone: pydantic would add half to the memory of the exporter's process. Both ends
are ours, so NaN and infinities stand as Python's JSON writes them.
"""

from __future__ import annotations

import json
import mmap
import socket
from collections.abc import Callable, Iterator, Mapping
from contextlib import suppress
from dataclasses import dataclass, fields, is_dataclass
from functools import cache
from numbers import Integral, Real
from pathlib import Path
from types import UnionType
from typing import Any, TypeAlias, get_args, get_origin, get_type_hints

from dist_train.monitoring.prometheus.serving_plan import ServingPlan
from dist_train.rundir.records import EvaluationRecord, EventRecord, Measurement, Outcome, RunFacts, TrainRecord

_Reader: TypeAlias = Callable[[Any], Any]
"""From a value of parsed JSON to one of the declared type. Raises ValueError where it is of another."""


def encode(message: Message) -> bytes:
    """Return `message` as JSON. Raises TypeError where it holds what JSON cannot: anything but plain values."""
    return _ENCODER.encode([type(message).__name__, message]).encode()


def decode(content: bytes) -> Message:
    """Return the message that `content` holds. Raises ValueError where it is none, or not as its type declares."""
    match json.loads(content):
        case [str(name), values]:
            message: Message = _message_reader(name)(values)
            return message
        case _:
            raise ValueError("not a message")


def _plain(value: object) -> object:
    """Return what JSON can hold in place of `value`, for what it does not know."""
    if isinstance(value, Path):
        return str(value)
    if is_dataclass(value):
        return list(value.__dict__.values())  # in the order of the fields, as they were assigned
    if isinstance(value, Mapping):
        return dict(value)
    # scalars of NumPy
    if isinstance(value, Integral):
        return int(value)
    if isinstance(value, Real):
        return float(value)
    raise TypeError(f"{value!r} cannot be sent")


_ENCODER = json.JSONEncoder(default=_plain, check_circular=False, separators=(",", ":"))


@cache
def _message_reader(name: str) -> _Reader:
    for message_type in get_args(Message):
        if message_type.__name__ == name:
            return _reader(message_type)
    raise ValueError(f"no message is a {name!r}")


@cache
def _reader(declared: Any) -> _Reader:
    """Return what reads values of the type `declared`."""
    if declared in _SCALARS:
        return _SCALARS[declared]
    if is_dataclass(declared):
        return _record_reader(declared)
    origin, arguments = get_origin(declared), get_args(declared)
    if origin is UnionType:
        return _union_reader(tuple(map(_reader, arguments)))
    if origin is tuple and arguments[1:] == (...,):
        return _tuple_reader(_reader(arguments[0]))
    if origin is Mapping and arguments[0] is str:
        return _mapping_reader(_reader(arguments[1]))
    raise TypeError(f"messages do not hold {declared}")


def _record_reader(record: Any) -> _Reader:
    declared = get_type_hints(record)
    readers = tuple(_reader(declared[field.name]) for field in fields(record))

    def read(value: Any) -> Any:
        if not isinstance(value, list) or len(value) != len(readers):
            raise ValueError(f"not the fields of {record.__name__}: {value!r}")
        return record(*(read_field(inner) for read_field, inner in zip(readers, value, strict=True)))

    return read


def _tuple_reader(read_item: _Reader) -> _Reader:
    def read(value: Any) -> tuple[Any, ...]:
        if not isinstance(value, list):
            raise ValueError(f"not a list: {value!r}")
        return tuple(map(read_item, value))

    return read


def _mapping_reader(read_value: _Reader) -> _Reader:
    def read(value: Any) -> Mapping[str, Any]:
        if not isinstance(value, dict):
            raise ValueError(f"not a mapping: {value!r}")
        return {name: read_value(inner) for name, inner in value.items()}

    return read


def _union_reader(alternatives: tuple[_Reader, ...]) -> _Reader:
    def read(value: Any) -> Any:
        for read_alternative in alternatives:
            with suppress(ValueError):
                return read_alternative(value)
        raise ValueError(f"of no type that is declared: {value!r}")

    return read


def _scalar_reader(*types: type) -> _Reader:
    def read(value: Any) -> Any:
        # by exact type: a bool is an int to isinstance
        if type(value) not in types:
            raise ValueError(f"not of {' or '.join(each.__name__ for each in types)}: {value!r}")
        return value

    return read


def _path(value: Any) -> Path:
    return Path(_SCALARS[str](value))


_SCALARS: Mapping[Any, _Reader] = {
    str: _scalar_reader(str),
    int: _scalar_reader(int),
    float: _scalar_reader(float, int),
    bool: _scalar_reader(bool),
    type(None): _scalar_reader(type(None)),
    Path: _path,
}


@dataclass(frozen=True)
class Begin:
    """To the exporter: serve this run. `counts`: its events before this launch, by kind."""

    plan: ServingPlan
    facts: RunFacts
    counts: Mapping[str, int]


@dataclass(frozen=True)
class Progress:
    """To the exporter: `step` updates are done."""

    step: int


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


ToExporter: TypeAlias = Begin | Progress | TrainRecord | EvaluationRecord | EventRecord | Measurement | End
FromExporter: TypeAlias = Serving | Warned | Ending | Failed
Message: TypeAlias = ToExporter | FromExporter


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
