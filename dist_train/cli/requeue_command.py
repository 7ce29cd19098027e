"""`dist-train requeue RUN --limit N`: whether a batch script should requeue its job."""

from __future__ import annotations

import argparse
import sys
from pathlib import Path

from dist_train.outcome import ExitCode


def add_parser(subparsers: argparse._SubParsersAction[argparse.ArgumentParser]) -> None:
    """Add the command's arguments."""
    parser = subparsers.add_parser(
        "requeue",
        help="whether a run that did not finish is to be started again, for batch scripts",
        description="Decide whether a run that did not finish is to be started again, count it in RUN/requeues.json, "
        "and say why. Exit code 0: requeue it. 1: do not; it has finished, cannot go better (bad configuration, "
        "diverged, ranks disagree), or has used up its requeues without progress: then its status.json says "
        "failed, and the reason.",
    )
    parser.add_argument("run_directory", type=Path, metavar="RUN")
    parser.add_argument(
        "--limit", type=_count, default=3, metavar="N", help="requeues in a row without a new checkpoint (default: 3)"
    )
    parser.add_argument("--launch", default=None, metavar="ID", help="the last launch's DIST_TRAIN_LAUNCH")
    parser.add_argument("--death", default="", metavar="TEXT", help="what is known of a rank that was killed")
    parser.set_defaults(run=run)


def run(arguments: argparse.Namespace) -> int:
    """Return 0 where the run is to be started again, else 1."""
    from dist_train.sweep.standing import decide

    decision = decide(arguments.run_directory, arguments.limit, arguments.launch, arguments.death)
    verdict = "requeue" if decision.requeue else "do not requeue"
    print(f"dist-train: {verdict}: {decision.why}", file=sys.stderr)
    return ExitCode.FINISHED if decision.requeue else ExitCode.FAULT


def _count(text: str) -> int:
    if not text.isdecimal():
        raise argparse.ArgumentTypeError(f"takes a number, 0 or more, not {text!r}")
    return int(text)
