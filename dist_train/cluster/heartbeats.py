"""What the watchdogs of a launch say to each other: datagrams that carry the launch's token."""

from __future__ import annotations

import struct
from dataclasses import dataclass
from enum import IntEnum

TOKEN_BYTES = 16
LARGEST = 2048
"""Bytes; longer texts are cut."""

_HEAD = struct.Struct(f"!{TOKEN_BYTES}sBIH")


class Kind(IntEnum):
    """What a datagram means."""

    BEAT = 1
    """A rank lives. Its text is the rank's place."""
    ANSWER = 2
    """Rank 0 lives, and has heard a beat."""
    CALL = 3
    """As ANSWER, and a beat is wanted at once."""
    LEAVE = 4
    """The sender leaves for a good reason: do not miss it."""
    FAIL = 5
    """The sender leaves by an error: the others cannot go on without it."""
    FAREWELL = 6
    """The leave was heard."""
    LOST = 7
    """The run ends. The text says why."""


@dataclass(frozen=True)
class Datagram:
    """A message from rank `rank`; `path` is the number of rank 0's address that the beat was sent to."""

    kind: Kind
    rank: int
    path: int = 0
    text: str = ""


def encode(token: bytes, datagram: Datagram) -> bytes:
    """Return `datagram` as bytes."""
    head = _HEAD.pack(token, datagram.kind, datagram.rank, datagram.path)
    return head + datagram.text.encode()[: LARGEST - _HEAD.size]


def decode(token: bytes, data: bytes) -> Datagram | None:
    """Return the datagram of this launch in `data`; None where it is not one."""
    if len(data) < _HEAD.size or data[:TOKEN_BYTES] != token:
        return None
    _, kind, rank, path = _HEAD.unpack_from(data)
    if kind not in Kind.__members__.values():
        return None
    return Datagram(Kind(kind), rank, path, data[_HEAD.size :].decode(errors="replace"))
