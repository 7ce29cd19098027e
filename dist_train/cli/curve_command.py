"""`dist-train curve RUN [-o FILE]`: the learning curve of a run as a picture."""

from __future__ import annotations

import argparse
from pathlib import Path


def add_parser(subparsers: argparse._SubParsersAction[argparse.ArgumentParser]) -> None:
    """Add the command to `subparsers`."""
    parser = subparsers.add_parser(
        "curve",
        help="the learning curve of a run as a picture",
        description="Draw loss and accuracy against epoch, of one run or of several to compare.",
    )
    parser.add_argument("runs", nargs="+", type=Path, metavar="RUN", help="directory of a run")
    parser.add_argument(
        "-o",
        "--output",
        type=Path,
        metavar="FILE",
        help="a .png or .svg file (default: RUN/learning_curve.png; needed for several runs)",
    )
    parser.set_defaults(run=run)


def run(arguments: argparse.Namespace) -> int:
    """Draw the picture and print its path. Raises UsageError where there is nothing to draw."""
    from dist_train.outcome import ExitCode, UsageError
    from dist_train.report.learning_curve import draw_learning_curve

    if arguments.output is None and len(arguments.runs) > 1:
        raise UsageError("several runs go into one picture: say where with -o FILE")
    output = arguments.output or arguments.runs[0] / "learning_curve.png"
    draw_learning_curve(arguments.runs, output)
    print(output)
    return ExitCode.FINISHED
