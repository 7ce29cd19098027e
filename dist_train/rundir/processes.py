"""Whether a process that a file names still runs, from /proc."""

from __future__ import annotations

import os
from contextlib import suppress
from pathlib import Path


def pid_namespace() -> str:
    """Return the PID namespace of this process, which may be a container's; empty if it is unknown."""
    with suppress(OSError):
        return os.readlink("/proc/self/ns/pid")
    return ""


def process_start(pid: int) -> int | None:
    """Return the start of process `pid` in clock ticks since boot; None if it is gone or a zombie."""
    try:
        stat = Path(f"/proc/{pid}/stat").read_bytes()
    except OSError:
        return None
    fields = stat.rpartition(b")")[2].split()
    return None if fields[0] in b"ZX" else int(fields[19])


def process_runs(pid: int, seen: float) -> bool:
    """Whether process `pid` runs and is the one last seen at `seen` (seconds since 1970), not a reused PID."""
    start = process_start(pid)
    if start is None:
        return False
    try:
        boot = next(line for line in Path("/proc/stat").read_text().splitlines() if line.startswith("btime"))
    except OSError:
        return False
    # The boot time has a resolution of one second.
    return int(boot.split()[1]) + start / os.sysconf("SC_CLK_TCK") <= seen + 2.0
