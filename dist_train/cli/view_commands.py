"""`dist-train runs`, `watch`, `curve` and `report`: tables, views and figures of runs."""

from __future__ import annotations

import argparse
import math
import shutil
import sys
from contextlib import suppress
from pathlib import Path

from dist_train.cli.common import Subparsers, is_on_terminal, print_table, terminal_width
from dist_train.cluster.launch import job_states
from dist_train.outcome import ExitCode, UsageError, escaped, writing
from dist_train.rundir.paths import RunDirectory, has_run_or_study, in_utf8, run_folder

_VIEW = (100, 36)  # columns and rows of a view that is not printed on a terminal


def _add_runs(subparsers: Subparsers) -> None:
    text = "list runs: state, progress, best accuracy, images/s, time left"
    parser = subparsers.add_parser(
        "runs",
        help=text,
        description=f"{text[0].upper()}{text[1:]}. On a narrow terminal less important columns are omitted and notes "
        "are cut; --json has everything.",
    )
    parser.add_argument(
        "directory", nargs="?", type=Path, default=Path("runs"), metavar="DIR", help="folder (default: runs)"
    )
    parser.add_argument("--json", action="store_true", help="one JSON document instead of the table")
    parser.add_argument(
        "--clean",
        dest="run",
        action="store_const",
        const=_clean,
        help="instead, remove the target files of runs that are gone or have ended from the folders where these runs "
        "register for Prometheus (metrics.targets_directory)",
    )
    parser.set_defaults(run=_runs)


def _runs(arguments: argparse.Namespace) -> int:
    from dist_train.watch.run_table import as_json, corrected_by_slurm, read_runs, render

    runs = read_runs(arguments.directory)
    jobs = job_states([run.slurm_job for run in runs if run.slurm_job])
    runs = corrected_by_slurm(runs, jobs)
    if arguments.json:
        print(as_json(runs, jobs))
    elif runs:
        print_table(render(runs, jobs, terminal_width()))
    else:
        print(escaped(f"no runs in {arguments.directory}"))
    return ExitCode.FINISHED


def _clean(arguments: argparse.Namespace) -> int:
    from dist_train.monitoring.prometheus.targets import SEEN_SECONDS, remove_stale
    from dist_train.watch.run_table import targets_directories

    folders = targets_directories(arguments.directory)
    if not folders:
        print(escaped(f"no run in {arguments.directory} has metrics.targets_directory set: nothing to clean"))
    for folder in folders:
        if not folder.is_absolute():
            text = f"{folder} is not cleaned: it is relative to the folder where its run was started, which is unknown"
            print(escaped(f"dist-train: warning: {text}"), file=sys.stderr)
            continue
        with writing(folder, "use an account that can write there", code="folder-unwritable"):
            try:
                removed, skipped = remove_stale(folder, SEEN_SECONDS)
            except FileNotFoundError:
                removed, skipped = (), ""
        if skipped:
            print(escaped(f"dist-train: warning: {folder}: {skipped}"), file=sys.stderr)
        for path in removed:
            print(escaped(f"removed {path}"))
        if not removed:
            print(escaped(f"nothing to clean in {folder}"))
    return ExitCode.FINISHED


def _add_watch(subparsers: Subparsers) -> None:
    parser = subparsers.add_parser(
        "watch",
        help="watch a run live, from any machine that sees its directory",
        description="Show the progress of a run, read from its directory alone, until it ends. Ctrl-C ends the view, "
        "not the run. If the output is not a terminal, the run is shown once.",
    )
    parser.add_argument("directory", type=Path, metavar="RUN", help="a run directory, or its name below runs/")
    parser.add_argument(
        "--interval", type=_seconds, default=1.0, metavar="SECONDS", help="time between two updates (default: 1)"
    )
    parser.add_argument("--once", action="store_true", help="show the current state of the run, and exit")
    parser.set_defaults(run=_watch)


def _watch(arguments: argparse.Namespace) -> int:
    from rich.console import Console

    from dist_train.watch.run import WatchedRun, find_run
    from dist_train.watch.view import show_once, watch

    watched = WatchedRun(find_run(arguments.directory))
    console = Console(highlight=False)
    if not is_on_terminal():
        width, height = shutil.get_terminal_size(_VIEW)  # of COLUMNS and LINES, if they are set
        console = Console(highlight=False, width=width, height=height)
    # Rich draws a view that changes only where it takes the output for a terminal (TTY_COMPATIBLE, FORCE_COLOR).
    if arguments.once or not (is_on_terminal() and console.is_terminal) or console.is_dumb_terminal:
        show_once(watched, console)
    else:
        watch(watched, console, arguments.interval)
    return ExitCode.FINISHED


def _seconds(text: str) -> float:
    with suppress(ValueError):
        if 0 < (seconds := float(text)) < math.inf:
            return seconds
    raise argparse.ArgumentTypeError(f"takes a number of seconds above 0, not {text!r}")


def _add_curve(subparsers: Subparsers) -> None:
    parser = subparsers.add_parser(
        "curve",
        help="draw the learning curve of a run",
        description="Draw loss and accuracy against epoch, for one run, or for several to compare.",
    )
    parser.add_argument("runs", nargs="+", type=Path, metavar="RUN", help="a run directory, or its name below runs/")
    parser.add_argument(
        "-o",
        "--output",
        type=Path,
        metavar="FILE",
        help="a .png, .svg or .pdf file (default: RUN/learning_curve.png; required for several runs)",
    )
    parser.set_defaults(run=_curve)


def _curve(arguments: argparse.Namespace) -> int:
    from dist_train.report.drawing import draw_learning_curve

    if arguments.output is None and len(arguments.runs) > 1:
        raise UsageError("several runs are drawn into one picture: name its file by -o FILE", code="output-unset")
    runs = [in_utf8(run_folder(each)) for each in arguments.runs]
    output = arguments.output or RunDirectory(runs[0]).learning_curve
    draw_learning_curve(runs, output)
    print(output)
    return ExitCode.FINISHED


def _add_report(subparsers: Subparsers) -> None:
    parser = subparsers.add_parser(
        "report",
        help="write one HTML page about a run, a study, or a folder of runs",
        description="Write a single self-contained HTML page: curves, tables, landscapes, sharpness, settings. "
        "Or each of its figures as a file, for a paper.",
    )
    parser.add_argument(
        "directory", type=Path, metavar="DIR", help="folder of a run, a study or several runs; or its name below runs/"
    )
    outputs = parser.add_mutually_exclusive_group()
    outputs.add_argument(
        "-o",
        "--output",
        type=Path,
        metavar="FILE",
        help="file of the page (default: DIR/report.html); if it ends in .md, the tables alone",
    )
    outputs.add_argument("--figures", type=Path, metavar="FOLDER", help="write the figures there instead of a page")
    parser.add_argument("--format", choices=("svg", "pdf", "png"), help="format of --figures (default: svg)")
    parser.set_defaults(run=_report)


def _report(arguments: argparse.Namespace) -> int:
    from dist_train.report.page import figures_of, write_report

    if arguments.figures is None and arguments.format is not None:
        raise UsageError("--format is that of the figures: add --figures FOLDER", code="option-alone")
    directory = in_utf8(run_folder(arguments.directory, code="folder-missing", suits=has_run_or_study))
    if arguments.figures is not None:
        from dist_train.report.drawing import save_figures
        from dist_train.report.stored_run import read_subject

        for path in save_figures(figures_of(read_subject(directory)), arguments.figures, arguments.format or "svg"):
            print(path)
        return ExitCode.FINISHED
    output = arguments.output or directory / "report.html"
    write_report(directory, output)
    print(output)
    return ExitCode.FINISHED


COMMANDS = (_add_runs, _add_watch, _add_curve, _add_report)
