"""The program `dist-train`. Commands parse arguments, call the library and print; torch is loaded only if needed."""

from __future__ import annotations

import argparse
import errno
import io
import os
import re
import sys
from collections.abc import Sequence
from contextlib import nullcontext, redirect_stderr, suppress
from functools import cache
from typing import Any, NoReturn

from dist_train import __version__
from dist_train.cli import (
    analysis_commands,
    completion,
    config_commands,
    run_commands,
    sweep_commands,
    view_commands,
)
from dist_train.cluster.launch import current_launch
from dist_train.config import Config
from dist_train.config.problems import settings_called
from dist_train.outcome import (
    DISK_FAILED,
    SHARED_ERRORS,
    CodedError,
    ExitCode,
    FaultError,
    PeerFailedError,
    UsageError,
    did_you_mean,
    exit_code_of,
    printable,
    say_on_stderr,
    text_with_code,
)
from dist_train.rundir.paths import DISK_FULL

_MODULES = (run_commands, sweep_commands, analysis_commands, view_commands, config_commands, completion)


def main(arguments: Sequence[str] | None = None) -> int:
    """Run the command in `arguments` (default: the command line), and return its exit code."""
    _open_standard_descriptors()
    if isinstance(sys.stdout, io.TextIOWrapper):
        sys.stdout.reconfigure(errors="replace")  # some encodings lack characters of curves, tables and reasons
    try:
        try:
            return _run(list(sys.argv[1:] if arguments is None else arguments))
        finally:
            # Not left to the interpreter, which prints a fault as ignored.
            if sys.stdout is not None:
                sys.stdout.flush()
    except OSError as error:
        is_closed = isinstance(error, BrokenPipeError)  # the reader of our output has gone
        if not is_closed and error.errno not in DISK_FULL:
            raise
        sys.stdout = None  # whose rest the interpreter would try to write once more
        if is_closed:
            return ExitCode.FAULT
        what = error.filename or "the output"
        return _report(FaultError(f"{what} cannot be written: {error.strerror}", code="output-unwritable"))
    finally:
        try:
            if sys.stderr is not None:
                sys.stderr.flush()
        except OSError:
            sys.stderr = None  # likewise: the interpreter would then end with code 120


def _open_standard_descriptors() -> None:
    """Open those of the descriptors 0 to 2 that are closed, so that no socket and no file of a run gets their number.

    Else /dev/null replaces the socket in a child process, and warnings of C++ end in the file.
    """
    with suppress(OSError):  # a container may have no /dev/null
        for descriptor, name in enumerate(("stdin", "stdout", "stderr")):
            try:
                os.fstat(descriptor)
            except OSError:
                # the lowest free number; inheritable, for commands that are started without streams of their own
                os.set_inheritable(os.open(os.devnull, os.O_RDWR), True)
                if getattr(sys, name) is None:
                    setattr(sys, name, os.fdopen(descriptor, "w" if descriptor else "r", closefd=False))


def _run(words: list[str]) -> int:
    try:
        # All ranks of a launch have the same arguments: only rank 0 reports errors in them.
        with nullcontext() if current_launch().rank == 0 else redirect_stderr(io.StringIO()):
            parsed = parse(words)
        return int(parsed.run(parsed))
    except CodedError as error:
        return _report(error)
    except OSError as error:
        if error.filename is not None and isinstance(error, PermissionError):  # a run directory is its user's alone
            return _report(UsageError(f"permission denied: {error.filename}", code="permission-denied"))
        if error.errno == errno.ENAMETOOLONG:
            return _report(UsageError(f"the name is too long: {error.filename}", code="name-too-long"))
        if error.filename is not None and error.errno in DISK_FAILED:
            return _report(FaultError(f"{error.strerror}: {error.filename}", code="disk-failed"))
        raise


def _report(error: CodedError) -> int:
    """Print `error`, on rank 0 alone if all ranks have it, and return the exit code. A failed peer reports itself."""
    is_reported_elsewhere = isinstance(error, SHARED_ERRORS) and current_launch().rank != 0
    if not (is_reported_elsewhere or isinstance(error, PeerFailedError)):
        say_on_stderr(f"dist-train: {printable(text_with_code(error))}")
    return exit_code_of(error)


def parse(words: list[str]) -> argparse.Namespace:
    """Return the arguments of the command line `words`; `run` is the command's function. Exits if they are wrong."""
    parser = build_parser()
    end = words.index("--") if words[:1] == ["submit"] and "--" in words else len(words)
    parsed, rest = parser.parse_known_args(words[:end])
    if hasattr(parsed, "sbatch_options"):
        parsed.sbatch_options = words[end + 1 :]
    if rest and not hasattr(parsed, "overrides"):
        parser.error(f"unrecognized arguments: {' '.join(rest)}")
    if rest:  # overrides after an option: argparse recognizes only those before it
        parsed.overrides = [*parsed.overrides, *rest]
    return parsed


@cache  # with thirty parsers of commands it takes as long as the rest of a short command
def build_parser() -> argparse.ArgumentParser:
    """Return the program's parser, with all commands."""
    parser: argparse.ArgumentParser = _Parser(
        prog="dist-train",
        description="Train image classifiers with data parallelism at very large batch sizes.",
        epilog="A first run: dist-train train dist_train:configs/smoke.yaml (each command has its own --help)",
    )
    parser.add_argument("--version", action="version", version=f"dist-train {__version__}")
    subparsers = parser.add_subparsers(title="commands", metavar="COMMAND", required=True)
    commands = (add_command for module in _MODULES for add_command in module.COMMANDS)
    for add_command in (*commands, *run_commands.FOR_SCRIPTS):
        add_command(subparsers)
    return parser


_LAUNCH_OPTIONS = ("-np", "--min-ranks", "--max-ranks", "--restarts", "--start-with", "--listen", "--join")


class _Parser(argparse.ArgumentParser):
    """Suggests the nearest command, choice or option for a mistyped one; the commands' parsers do the same."""

    def __init__(self, *args: Any, **options: Any) -> None:
        super().__init__(*args, **options)
        # argparse takes -1e-3 for an option.
        self._negative_number_matcher = re.compile(r"-(\d+\.?\d*|\.\d+)(e[-+]?\d+)?$", re.IGNORECASE)

    def parse_known_args(self, args: Any = None, namespace: Any = None) -> Any:
        """Return the arguments, and the unrecognized words, none of which may be an option."""
        parsed, rest = super().parse_known_args(args, namespace)
        unknown = [word for word in rest if word.startswith("-")]
        if unknown:
            option = unknown[0].partition("=")[0]
            hint = did_you_mean(option, self._option_string_actions.keys() - {"--help"})  # which --lr would be near
            if option in _LAUNCH_OPTIONS:
                hint = f"; {option} is an option of launch, before its command: dist-train launch -np 2 train CONFIG"
            elif "." in option:
                setting = unknown[0].lstrip("-")
                hint = f"; a setting has no dashes: {setting if '=' in setting else f'{setting}=VALUE'}"
            elif not hint and any(action.dest == "config" for action in self._actions):
                settings = settings_called(option.lstrip("-").replace("-", "_"), Config)
                hint = f"; a setting has no dashes: {settings[0]}=VALUE" if len(settings) == 1 else ""
            self.error(f"unrecognized arguments: {' '.join(unknown)}{hint}")
        return parsed, rest

    def error(self, message: str) -> NoReturn:
        """Print `message`, escaped, and exit with code 2."""
        super().error(printable(message))

    def _check_value(self, action: argparse.Action, value: Any) -> None:
        try:
            super()._check_value(action, value)
        except argparse.ArgumentError as error:
            options = self._option_string_actions if action.metavar == "COMMAND" else ()  # --help, --version
            hint = did_you_mean(str(value), [*map(str, action.choices or ()), *options])
            if action.metavar == "COMMAND" and str(value).endswith((".yaml", ".yml")):
                hint = f"; the command comes first: train {value}"
            raise argparse.ArgumentError(action, f"{error.message}{hint}") from None
