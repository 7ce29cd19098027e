"""Messages as JSON and back: `[type, [value, ...]]`, read as the dataclass of that name declares its fields.

Values without names: with them a measurement of many ranks would take three times the room, and a socket's buffer may
hold 400 KB only. The standard library alone: pydantic would add half to the memory of the exporter's process. Both ends
are ours, so NaN and infinities stand as Python's JSON writes them.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Mapping
from contextlib import suppress
from dataclasses import fields, is_dataclass
from functools import cache
from numbers import Integral, Real
from pathlib import Path
from types import UnionType
from typing import Any, TypeAlias, get_args, get_origin, get_type_hints

from dist_train.monitoring.prometheus.messages import Message

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
