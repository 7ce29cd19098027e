"""`dist-train report DIR [-o FILE]`: one HTML page of a run, a study, or a folder of runs."""

from __future__ import annotations

import argparse
from pathlib import Path


def add_parser(subparsers: argparse._SubParsersAction[argparse.ArgumentParser]) -> None:
    """Add the command to `subparsers`."""
    parser = subparsers.add_parser(
        "report",
        help="one HTML page of a run, a study, or a folder of runs",
        description="Write one HTML page, complete in itself: curves, tables, landscapes, sharpness, settings.",
    )
    parser.add_argument("directory", type=Path, metavar="DIR", help="a run, a study, or a folder of runs")
    parser.add_argument(
        "-o",
        "--output",
        type=Path,
        metavar="FILE",
        help="the page (default: DIR/report.html); the tables alone for *.md",
    )
    parser.set_defaults(run=run)


def run(arguments: argparse.Namespace) -> int:
    """Write the page and print its path. Raises UsageError where there is no run, or the page cannot be written."""
    from dist_train.outcome import ExitCode
    from dist_train.report.page import write_report

    output = arguments.output or arguments.directory / "report.html"
    write_report(arguments.directory, output)
    print(output)
    return ExitCode.FINISHED
