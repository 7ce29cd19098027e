"""Whether this machine has IPv6: many containers do not."""

from __future__ import annotations

import socket

import pytest


def can_bind(address: str) -> bool:
    """Whether this machine has the IPv6 `address`; one may make a socket for IPv6 even where no interface has any."""
    try:
        with socket.socket(socket.AF_INET6) as endpoint:
            endpoint.bind((address, 0))
    except OSError:
        return False
    return True


needs_ipv6 = pytest.mark.skipif(not can_bind("::1"), reason="this machine has no IPv6")
