"""`dist-train runs [DIR]`: a table of runs; with `--clean` the end of what gone runs left for Prometheus."""

from __future__ import annotations

import argparse
from pathlib import Path


def add_parser(subparsers: argparse._SubParsersAction[argparse.ArgumentParser]) -> None:
    """Add the command to `subparsers`."""
    text = "a table of runs: state, progress, best accuracy, images/s, time left"
    parser = subparsers.add_parser("runs", help=text, description=text[0].upper() + text[1:] + ".")
    parser.add_argument(
        "directory", nargs="?", type=Path, default=Path("runs"), metavar="DIR", help="folder (default: runs)"
    )
    parser.add_argument(
        "--clean",
        action="store_true",
        help="instead, remove the target files of runs that are gone from where these runs enter themselves for "
        "Prometheus (metrics.targets_directory)",
    )
    parser.set_defaults(run=run)


def run(arguments: argparse.Namespace) -> int:
    """Print the table, or clean. Raises UsageError where there is no such folder."""
    return _clean(arguments.directory) if arguments.clean else _show(arguments.directory)


def _show(directory: Path) -> int:
    from rich.console import Console

    from dist_train.cluster.launch import job_states
    from dist_train.outcome import ExitCode
    from dist_train.watch.run_table import read_runs, render

    runs = read_runs(directory)
    if not runs:
        print(f"no runs in {directory}")
        return ExitCode.FINISHED
    console = Console(highlight=False)
    table = render(runs, job_states([run.slurm_job for run in runs if run.slurm_job]))
    if not console.is_terminal:
        # a file or a pipe has no width that a line must fit
        endless = console.options.update(width=10_000)
        console.width = max(console.width, console.measure(table, options=endless).maximum)
    console.print(table)
    return ExitCode.FINISHED


def _clean(directory: Path) -> int:
    from dist_train.monitoring.prometheus.targets import remove_stale
    from dist_train.outcome import ExitCode, UsageError
    from dist_train.watch.run_table import targets_directories

    folders = targets_directories(directory)
    if not folders:
        print(f"no run in {directory} has metrics.targets_directory set: nothing to clean")
    for folder in folders:
        try:
            removed = remove_stale(folder)
        except FileNotFoundError:
            removed = ()
        except OSError as error:
            raise UsageError(
                f"{folder} cannot be cleaned ({error.strerror or error}); use an account that may write there"
            ) from error
        for path in removed:
            print(f"removed {path}")
        if not removed:
            print(f"nothing to clean in {folder}")
    return ExitCode.FINISHED
