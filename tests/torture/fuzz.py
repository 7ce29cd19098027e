"""`python -m tests.torture.fuzz [--inputs N] [--seed S]`: almost valid inputs for everything that reads files."""

from __future__ import annotations

import argparse
import logging
import sys
import tempfile
import time
from collections.abc import Callable
from pathlib import Path

from hypothesis import HealthCheck, Phase, given, seed, settings
from rich.console import Console
from rich.table import Table

from tests.torture.inputs import kinds
from tests.torture.kind import Kind

_FORBIDDEN = frozenset({"os.system", "os.exec", "os.fork", "os.posix_spawn", "subprocess.Popen", "socket.connect"})


class Guard:
    """Detects commands, processes and connections, which reading a file must not start."""

    def __init__(self) -> None:
        self.is_watching = False
        self.seen: list[str] = []
        sys.addaudithook(self._audit)

    def _audit(self, event: str, arguments: tuple[object, ...]) -> None:
        if self.is_watching and event in _FORBIDDEN:
            self.seen.append(event)


def fuzz(kind: Kind, inputs: int, number: int, guard: Guard) -> tuple[int, int]:
    """Try so many inputs of `kind`; return the numbers of tried and of accepted ones. Raises the errors of checks."""
    counts = [0, 0]

    @seed(number)
    @settings(
        max_examples=inputs,
        deadline=None,
        database=None,
        suppress_health_check=list(HealthCheck),
        phases=[Phase.generate, Phase.shrink],
    )
    @given(kind.inputs)
    def attempt(drawn: object) -> None:
        guard.is_watching = True
        try:
            accepted = kind.check(drawn)
        finally:
            guard.is_watching = False
        assert not guard.seen, f"reading it caused {guard.seen}"
        counts[0] += 1
        counts[1] += accepted

    run: Callable[[], None] = attempt
    run()
    return counts[0], counts[1]


def main() -> int:
    """Fuzz every kind; return 1 if one fails."""
    parser = argparse.ArgumentParser(prog="python -m tests.torture.fuzz", description=__doc__)
    parser.add_argument("--inputs", type=int, default=10_000, help="of each kind")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--only", metavar="KIND")
    arguments = parser.parse_args()
    logging.disable(logging.CRITICAL)
    console, guard, failed = Console(width=max(100, Console().width)), Guard(), 0
    table = Table()
    for name in ("input", "tried", "accepted", "refused", "failed", "seconds"):
        table.add_column(name, justify="left" if name == "input" else "right")
    with tempfile.TemporaryDirectory(prefix="fuzz-") as folder:
        for kind in kinds(Path(folder)):
            if arguments.only not in (None, kind.name):
                continue
            started = time.monotonic()
            try:
                tried, accepted = fuzz(kind, arguments.inputs, arguments.seed, guard)
            except BaseException as error:
                if isinstance(error, KeyboardInterrupt):
                    raise
                failed += 1
                console.print_exception(extra_lines=0, width=100)
                table.add_row(kind.name, "", "", "", "1", f"{time.monotonic() - started:.0f}")
                continue
            table.add_row(
                kind.name, f"{tried}", f"{accepted}", f"{tried - accepted}", "0", f"{time.monotonic() - started:.0f}"
            )
    console.print(table)
    return int(failed > 0)


if __name__ == "__main__":
    sys.exit(main())
