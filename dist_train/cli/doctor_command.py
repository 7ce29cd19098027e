"""`dist-train doctor [CONFIG [section.key=value ...]]`: what this machine has and lacks."""

from __future__ import annotations

import argparse
from pathlib import Path


def add_parser(subparsers: argparse._SubParsersAction[argparse.ArgumentParser]) -> None:
    """Add the command to `subparsers`."""
    parser = subparsers.add_parser(
        "doctor",
        help="what this machine has and lacks for training",
        description="Say what this machine has and lacks; each line that needs one names a fix. "
        "Ends with 0 where training can run here, 1 otherwise.",
    )
    parser.add_argument(
        "config", nargs="?", type=Path, metavar="CONFIG", help="also check what this configuration needs"
    )
    parser.add_argument("overrides", nargs="*", metavar="section.key=value", help="settings that differ from it")
    parser.set_defaults(run=run)


def run(arguments: argparse.Namespace) -> int:
    """Print the findings. Raises ConfigError where the configuration is bad."""
    from rich.console import Console

    from dist_train.config import Config, load_config
    from dist_train.launching import doctor
    from dist_train.outcome import ExitCode

    named = arguments.config is not None
    config = load_config(arguments.config, arguments.overrides) if named else Config()
    checks = doctor.examine(config, data_named=named)
    doctor.render(checks, Console(highlight=False, soft_wrap=False))
    return ExitCode.FINISHED if doctor.can_train(checks) else ExitCode.FAULT
