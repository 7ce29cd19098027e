"""Heartbeats between the ranks of a launch: datagrams, the addresses they go to, and who has been heard lately."""

from __future__ import annotations

import fcntl
import hmac
import socket
import struct
from collections.abc import Mapping
from contextlib import suppress
from dataclasses import dataclass
from enum import IntEnum
from ipaddress import IPv6Address
from pathlib import Path

_SIOCGIFADDR = 0x8915
_BUFFER = 4 << 20
"""Bytes; the kernel grants less where net.core.rmem_max is less."""

Address = tuple[str, int]


def own_addresses() -> list[str]:
    """Return the addresses of this node's interfaces, IPv4 first, those for the node itself last."""
    found = [*interface_addresses().values(), *_version_6()]
    with suppress(OSError):  # a node may not know its own name
        found += [str(info[4][0]) for info in socket.getaddrinfo(socket.gethostname(), None, type=socket.SOCK_DGRAM)]
    unique = list(dict.fromkeys(found))
    return sorted(unique, key=lambda address: address.startswith("127.") or address == "::1")


def open_datagrams() -> socket.socket:
    """Return a non-blocking socket on a free port of every interface, IPv4 and, where the node has it, IPv6."""
    opened: socket.socket | None = None
    with suppress(OSError):  # IPv6 may be switched off
        opened = socket.socket(socket.AF_INET6, socket.SOCK_DGRAM)
        opened.setsockopt(socket.IPPROTO_IPV6, socket.IPV6_V6ONLY, 0)
        opened.bind(("::", 0))
        return _prepared(opened)
    if opened is not None:
        opened.close()
    opened = socket.socket(socket.AF_INET, socket.SOCK_DGRAM)
    opened.bind(("", 0))
    return _prepared(opened)


def reachable_from(datagrams: socket.socket, address: str) -> str | None:
    """Return `address` as this socket must be given it; None where it speaks IPv4 alone and `address` is IPv6."""
    if datagrams.family == socket.AF_INET6:
        return address if ":" in address else f"::ffff:{address}"
    return None if ":" in address else address


def _prepared(datagrams: socket.socket) -> socket.socket:
    datagrams.setblocking(False)
    datagrams.setsockopt(socket.SOL_SOCKET, socket.SO_RCVBUF, _BUFFER)
    return datagrams


def interface_addresses() -> dict[str, str]:
    """Return this node's interfaces with their IPv4 addresses; without those that have none."""
    found = {}
    with socket.socket(socket.AF_INET, socket.SOCK_DGRAM) as asking:
        for _, name in socket.if_nameindex():
            with suppress(OSError):
                answer = fcntl.ioctl(asking.fileno(), _SIOCGIFADDR, struct.pack("256s", name.encode()[:15]))
                found[name] = socket.inet_ntoa(answer[20:24])
    return found


def _version_6() -> list[str]:
    try:
        lines = Path("/proc/net/if_inet6").read_text().splitlines()
    except OSError:
        return []
    addresses = (IPv6Address(bytes.fromhex(line.split()[0])) for line in lines)
    return [str(address) for address in addresses if not address.is_link_local]


TOKEN_BYTES = 32
"""Of the launch's secret, which no datagram holds."""
LARGEST = 2048
"""Bytes; longer texts are cut."""

_TAG_BYTES = 16
"""Of a datagram's HMAC-SHA256 by the launch's token, at its beginning."""
_HEAD = struct.Struct("!BIH")


class Kind(IntEnum):
    """What a datagram means."""

    BEAT = 1
    """A rank lives. Its text is the rank's place."""
    ANSWER = 2
    """Rank 0 lives, and has heard a beat."""
    CALL = 3
    """As ANSWER, and a beat is due at once."""
    LEAVE = 4
    """The sender leaves for a good reason: do not miss it."""
    FAIL = 5
    """The sender leaves by an error: the others cannot continue without it."""
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
    """Return `datagram` as bytes, authenticated by the launch's `token`."""
    head = _HEAD.pack(datagram.kind, datagram.rank, datagram.path)
    content = head + datagram.text.encode(errors="replace")[: LARGEST - _TAG_BYTES - _HEAD.size]
    return _tag(token, content) + content


def decode(token: bytes, data: bytes) -> Datagram | None:
    """Return the datagram of this launch in `data`; None where nobody with its `token` has made it."""
    tag, content = data[:_TAG_BYTES], data[_TAG_BYTES:]
    if len(content) < _HEAD.size or not hmac.compare_digest(tag, _tag(token, content)):
        return None
    kind, rank, path = _HEAD.unpack_from(content)
    if kind not in Kind.__members__.values():
        return None
    return Datagram(Kind(kind), rank, path, content[_HEAD.size :].decode(errors="replace"))


def _tag(token: bytes, content: bytes) -> bytes:
    return hmac.digest(token, content, "sha256")[:_TAG_BYTES]


_PAUSE = 2.0
"""Beats between two looks, from which on the watcher itself has slept."""
_STREAK = 2.0
"""Beats that others may be short of `timeout` when they are named with the first that is lost."""
_MOST_NAMES = 8


class Attendance:
    """The other ranks that one rank watches. A rank is watched from the first time that it is heard."""

    def __init__(self, *, timeout: float, beat: float, now: float) -> None:
        """Begin at `now`; who is silent for `timeout` is lost. `silent` is to be asked once a `beat`, at least."""
        self._timeout = timeout
        self._beat = beat
        self._looked = now
        self._heard: dict[int, float] = {}
        self._left: set[int] = set()
        self._failed: tuple[int, float] | None = None

    def hear(self, rank: int, now: float) -> None:
        """Take note that `rank` lives; a late datagram of one that has left does not bring it back."""
        if rank not in self._left:
            self._heard[rank] = now

    def leave(self, rank: int) -> None:
        """Take note that `rank` has left, and is not to be missed."""
        self._left.add(rank)
        self._heard.pop(rank, None)

    def fail(self, rank: int, now: float) -> None:
        """Take note that `rank` has left by an error, so that all must end within `timeout`."""
        self.leave(rank)
        if self._failed is None:
            self._failed = (rank, now)

    @property
    def present(self) -> list[int]:
        """The ranks that are watched."""
        return sorted(self._heard)

    def unheard_since(self, moment: float) -> list[int]:
        """Return those that have said nothing since `moment`."""
        return sorted(rank for rank, heard in self._heard.items() if heard < moment)

    def silent(self, now: float) -> list[int]:
        """Return those that are lost; nobody right after the watcher has slept: all get `timeout` anew.

        A node that dies takes several ranks: once one is lost, those that have been silent for nearly as
        long are named with it.
        """
        slept = now - self._looked > _PAUSE * self._beat
        self._looked = now
        if slept:
            self._heard = dict.fromkeys(self._heard, now)
            if self._failed is not None:
                self._failed = (self._failed[0], now)
            return []
        if not any(now - heard >= self._timeout for heard in self._heard.values()):
            return []
        return self.unheard_since(now - self._timeout + _STREAK * self._beat)

    def overstayed(self, now: float) -> int | None:
        """Return the rank whose error should have ended this one by now."""
        if self._failed is None or now - self._failed[1] < self._timeout:
            return None
        return self._failed[0]


def name_ranks(ranks: list[int], peers: Mapping[int, str]) -> str:
    """Return "rank 3 (node2, process 4242)", for several likewise; of very many the first, and how many more."""
    named = [f"{rank} ({peers[rank]})" for rank in ranks[:_MOST_NAMES]]
    more = len(ranks) - len(named)
    ending = f" and {more} more" if more else ""
    return f"rank{'s' if len(ranks) > 1 else ''} {', '.join(named)}{ending}"


def loss_message(ranks: list[int], peers: Mapping[int, str], timeout: float) -> str:
    """Return the message for lost `ranks`."""
    verb = "have" if len(ranks) > 1 else "has"
    return f"{name_ranks(ranks, peers)} {verb} not answered for {timeout:g} s; {_FIX}"


def overstay_message(rank: int, peers: Mapping[int, str], timeout: float) -> str:
    """Return the message of a rank that still runs `timeout` after `rank` has failed."""
    return f"{name_ranks([rank], peers)} has failed, and the others have not ended within {timeout:g} s; {_FIX}"


_FIX = "the run ends; start the same command again to resume from the last checkpoint"
