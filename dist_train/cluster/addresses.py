"""This node's addresses, and a socket for datagrams on all of them."""

from __future__ import annotations

import fcntl
import socket
import struct
from contextlib import suppress
from ipaddress import IPv6Address
from pathlib import Path

_SIOCGIFADDR = 0x8915
_BUFFER = 4 << 20
"""Bytes; the kernel grants less where net.core.rmem_max is less."""

Address = tuple[str, int]


def own_addresses() -> list[str]:
    """Return the addresses of this node's interfaces, IPv4 first, those for the node itself last."""
    found = [*_version_4(), *_version_6()]
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


def _version_4() -> list[str]:
    found = []
    with socket.socket(socket.AF_INET, socket.SOCK_DGRAM) as asking:
        for _, name in socket.if_nameindex():
            with suppress(OSError):  # an interface without an IPv4 address
                answer = fcntl.ioctl(asking.fileno(), _SIOCGIFADDR, struct.pack("256s", name.encode()[:15]))
                found.append(socket.inet_ntoa(answer[20:24]))
    return found


def _version_6() -> list[str]:
    try:
        lines = Path("/proc/net/if_inet6").read_text().splitlines()
    except OSError:
        return []
    addresses = (IPv6Address(bytes.fromhex(line.split()[0])) for line in lines)
    return [str(address) for address in addresses if not address.is_link_local]
