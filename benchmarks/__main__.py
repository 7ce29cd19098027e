"""`python -m benchmarks [--device cuda] [--only GROUP] [--json FILE]`: the table of `make bench`."""

from __future__ import annotations

import argparse
import os
import sys
from collections.abc import Sequence
from contextlib import redirect_stdout
from pathlib import Path

import torch
from rich.console import Console
from rich.table import Table

from benchmarks.document import HEAD, cells
from benchmarks.groups import GROUPS, Device, groups_on
from benchmarks.machine import Machine, this_machine
from benchmarks.record import Measured, keep, read_record
from benchmarks.timing import Ratio
from dist_train.outcome import ExitCode, UsageError, text_with_code


def main(argv: Sequence[str] | None = None) -> int:
    """Measure and print the table. Exit codes: 0 every bar holds, 1 a bar is missed, 2 it cannot be measured here."""
    parser = argparse.ArgumentParser(prog="python -m benchmarks", description=__doc__)
    parser.add_argument("--only", choices=sorted(GROUPS), action="append", metavar="GROUP", help=", ".join(GROUPS))
    parser.add_argument("--pairs", type=int, default=21, help="pairs of timings of a step of width 1")
    parser.add_argument("--json", type=Path, metavar="FILE", help="store the rows in this file, by group")
    parser.add_argument("--device", choices=("cpu", "cuda"), default="cpu", help="where both sides compute")
    arguments = parser.parse_args(argv)
    try:
        _check(arguments.device, arguments.only or ())
        if arguments.json:
            read_record(arguments.json)
    except UsageError as error:
        print(f"benchmarks: {text_with_code(error)}", file=sys.stderr)
        return ExitCode.USAGE
    if arguments.device == "cpu":
        # Hide GPUs: both sides, and the programs that they start, would use them.
        os.environ["CUDA_VISIBLE_DEVICES"] = ""
    groups = groups_on(arguments.device)
    machine = this_machine()
    rows: list[Ratio] = []
    for name in arguments.only or groups:
        print(f"measuring {name} ...", file=sys.stderr)
        with open(os.devnull, "w", encoding="utf-8") as nowhere, redirect_stdout(nowhere):
            measured = list(groups[name].rows(arguments.pairs))
        rows += measured
        if arguments.json:
            keep(arguments.json, {name: Measured(machine, measured)})
    Console(width=180).print(_table(machine, rows))
    return 0 if all(row.holds for row in rows) else 1


def _check(device: Device, names: Sequence[str]) -> None:
    """Raise UsageError if the groups `names` cannot be measured on `device`."""
    if device == "cuda" and not torch.cuda.is_available():
        raise UsageError(
            "--device cuda: torch sees no GPU here; see dist-train doctor, or measure with --device cpu",
            code="gpu-missing",
        )
    elsewhere = [name for name in names if name not in groups_on(device)]
    if elsewhere:
        raise UsageError(
            f"--only {' --only '.join(elsewhere)}: can be measured only with --device cpu", code="option-choice"
        )


def _table(machine: Machine, rows: Sequence[Ratio]) -> Table:
    table = Table(*HEAD, title=machine.in_words(), title_justify="left", caption="Ours / theirs; quartiles of pairs.")
    for row in rows:
        table.add_row(*cells(row))
    return table


if __name__ == "__main__":
    raise SystemExit(main())
