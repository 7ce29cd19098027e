"""Waiting for conditions. The limit only ends hangs: no test requires a fast machine."""

from __future__ import annotations

import time
from collections.abc import Callable, Iterable
from pathlib import Path
from typing import TypeVar

Found = TypeVar("Found")

PATIENCE = 300.0
"""Seconds after which something counts as hanging, even on a busy machine."""


def wait_for(look: Callable[[], Found | None], story: str | Callable[[], str] = "", seconds: float = PATIENCE) -> Found:
    """Return the first true value of `look`; fail with `story` where there is none within `seconds`."""
    started = time.monotonic()
    while not (found := look()):
        waited = time.monotonic() - started
        assert waited < seconds, f"not within {seconds:g} s: {story if isinstance(story, str) else story()}"
        time.sleep(min(0.2, 0.01 + waited / 20))
    return found


def is_alive(pid: int) -> bool:
    """Whether the process runs; zombies do not."""
    try:
        return Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0] not in "ZX"
    except (FileNotFoundError, ProcessLookupError):
        return False


def wait_until_gone(pids: Iterable[int]) -> None:
    """Wait until none of the processes runs."""
    left = set(pids)
    wait_for(lambda: not any(map(is_alive, left)), lambda: f"left behind: {sorted(filter(is_alive, left))}")


def wait_for_lines(file: Path, count: int) -> None:
    """Wait until `file` has `count` complete lines."""
    wait_for(lambda: lines_of(file) >= count, f"{count} lines in {file}")


def lines_of(file: Path) -> int:
    """Return the number of complete lines in `file`; 0 where it does not exist."""
    try:
        return file.read_bytes().count(b"\n")
    except FileNotFoundError:
        return 0
