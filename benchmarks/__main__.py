"""`python -m benchmarks [--device cuda] [--only GROUP] [--json FILE]`: the table of `make bench`."""

from __future__ import annotations

import argparse
import json
import os
import sys
from collections.abc import Sequence
from contextlib import redirect_stdout
from dataclasses import asdict
from pathlib import Path

import torch
from rich.console import Console
from rich.table import Table

from benchmarks.groups import GROUPS, Device, groups_on
from benchmarks.machine import Machine, this_machine
from benchmarks.timing import Ratio


def main(words: Sequence[str] | None = None) -> int:
    """Measure, print the table, and say by the exit code: 0 every bar holds, 1 not, 2 it cannot be measured here."""
    parser = argparse.ArgumentParser(prog="python -m benchmarks", description=__doc__)
    parser.add_argument("--only", choices=sorted(GROUPS), action="append", metavar="GROUP", help=", ".join(GROUPS))
    parser.add_argument("--pairs", type=int, default=21, help="pairs of timings of a step of width 1")
    parser.add_argument("--json", type=Path, metavar="FILE", help="write the rows into this file as well")
    parser.add_argument("--device", choices=("cpu", "cuda"), default="cpu", help="where both sides compute")
    arguments = parser.parse_args(words)
    refusal = _refusal(arguments.device, arguments.only or ())
    if refusal:
        print(f"benchmarks: {refusal}", file=sys.stderr)
        return 2
    if arguments.device == "cpu":
        # Both sides take a GPU that they see, in the programs that they start too.
        os.environ["CUDA_VISIBLE_DEVICES"] = ""
    groups = groups_on(arguments.device)
    rows: list[Ratio] = []
    for name in arguments.only or groups:
        print(f"measuring {name} ...", file=sys.stderr)
        with open(os.devnull, "w", encoding="utf-8") as nowhere, redirect_stdout(nowhere):
            rows.extend(groups[name].rows(arguments.pairs))
    machine = this_machine()
    Console(width=180).print(_table(machine, rows))
    if arguments.json:
        arguments.json.write_text(json.dumps(_record(machine, rows), indent=2) + "\n")
    return 0 if all(row.holds for row in rows) else 1


def _refusal(device: Device, names: Sequence[str]) -> str:
    """Return why the groups `names` cannot be measured on `device`; empty: they can."""
    if device == "cuda" and not torch.cuda.is_available():
        return "--device cuda: torch sees no GPU here; see dist-train doctor, or measure with --device cpu"
    elsewhere = [name for name in names if name not in groups_on(device)]
    if elsewhere:
        return f"--only {' --only '.join(elsewhere)}: measured with --device cpu alone"
    return ""


def _record(machine: Machine, rows: Sequence[Ratio]) -> dict[str, object]:
    """Return what the JSON file holds."""
    return {"machine": asdict(machine), "rows": [asdict(row) for row in rows]}


def _table(machine: Machine, rows: Sequence[Ratio]) -> Table:
    table = Table(title=machine.in_words(), title_justify="left", caption="Ours / theirs; quartiles of pairs.")
    for column in ("row", "ours", "theirs", "ratio", "quartiles", "pairs", "ours", "images/s", "bar", ""):
        table.add_column(column, justify="left" if len(table.columns) < 3 else "right")
    for row in rows:
        images = row.images_per_second
        table.add_row(
            row.row,
            row.ours,
            row.theirs,
            f"{row.median:.3f}",
            f"{row.lower:.3f}-{row.upper:.3f}",
            str(row.pairs),
            f"{row.amount_ours:.4g} {row.unit}",
            "" if images is None else f"{images:,.0f}",
            "stated" if row.bar is None else f"{row.bar:.3f}",
            "" if row.bar is None else "holds" if row.holds else "missed",
        )
    return table


if __name__ == "__main__":
    raise SystemExit(main())
