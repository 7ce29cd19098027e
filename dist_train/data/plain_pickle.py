"""Pickles of plain values and number arrays, read without running anything that they name.

The standard CIFAR archives are pickles. The names that such a file may hold are mapped to functions
below, which read bytes and nothing else; every other name, and every opcode that plain data does not
need, is refused before a single value is made.
"""

from __future__ import annotations

import io
import pickle
import pickletools
from collections.abc import Callable
from typing import Any

import numpy as np
from numpy.typing import NDArray

_OPCODES = frozenset(
    (
        "PROTO",
        "FRAME",
        "STOP",
        "MARK",
        "POP",
        "POP_MARK",
        "DUP",
        "MEMOIZE",
        "BINPUT",
        "LONG_BINPUT",
        "BINGET",
        "LONG_BINGET",
        "NONE",
        "NEWTRUE",
        "NEWFALSE",
        "BININT",
        "BININT1",
        "BININT2",
        "LONG1",
        "LONG4",
        "BINFLOAT",
        "BINSTRING",
        "SHORT_BINSTRING",
        "BINBYTES",
        "SHORT_BINBYTES",
        "BINBYTES8",
        "BYTEARRAY8",
        "BINUNICODE",
        "SHORT_BINUNICODE",
        "BINUNICODE8",
        "EMPTY_TUPLE",
        "TUPLE",
        "TUPLE1",
        "TUPLE2",
        "TUPLE3",
        "EMPTY_LIST",
        "LIST",
        "APPEND",
        "APPENDS",
        "EMPTY_DICT",
        "DICT",
        "SETITEM",
        "SETITEMS",
        "GLOBAL",
        "STACK_GLOBAL",
        "REDUCE",
        "BUILD",
    )
)
_NUMBERS = frozenset(f"{kind}{width}" for kind in "iu" for width in (1, 2, 4, 8))


class PlainPickleError(ValueError):
    """The bytes are no pickle, a damaged one, or one with more in it than plain values and arrays."""


def load_record(content: bytes) -> dict[str, object]:
    """Return the dictionary pickled in `content`; arrays of integers come as NumPy arrays.

    Python 2's strings come as bytes, and keys as text. Raises PlainPickleError; never runs code from
    `content`.
    """
    try:
        _check_opcodes(content)
        record = _PlainUnpickler(io.BytesIO(content), encoding="bytes").load()
        if not isinstance(record, dict):
            raise PlainPickleError(f"it holds a {type(record).__name__}, not a dictionary")
        return {_text(name): _plain(value) for name, value in record.items()}
    except PlainPickleError:
        raise
    except Exception as error:
        # Damaged pickles raise errors of nearly any type, MemoryError included.
        raise PlainPickleError(f"it is no sound pickle ({type(error).__name__}: {error})") from error


def _check_opcodes(content: bytes) -> None:
    """Refuse opcodes that plain data does not need, lengths beyond the end, huge memo numbers."""
    for opcode, argument, position in pickletools.genops(content):
        if opcode.name not in _OPCODES:
            raise PlainPickleError(f"opcode {opcode.name} at byte {position} has no place in plain data")
        if opcode.name == "LONG_BINPUT" and isinstance(argument, int) and argument > len(content):
            raise PlainPickleError(f"memo number {argument} at byte {position} is out of range")


class _PlainUnpickler(pickle.Unpickler):
    def find_class(self, module: str, name: str) -> Any:
        make = _ADMITTED.get((module, name))
        if make is None:
            raise PlainPickleError(f"it names {module}.{name}, which plain data does not need")
        # A new function each time: a pickle can set attributes of what it is handed.
        return lambda *arguments: make(*arguments)

    def persistent_load(self, pid: Any) -> Any:
        raise PlainPickleError("it refers to an object outside the file")


class _Number:
    """The type of an array's elements, an integer of 1 to 8 bytes."""

    def __init__(self, name: str | bytes, *_: object) -> None:
        self.name = _text(name)
        self.byte_order = "|"
        if self.name not in _NUMBERS:
            raise PlainPickleError(f"it holds an array of {self.name!r}, not of integers")

    def __setstate__(self, state: tuple[Any, ...]) -> None:
        self.byte_order = _text(state[1])

    def array(self, content: bytes | bytearray) -> NDArray[Any]:
        if not isinstance(content, bytes | bytearray):
            raise PlainPickleError("it holds an array without bytes")
        order = self.byte_order if self.byte_order in "<>" else "="
        return np.frombuffer(content, np.dtype(self.name).newbyteorder(order))  # type: ignore[arg-type]


class _Array:
    """An array whose content follows, as NumPy pickles it up to protocol 4."""

    def __init__(self, *_: object) -> None:
        self.content: NDArray[Any] | None = None

    def __setstate__(self, state: tuple[Any, ...]) -> None:
        _, shape, number, column_first, content = state
        self.content = number.array(content).reshape(shape, order="F" if column_first else "C")


def _array_from_buffer(
    content: bytes | bytearray, number: _Number, shape: tuple[int, ...], order: str, *_: object
) -> NDArray[Any]:
    """Make an array as NumPy pickles it with protocol 5."""
    return number.array(content).reshape(shape, order="F" if order == "F" else "C")


def _scalar(number: _Number, content: bytes) -> int:
    return int(number.array(content)[0])


def _bytes(text: str, encoding: str) -> bytes:
    """Make bytes as Python 3 pickles them with protocol 2."""
    if encoding != "latin1":
        raise PlainPickleError(f"it holds bytes written as {encoding!r}")
    return text.encode("latin1")


_ADMITTED: dict[tuple[str, str], Callable[..., Any]] = {
    ("numpy", "ndarray"): _Array,
    ("numpy", "dtype"): _Number,
    ("_codecs", "encode"): _bytes,
    **{(f"numpy.{core}.multiarray", "_reconstruct"): _Array for core in ("core", "_core")},
    **{(f"numpy.{core}.multiarray", "scalar"): _scalar for core in ("core", "_core")},
    **{(f"numpy.{core}.numeric", "_frombuffer"): _array_from_buffer for core in ("core", "_core")},
}


def _plain(value: object) -> object:
    return value.content if isinstance(value, _Array) else value


def _text(name: object) -> str:
    if isinstance(name, bytes):
        return name.decode("ascii")
    if isinstance(name, str):
        return name
    raise PlainPickleError(f"it holds a {type(name).__name__} where a name belongs")
