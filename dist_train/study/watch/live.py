"""Shows a run until it ends: on a terminal again and again, or as one picture."""

from __future__ import annotations

import time

from rich.box import ROUNDED
from rich.console import Console
from rich.live import Live

from dist_train.study.watch.run import Snapshot, WatchedRun
from dist_train.study.watch.view import frame, summary

_RESIZE_SECONDS = 0.2
"""How soon the view follows the size of the terminal."""
_LEAST_COLUMNS, _LEAST_ROWS = 60, 20


def show_once(run: WatchedRun, console: Console) -> None:
    """Print the run as it is now, as high as the terminal."""
    _print_frame(run.look(), console)


def watch(run: WatchedRun, console: Console, interval: float) -> None:
    """Show the run, looking every `interval` seconds, until it ends or the user presses Ctrl-C; then sum it up."""
    seen = run.look()
    if seen.is_over:
        _print_frame(seen, console)
        return
    try:
        with Live(console=console, screen=True, auto_refresh=False) as live:
            while not seen.is_over:
                _draw(seen, live)
                _wait(interval, seen, live)
                seen = run.look()
    except KeyboardInterrupt:
        return
    console.print(summary(seen, box=ROUNDED))


def _draw(seen: Snapshot, live: Live) -> None:
    size = live.console.size
    live.update(frame(seen, size.width, size.height), refresh=True)


def _wait(interval: float, seen: Snapshot, live: Live) -> None:
    """Wait, and draw again where the terminal has changed its size."""
    size = live.console.size
    until = time.monotonic() + interval
    while (left := until - time.monotonic()) > 0:
        time.sleep(min(left, _RESIZE_SECONDS))
        if live.console.size != size:
            size = live.console.size
            _draw(seen, live)


def _print_frame(seen: Snapshot, console: Console) -> None:
    columns = max(_LEAST_COLUMNS, console.width)
    rows = max(_LEAST_ROWS, console.height - 1)
    console.print(frame(seen, columns, rows), width=columns, height=rows, crop=False)
