"""`dist-train launch [-np N] COMMAND ...`: a command of ours on several ranks of this machine."""

from __future__ import annotations

import argparse
import sys

from dist_train.outcome import UsageError


def add_parser(subparsers: argparse._SubParsersAction[argparse.ArgumentParser]) -> None:
    """Add the command's arguments."""
    parser = subparsers.add_parser(
        "launch",
        help="a command on several ranks of this machine, without MPI or Horovod",
        description="Run `dist-train COMMAND ...` as N ranks on this machine, which talk by torch.distributed. "
        "SIGTERM, SIGINT and SIGUSR2 ask the ranks to save and stop. The exit status is the command's own.",
    )
    parser.add_argument("-np", type=int, default=2, metavar="N", help="number of ranks (2)")
    parser.add_argument("command", nargs=argparse.REMAINDER, metavar="COMMAND ...", help="such as train CONFIG")
    parser.set_defaults(run=run)


def run(arguments: argparse.Namespace) -> int:
    """Launch the ranks; the exit code is theirs."""
    from dist_train.cli.main import parse
    from dist_train.cluster.local_launch import launch_ranks

    words = list(arguments.command)
    if not words:
        raise UsageError("no command given, for example: dist-train launch -np 2 train configs/demo.yaml")
    if arguments.np < 1:
        raise UsageError(f"-np takes a number of ranks, 1 or more, not {arguments.np}")
    command = parse(words)
    if words[0] == "train":
        from dist_train.config import load_config

        load_config(command.config, command.overrides)  # one message, not one a rank
    return launch_ranks([sys.executable, "-m", "dist_train", *words], arguments.np)
