"""`python -m benchmarks [--quick] [--json FILE] [--only TEXT]`: the table of `make bench`."""

from __future__ import annotations

import argparse
import json
import os
import platform
import sys
from collections.abc import Callable, Iterator
from contextlib import redirect_stdout
from dataclasses import asdict
from pathlib import Path

import torch
from rich.console import Console
from rich.table import Table

from benchmarks import allocator, landscape, metrics_cost, one_worker, two_workers
from benchmarks.peers import comparison
from benchmarks.timing import Ratio

_GROUPS: dict[str, Callable[[int], Iterator[Ratio]]] = {
    "checkpoint": lambda pairs: iter([one_worker.checkpoint_row(pairs)]),
    "throughput-0.25": lambda pairs: one_worker.throughput_rows(0.25, 5 * pairs),
    "throughput-1": lambda pairs: one_worker.throughput_rows(1.0, pairs),
    "allocator": lambda pairs: iter(allocator.rows(max(3, pairs // 3))),
    "perturbation": lambda pairs: iter([one_worker.perturbation_row(5 * pairs)]),
    "noise": lambda pairs: (one_worker.noise_row(sharing, pairs) for sharing in ("global", "micro_batch")),
    "metrics": lambda pairs: iter([metrics_cost.on_off_row(5 * pairs)]),
    "scrapes": lambda pairs: iter([metrics_cost.scrapes_row()]),
    "metrics-page": lambda pairs: metrics_cost.page_rows(),
    "landscape": lambda pairs: landscape.rows(max(3, pairs // 3)),
    "reduction-128": lambda pairs: (two_workers.launch(which, 128, 2 * pairs) for which in ("gloo", "mpi")),
    "reduction-8192": lambda pairs: iter([two_workers.launch("gloo", 8192, max(2, pairs // 7))]),
    "peers-0.25-128": lambda pairs: comparison.rows(comparison.SMALL, max(3, pairs // 3)),
    "peers-0.25-8192": lambda pairs: comparison.rows(comparison.SMALL_8192, max(3, pairs // 5)),
    "peers-1-128": lambda pairs: comparison.rows(comparison.WHOLE, max(3, pairs // 3)),
    "peers-1-8192": lambda pairs: comparison.rows(comparison.WHOLE_8192, max(1, pairs // 20)),
}


def main() -> int:
    """Measure, print the table, and say by the exit code whether every bar holds."""
    parser = argparse.ArgumentParser(prog="python -m benchmarks", description=__doc__)
    parser.add_argument("--only", choices=sorted(_GROUPS), action="append", help="these groups of rows")
    parser.add_argument("--pairs", type=int, default=21, help="pairs of timings of a step of width 1")
    parser.add_argument("--json", type=Path, help="write the rows into this file as well")
    arguments = parser.parse_args()
    rows: list[Ratio] = []
    for name in arguments.only or _GROUPS:
        print(f"measuring {name} ...", file=sys.stderr)
        with open(os.devnull, "w", encoding="utf-8") as nowhere, redirect_stdout(nowhere):
            rows.extend(_GROUPS[name](arguments.pairs))
    Console(width=160).print(_table(rows))
    if arguments.json:
        record = {"machine": _machine(), "rows": [asdict(row) for row in rows]}
        arguments.json.write_text(json.dumps(record, indent=2) + "\n")
    return 0 if all(row.holds for row in rows) else 1


def _table(rows: list[Ratio]) -> Table:
    table = Table(title=_machine(), title_justify="left", caption="Step time, ours / theirs; quartiles of pairs.")
    for column in ("row", "ours", "theirs", "ratio", "quartiles", "pairs", "ours, s", "bar", ""):
        table.add_column(column, justify="left" if column in ("row", "ours", "theirs") else "right")
    for row in rows:
        table.add_row(
            row.row,
            row.ours,
            row.theirs,
            f"{row.median:.3f}",
            f"{row.lower:.3f}-{row.upper:.3f}",
            str(row.pairs),
            f"{row.seconds_ours:.4g}",
            "stated" if row.bar is None else f"{row.bar:.3f}",
            "" if row.bar is None else "holds" if row.holds else "missed",
        )
    return table


def _machine() -> str:
    versions = f"Python {platform.python_version()}, torch {torch.__version__}"
    return f"{os.cpu_count()} cores {platform.machine()}, {versions}"


if __name__ == "__main__":
    raise SystemExit(main())
