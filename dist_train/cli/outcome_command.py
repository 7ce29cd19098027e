"""`dist-train outcome RUN`: the exit code of a launch, for scripts whose launcher loses it."""

from __future__ import annotations

import argparse
import sys
from pathlib import Path

from dist_train.outcome import ExitCode


def add_parser(subparsers: argparse._SubParsersAction[argparse.ArgumentParser]) -> None:
    """Add the command's arguments."""
    parser = subparsers.add_parser(
        "outcome",
        help="the exit code of a run's last launch, from its status.json",
        description="End with the exit code that the run's last launch wrote into status.json; "
        "1 where it wrote none, or where the launch was another than --launch.",
    )
    parser.add_argument("run_directory", type=Path, metavar="RUN")
    parser.add_argument("--launch", default=None, metavar="ID", help="the launch's DIST_TRAIN_LAUNCH")
    parser.set_defaults(run=run)


def run(arguments: argparse.Namespace) -> int:
    """Return the launch's exit code; say why where it is not 0."""
    from dist_train.rundir.status import read_status

    status = read_status(arguments.run_directory / "status.json")
    if status is None or (arguments.launch is not None and status.launch != arguments.launch):
        print(f"dist-train: the launch left no status in {arguments.run_directory}", file=sys.stderr)
        return ExitCode.FAULT
    if status.exit_code is None:
        print(f"dist-train: the launch died in state {status.state} at step {status.step}", file=sys.stderr)
        return ExitCode.FAULT
    return status.exit_code
