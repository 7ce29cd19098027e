"""Files of another user."""

from __future__ import annotations

import os
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import pytest


def give_away(path: Path) -> bool:
    """Give `path` to another user; return False where even root may not, as in a user namespace."""
    try:
        os.chown(path, 12_345, -1)
    except OSError:
        return False
    return True


@contextmanager
def without_root() -> Iterator[None]:
    """Let the block run as another user if this is root, who may read everything; skip the test where it may not.

    The other user may not enter pytest's folders: the block uses paths relative to a current folder open to everybody.
    """
    is_root = os.geteuid() == 0
    if is_root:
        try:
            os.seteuid(12_345)
        except OSError:
            pytest.skip("this process may not become another user")
    try:
        yield
    finally:
        if is_root:
            os.seteuid(0)
