"""`dist-train evaluate RUN_OR_CHECKPOINT [--split train|test]`."""

from __future__ import annotations

import argparse
import json
from pathlib import Path

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
    """Evaluate and print."""
    from dist_train.training.stored import evaluate_stored

    result = evaluate_stored(arguments.target, arguments.split, arguments.overrides)
    if result is not None:
        print(json.dumps(result))
    return ExitCode.FINISHED
