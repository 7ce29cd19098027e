"""`dist-train watch RUN [--interval SECONDS] [--once]`: a run as it continues, from its directory alone."""

from __future__ import annotations

import argparse
import io
import math
import os
import sys
from pathlib import Path

_COLUMNS, _ROWS = 100, 36
"""Of what is not printed on a terminal."""


def add_parser(subparsers: argparse._SubParsersAction[argparse.ArgumentParser]) -> None:
    """Add the command to `subparsers`."""
    parser = subparsers.add_parser(
        "watch",
        help="a live view of a run, from any machine that sees its directory",
        description="Show a run as it continues, from its directory alone, until it ends. Ctrl-C ends the view, "
        "not the run. Where the output is no terminal, the run is shown once.",
    )
    parser.add_argument("directory", type=Path, metavar="RUN", help="a run directory, or a folder's name below runs/")
    parser.add_argument(
        "--interval", type=_seconds, default=1.0, metavar="SECONDS", help="time between two looks (default: 1)"
    )
    parser.add_argument("--once", action="store_true", help="show the run as it is now, and end")
    parser.set_defaults(run=run)


def run(arguments: argparse.Namespace) -> int:
    """Show the run. Raises UsageError where there is none."""
    from rich.console import Console

    from dist_train.outcome import ExitCode
    from dist_train.watch.run import WatchedRun, find_run
    from dist_train.watch.view import show_once, watch

    watched = WatchedRun(find_run(arguments.directory))
    if isinstance(sys.stdout, io.TextIOWrapper):
        sys.stdout.reconfigure(errors="replace")  # curves are drawn with characters that not every encoding has
    console = Console(highlight=False)
    if not console.is_terminal:
        console = Console(highlight=False, width=_size("COLUMNS", _COLUMNS), height=_size("LINES", _ROWS))
    if arguments.once or not console.is_terminal or console.is_dumb_terminal:
        show_once(watched, console)
    else:
        watch(watched, console, arguments.interval)
    return ExitCode.FINISHED


def _size(variable: str, usual: int) -> int:
    text = os.environ.get(variable, "")
    return int(text) if text.isdecimal() and int(text) else usual


def _seconds(text: str) -> float:
    seconds = float(text)
    if not (math.isfinite(seconds) and seconds > 0):
        raise argparse.ArgumentTypeError("must be a number of seconds above 0")
    return seconds
