"""Helpers that several commands share: arguments, warnings, and tables for a terminal or a pipe."""

from __future__ import annotations

import argparse
import os
import sys
from pathlib import Path
from typing import TYPE_CHECKING, TypeAlias

from dist_train.config import Config, ConfigError, load_config
from dist_train.config.combinations import unused_settings
from dist_train.config.loading import located, with_overrides
from dist_train.outcome import UsageError, say_on_stderr
from dist_train.rundir.paths import RunDirectory

if TYPE_CHECKING:
    from rich.table import Table

TARGET = (
    "a run (its directory, or its name below runs/), which stands for its last checkpoint; another of its "
    "checkpoints, as RUN@STEP or RUN@best; or a checkpoint's file"
)

Subparsers: TypeAlias = "argparse._SubParsersAction[argparse.ArgumentParser]"


def add_config(parser: argparse.ArgumentParser) -> None:
    """Add CONFIG, its overrides, and --run-dir."""
    parser.add_argument(
        "config",
        type=Path,
        metavar="CONFIG",
        help="a YAML file, or one that comes with the package, such as dist_train:configs/demo.yaml",
    )
    add_overrides(parser, "settings to override")
    parser.add_argument(
        "--run-dir", type=folder_path, metavar="DIR", help="the run directory (default: run.directory/run.name)"
    )
    parser.add_argument(
        "--plugin", action="append", default=[], metavar="FILE.py", help="a Python file of plug-ins; may be repeated"
    )


def add_overrides(parser: argparse.ArgumentParser, text: str = "data.root=DIR, for instance") -> None:
    """Add section.key=value, any number of them."""
    parser.add_argument("overrides", nargs="*", default=[], metavar="section.key=value", help=text)


def named_config(arguments: argparse.Namespace) -> Config:
    """Return the configuration of CONFIG, its overrides and --plugin. Raises ConfigError."""
    return load_config(arguments.config, arguments.overrides, arguments.plugin)


def config_to_train(arguments: argparse.Namespace) -> Config:
    """Return `named_config`. Raises UsageError if CONFIG is that of a run which was moved, or began with --run-dir.

    Without --run-dir, that configuration would train in the folder that it names.
    """
    config = named_config(arguments)
    file = located(Path(arguments.config))
    is_named = not {"name", "directory"}.isdisjoint(with_overrides({}, arguments.overrides).get("run", ()))
    folder = RunDirectory(file.parent)
    is_of_run = file.name == folder.config.name and folder.has_begun
    is_elsewhere = folder.root.resolve() != config.run_directory.resolve()
    if arguments.run_dir is None and is_of_run and is_elsewhere and not is_named:
        raise UsageError(
            f"{file} is the configuration of the run in {folder.root}, but names {config.run_directory}: to continue "
            f"the run add --run-dir {folder.root}; for a new one set run.name",
            code="run-moved",
        )
    return config


def check_readable_again(file: Path) -> None:
    """Raise ConfigError if other processes, which read `file` again, would not find what this one has read."""
    path = located(file)
    is_descriptor = os.path.abspath(path).startswith(("/dev/stdin", "/dev/fd/", "/proc/"))
    if is_descriptor or (path.exists() and not path.is_file()):
        wrong = "not a regular file: other processes cannot read it again"
        raise ConfigError.of(str(file), "(file)", wrong, code="unreadable")


def add_weights(parser: argparse.ArgumentParser) -> None:
    """Add --weights."""
    parser.add_argument(
        "--weights", choices=("raw", "averaged"), default="raw", help="averaged: see averaging.kind (default: raw)"
    )


def folder_path(text: str) -> Path:
    """Return the folder named `text`, which must not be empty."""
    if not text:
        raise argparse.ArgumentTypeError("takes a folder's name, not an empty one; the current folder is .")
    return Path(text)


def count(text: str, least: int = 1) -> int:
    """Return the whole number in `text`, `least` or more."""
    if not (text.isascii() and text.isdecimal() and int(text) >= least):
        raise argparse.ArgumentTypeError(f"takes a number, {least} or more, not {text!r}")
    return int(text)


def warn_of_unused(config: Config) -> None:
    """Print a warning for each setting of `config` that has no effect."""
    for sentence in unused_settings(config).values():
        say_on_stderr(f"dist-train: warning: {sentence}")


def is_on_terminal() -> bool:
    """Whether the output is a terminal. Rich's consoles also say so of a pipe if FORCE_COLOR is set."""
    return sys.stdout is not None and sys.stdout.isatty()


def terminal_width() -> int | None:
    """Return the terminal's width in characters; None if the output is not a terminal."""
    from rich.console import Console

    return Console().width if is_on_terminal() else None


def print_table(table: Table) -> None:
    """Print `table`; if the output is not a terminal, without cutting its lines to a width."""
    from rich.console import Console

    console = Console(highlight=False)
    if not is_on_terminal():
        unlimited = console.options.update(width=10_000)
        console.width = max(console.width, console.measure(table, options=unlimited).maximum)
    console.print(table)
