"""`dist-train evaluate RUN_OR_CHECKPOINT [--split train|test]`."""

from __future__ import annotations

import argparse
import json
import sys
from pathlib import Path

from dist_train.cluster.launch import current_launch
from dist_train.outcome import ExitCode


def add_parser(subparsers: argparse._SubParsersAction[argparse.ArgumentParser]) -> None:
    """Add the command's arguments."""
    parser = subparsers.add_parser(
        "evaluate",
        help="loss and accuracy of a checkpoint",
        description="Print loss and accuracy of a checkpoint, or of a run's last one, as one line of JSON.",
    )
    parser.add_argument("target", type=Path, metavar="RUN_OR_CHECKPOINT", help="a run directory or a checkpoint")
    parser.add_argument("overrides", nargs="*", metavar="section.key=value", help="data.root=DIR, for instance")
    parser.add_argument("--split", choices=("train", "test"), default="test")
    parser.set_defaults(run=run)


def run(arguments: argparse.Namespace) -> int:
    """Evaluate and print; a loss that is not finite is null, and the exit code 3."""
    from dist_train.training.stored import evaluate_stored

    result = evaluate_stored(arguments.target, arguments.split, arguments.overrides)
    is_finite = result["loss"] is not None
    if current_launch().rank == 0:
        print(json.dumps(result, allow_nan=False), flush=True)
        if not is_finite:
            print(f"dist-train: the {arguments.split} loss of {result['checkpoint']} is not finite", file=sys.stderr)
    return ExitCode.FINISHED if is_finite else ExitCode.DIVERGED
