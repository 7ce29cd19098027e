"""`dist-train train CONFIG [section.key=value ...] [--run-dir DIR]`."""

from __future__ import annotations

import argparse
import faulthandler
import sys
from pathlib import Path

from dist_train.outcome import DisagreementError, DivergedError, ExitCode, StoppedError, exit_code_of
from dist_train.start_up import without_collection

_STANDARD_ERROR = 2
"""The descriptor itself: `sys.stderr` may be replaced by an object that has none."""


def add_parser(subparsers: argparse._SubParsersAction[argparse.ArgumentParser]) -> None:
    """Add the command's arguments."""
    parser = subparsers.add_parser(
        "train",
        help="one training run, alone or under horovodrun, mpirun, srun",
        description="Train as CONFIG says, resuming the run that the run directory holds. "
        "The same command under horovodrun, mpirun or srun --mpi=pmix trains on many ranks.",
    )
    parser.add_argument("config", type=Path, metavar="CONFIG", help="a YAML file")
    parser.add_argument("overrides", nargs="*", metavar="section.key=value", help="settings that differ from it")
    parser.add_argument("--run-dir", type=Path, metavar="DIR", help="the run's own directory")
    parser.set_defaults(run=run)


def run(arguments: argparse.Namespace) -> int:
    """Train; the exit code says how it ended."""
    # a rank that a library's fault kills says where it was
    faulthandler.enable(file=_STANDARD_ERROR)
    with without_collection():
        from dist_train.config import load_config
        from dist_train.config.combinations import unused_settings

        config = load_config(arguments.config, arguments.overrides)

        from dist_train.cluster.communicator import PeerFailedError
        from dist_train.cluster.launch import current_launch
        from dist_train.launching import train
        from dist_train.start_up import ask_for_large_pages

    ask_for_large_pages()
    if current_launch().rank == 0:
        for sentence in unused_settings(config):
            print(f"dist-train: warning: {sentence}", file=sys.stderr)
    try:
        train(config, arguments.run_dir)
    except PeerFailedError:
        return ExitCode.USAGE
    except (DivergedError, DisagreementError, StoppedError) as error:
        if current_launch().rank == 0:
            print(f"dist-train: {error}", file=sys.stderr)
        return exit_code_of(error)
    return ExitCode.FINISHED
