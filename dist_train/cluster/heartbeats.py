"""Heartbeats between the ranks of a launch: datagrams, addresses to send them to, and which ranks were heard lately."""

from __future__ import annotations

import fcntl
import hmac
import socket
import struct
from collections.abc import Mapping
from contextlib import suppress
from dataclasses import dataclass
from enum import IntEnum
from ipaddress import IPv6Address, ip_address
from pathlib import Path

_SIOCGIFADDR = 0x8915
_BUFFER = 4 << 20  # bytes; the kernel grants less where net.core.rmem_max is less

Address = tuple[str, int]


def own_addresses() -> list[str]:
    """Return the addresses of this node's interfaces, IPv4 first, loopback last."""
    found = [*interface_addresses().values(), *(address for _, address in _ipv6_addresses())]
    with suppress(OSError):  # a node may not know its own name
        found += [str(info[4][0]) for info in socket.getaddrinfo(socket.gethostname(), None, type=socket.SOCK_DGRAM)]
    unique = list(dict.fromkeys(found))
    return sorted(unique, key=lambda address: (is_loopback(address), ":" in address))


def is_loopback(address: str) -> bool:
    """Whether only this node reaches `address`, IPv4 or IPv6."""
    return address.startswith("127.") or address == "::1"


def is_link_local(address: str) -> bool:
    """Whether only neighbours on one link, of which a node may have several, reach `address`, IPv4 or IPv6."""
    return ip_address(address).is_link_local


def resolve(name: str) -> str:
    """Return the address of the host `name`: IPv4, or IPv6 if it has no other. Raises OSError."""
    found = [str(info[4][0]) for info in socket.getaddrinfo(name, None, type=socket.SOCK_STREAM)]
    return min(found, key=lambda address: ":" in address)


def open_datagrams() -> socket.socket:
    """Return a non-blocking socket on a free port of every interface, IPv4 and, where the node has it, IPv6."""
    both = socket.has_dualstack_ipv6()
    datagrams = socket.socket(socket.AF_INET6 if both else socket.AF_INET, socket.SOCK_DGRAM)
    if both:
        datagrams.setsockopt(socket.IPPROTO_IPV6, socket.IPV6_V6ONLY, 0)
    datagrams.bind(("", 0))
    datagrams.setblocking(False)
    datagrams.setsockopt(socket.SOL_SOCKET, socket.SO_RCVBUF, _BUFFER)
    return datagrams


def reachable_from(datagrams: socket.socket, address: str) -> str:
    """Return `address` in the form that this socket takes; one of IPv4 alone reaches no IPv6 address."""
    return address if ":" in address or datagrams.family == socket.AF_INET else f"::ffff:{address}"


def interface_addresses() -> dict[str, str]:
    """Return the address of each of this node's interfaces that has one: IPv4, or IPv6 if it has no other."""
    found = {}
    with socket.socket(socket.AF_INET, socket.SOCK_DGRAM) as query:
        for _, name in socket.if_nameindex():
            with suppress(OSError):
                answer = fcntl.ioctl(query.fileno(), _SIOCGIFADDR, struct.pack("256s", name.encode()[:15]))
                found[name] = socket.inet_ntoa(answer[20:24])
    for name, address in _ipv6_addresses():
        found.setdefault(name, address)
    return found


def _ipv6_addresses() -> list[tuple[str, str]]:
    """Return interfaces and their IPv6 addresses, without those that only neighbours on one link reach."""
    try:
        lines = Path("/proc/net/if_inet6").read_text().splitlines()
    except OSError:
        return []
    found = ((line.split()[-1], IPv6Address(bytes.fromhex(line.split()[0]))) for line in lines)
    return [(name, str(address)) for name, address in found if not address.is_link_local]


TOKEN_BYTES = 32  # length of the launch's token, a secret that no datagram contains
LARGEST = 2048  # bytes of a datagram; longer texts are truncated

_TAG_BYTES = 16  # length of the HMAC-SHA256 by the launch's token, truncated, with which a datagram begins
_HEAD = struct.Struct("!BIH")


class Kind(IntEnum):
    """What a datagram means."""

    BEAT = 1  # a rank is alive; the text is its node and process
    ANSWER = 2  # rank 0 is alive, and has received a beat
    CALL = 3  # as ANSWER, and requests a beat at once
    LEAVE = 4  # the sender leaves in order and must not be reported as lost
    FAIL = 5  # the sender leaves because of an error: the others cannot continue without it
    FAREWELL = 6  # acknowledges LEAVE or FAIL
    LOST = 7  # the run ends; the text says why


@dataclass(frozen=True)
class Datagram:
    """A message from rank `rank`; `path` is the index of the address of rank 0 that the beat was sent to."""

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
    """Return the datagram in `data`; None unless it was made with this launch's `token`."""
    tag, content = data[:_TAG_BYTES], data[_TAG_BYTES:]
    if len(content) < _HEAD.size or not hmac.compare_digest(tag, _tag(token, content)):
        return None
    kind, rank, path = _HEAD.unpack_from(content)
    if kind not in Kind.__members__.values():
        return None
    return Datagram(Kind(kind), rank, path, content[_HEAD.size :].decode(errors="replace"))


def _tag(token: bytes, content: bytes) -> bytes:
    return hmac.digest(token, content, "sha256")[:_TAG_BYTES]


def longest_wait(timeout: float) -> float:
    """Return the seconds that ranks wait for one that sends heartbeats, but does not come: it may be merely busy."""
    return max(60.0, 3 * timeout)


BEATS_IN_TIMEOUT = 6
_BEAT_SPREAD = 0.25


def interval_of(rank: int, size: int, beat: float) -> float:
    """Return the seconds between the beats of `rank`: `beat`, or up to a quarter less.

    At equal intervals the beats of ranks that begin together would always arrive together. Rank 0's buffer may hold
    only a hundred of them (net.core.rmem_max), so those of the same ranks would be lost again and again.
    """
    return beat * (1.0 - _BEAT_SPREAD * rank / size)


_SUSPENDED_BEATS = 2.0  # a longer gap between two checks means that the watcher itself was suspended


class SuspensionDetector:
    """Detects that this process was suspended, so that the silence of others does not count."""

    def __init__(self, beat: float, now: float, slack: float = 0.0) -> None:
        """Begin at `now`; call `was_suspended` at least every `beat` seconds, or `slack` later."""
        self._longest = _SUSPENDED_BEATS * beat + slack
        self._checked = now

    def was_suspended(self, now: float) -> bool:
        """Whether this process was suspended since the last call."""
        gap, self._checked = now - self._checked, now
        return gap > self._longest


_STREAK_BEATS = 2.0  # ranks that are this close to `timeout`, in beats, are reported along with the first lost one
_MOST_NAMES = 8


class HeartbeatMonitor:
    """The other ranks that one rank watches, each from the first time that it is heard."""

    def __init__(self, *, timeout: float, beat: float, now: float) -> None:
        """Begin at `now`; a rank silent for `timeout` is lost. Call `silent` at least once per `beat`."""
        self._timeout = timeout
        self._beat = beat
        self._suspensions = SuspensionDetector(beat, now)
        self._heard: dict[int, float] = {}
        self._left: set[int] = set()
        self._failed: tuple[int, float] | None = None

    def hear(self, rank: int, now: float) -> None:
        """Record that `rank` is alive; a late datagram of a rank that has left does not bring it back."""
        if rank not in self._left:
            self._heard[rank] = now

    def leave(self, rank: int) -> None:
        """Record that `rank` has left and must not be reported as lost."""
        self._left.add(rank)
        self._heard.pop(rank, None)

    def fail(self, rank: int, now: float) -> None:
        """Record that `rank` has left because of an error, so that all must end within `timeout`."""
        self.leave(rank)
        if self._failed is None:
            self._failed = (rank, now)

    @property
    def present(self) -> list[int]:
        """The ranks that are watched."""
        return sorted(self._heard)

    @property
    def has_any_left(self) -> bool:
        """Whether a rank has left."""
        return bool(self._left)

    def unheard_since(self, moment: float) -> list[int]:
        """Return the watched ranks that were not heard since `moment`."""
        return sorted(rank for rank, heard in self._heard.items() if heard < moment)

    def silent(self, now: float) -> list[int]:
        """Return the lost ranks; none right after the watcher itself was suspended, which restarts every timeout.

        A dying node takes several ranks with it: once one is lost, those silent for nearly as long are reported, too.
        """
        if self._suspensions.was_suspended(now):
            self._heard = dict.fromkeys(self._heard, now)
            if self._failed is not None:
                self._failed = (self._failed[0], now)
            return []
        if not any(now - heard >= self._timeout for heard in self._heard.values()):
            return []
        return self.unheard_since(now - self._timeout + _STREAK_BEATS * self._beat)

    def past_deadline(self, now: float) -> int | None:
        """Return the rank whose error should have ended this process by now, if any."""
        if self._failed is None or now - self._failed[1] < self._timeout:
            return None
        return self._failed[0]


def name_ranks(ranks: list[int], peers: Mapping[int, str]) -> str:
    """Return "rank 3 (node2, process 4242)", likewise for several; of many, the first and the number of the others."""
    named = [f"{rank} ({peers[rank]})" for rank in ranks[:_MOST_NAMES]]
    more = len(ranks) - len(named)
    ending = f" and {more} more" if more else ""
    return f"rank{'s' if len(ranks) > 1 else ''} {', '.join(named)}{ending}"


def loss_message(ranks: list[int], peers: Mapping[int, str], timeout: float) -> str:
    """Return the message for lost `ranks`."""
    verb = "have" if len(ranks) > 1 else "has"
    return f"{name_ranks(ranks, peers)} {verb} not answered for {timeout:g} s; {_FIX}"


def deadline_message(rank: int, peers: Mapping[int, str], timeout: float) -> str:
    """Return the message of a rank that still runs `timeout` after `rank` has failed."""
    return f"{name_ranks([rank], peers)} has failed, and the others have not ended within {timeout:g} s; {_FIX}"


_FIX = "the run ends; start the same command again to resume from the last checkpoint"
