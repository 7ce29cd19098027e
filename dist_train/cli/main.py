"""The program `dist-train`: every command parses, calls and prints; torch is imported by those that need it."""

from __future__ import annotations

import argparse
import io
import sys
from collections.abc import Sequence
from contextlib import AbstractContextManager, nullcontext, redirect_stderr

from dist_train import __version__
from dist_train.cli.analysis_commands import add_landscape, add_sharpness
from dist_train.cli.config_commands import add_config_command, add_doctor
from dist_train.cli.run_commands import add_evaluate, add_launch, add_outcome, add_requeue, add_train
from dist_train.cli.sweep_commands import add_submit, add_sweep
from dist_train.cli.view_commands import add_curve, add_report, add_runs, add_watch
from dist_train.cluster.launch import current_launch
from dist_train.outcome import DivergedError, ExitCode, FaultError, UsageError, exit_code_of, printable

_COMMANDS = (
    add_train,
    add_launch,
    add_submit,
    add_sweep,
    add_evaluate,
    add_landscape,
    add_sharpness,
    add_runs,
    add_watch,
    add_curve,
    add_report,
    add_doctor,
    add_config_command,
    add_outcome,
    add_requeue,
)


def main(arguments: Sequence[str] | None = None) -> int:
    """Run the command that `arguments` (else the command line) name and return its exit code."""
    try:
        with _errors_of_one_rank():
            parsed = parse(list(sys.argv[1:] if arguments is None else arguments))
        return int(parsed.run(parsed))
    except (UsageError, FaultError, DivergedError) as error:
        return _refuse(error, exit_code_of(error))
    except ValueError as error:
        from dist_train.config import ConfigError

        if not isinstance(error, ConfigError):
            raise
        return _refuse(error, ExitCode.USAGE)
    except BrokenPipeError:
        # The reader of our output has gone.
        sys.stderr.close()
        return ExitCode.FAULT


def parse(words: list[str]) -> argparse.Namespace:
    """Return what the command line `words` say; `run` is the command's function.

    Raises:
        SystemExit: with 2, after a message, where they make no sense; with 0 after --help.
    """
    parser = argparse.ArgumentParser(prog="dist-train", description="Training at very large batch sizes.")
    parser.add_argument("--version", action="version", version=f"dist-train {__version__}")
    subparsers = parser.add_subparsers(title="commands", metavar="COMMAND", required=True)
    for add_command in _COMMANDS:
        add_command(subparsers)
    parsed, rest = _parse(parser, words)
    _take_late_overrides(parser, parsed, rest)
    return parsed


def _errors_of_one_rank() -> AbstractContextManager[object]:
    """Let only the first rank of a launch complain of the arguments: all ranks have the same ones."""
    return nullcontext() if current_launch().rank == 0 else redirect_stderr(io.StringIO())


def _parse(parser: argparse.ArgumentParser, words: list[str]) -> tuple[argparse.Namespace, list[str]]:
    """Return the arguments, and the words that are none; what follows `--` goes to sbatch where a command has that."""
    if "--" in words:
        end = words.index("--")
        parsed, rest = parser.parse_known_args(words[:end])
        if hasattr(parsed, "sbatch_options"):
            parsed.sbatch_options = words[end + 1 :]
            return parsed, rest
    return parser.parse_known_args(words)


def _take_late_overrides(parser: argparse.ArgumentParser, parsed: argparse.Namespace, rest: list[str]) -> None:
    """Add the overrides that stand after an option: argparse takes those before it alone."""
    unknown = [word for word in rest if word.startswith("-") or not hasattr(parsed, "overrides")]
    if unknown:
        parser.error(printable(f"unrecognized arguments: {' '.join(unknown)}"))
    if rest:
        parsed.overrides = [*parsed.overrides, *rest]


def _refuse(error: Exception, code: ExitCode) -> int:
    print(f"dist-train: {printable(str(error))}", file=sys.stderr)
    return code
