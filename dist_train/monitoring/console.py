"""What rank 0 shows: a progress bar on a terminal, plain lines elsewhere."""

from __future__ import annotations

import os
import socket
import sys
from collections.abc import Mapping
from typing import TextIO

from dist_train.monitoring.observers import Observer
from dist_train.monitoring.plain_lines import PlainLines
from dist_train.monitoring.terminal_bar import TerminalBar

TERMINAL_VARIABLE = "DIST_TRAIN_TERMINAL"
"""Set by launch scripts to `[host:]/dev/pts/N`, for launchers put a pipe between a rank and it."""

_PSEUDO_TERMINALS_OF_LAUNCHERS = ("OMPI_COMM_WORLD_RANK", "PMIX_RANK")


def open_console(environment: Mapping[str, str] = os.environ) -> Observer:
    """Return the observer that suits the output at hand."""
    if environment.get("TERM", "dumb") in ("dumb", "unknown"):
        return PlainLines(sys.stdout)
    terminal = launcher_terminal(environment.get(TERMINAL_VARIABLE, ""))
    if terminal is not None:
        return TerminalBar(terminal)
    # mpirun gives every rank a pseudo-terminal, also when its own output goes to a file
    launched = any(name in environment for name in _PSEUDO_TERMINALS_OF_LAUNCHERS)
    if sys.stdout.isatty() and not launched:
        return TerminalBar(sys.stdout)
    return PlainLines(sys.stdout)


def launcher_terminal(address: str) -> TextIO | None:
    """Open the terminal at `[host:]device`; None where it is another host's, or none that can be opened."""
    host, _, device = address.rpartition(":")
    if host not in ("", socket.gethostname()) or not device.startswith("/dev/"):
        return None
    try:
        descriptor = os.open(device, os.O_WRONLY | os.O_NOCTTY | os.O_CLOEXEC)
    except OSError:
        return None
    if not os.isatty(descriptor):
        os.close(descriptor)
        return None
    return os.fdopen(descriptor, "w", encoding="utf-8")
