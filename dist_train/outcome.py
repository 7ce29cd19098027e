"""How a command can end: exit codes, the errors that lead to them, and texts that are safe to print."""

from __future__ import annotations

import re
from collections.abc import Iterator
from contextlib import contextmanager
from enum import IntEnum
from pathlib import Path
from typing import get_args

_LOGIN = re.compile(r"(?<=://)\S{1,512}(?=@)|[^\s:/@]{1,256}:[^\s/@]\S{0,512}(?=@)")
_QUERY = re.compile(r"(https?://[^\s?]*\?)\S+")


class ExitCode(IntEnum):
    """The exit codes that users and launch scripts rely on."""

    FINISHED = 0
    FAULT = 1
    USAGE = 2
    DIVERGED = 3
    DISAGREEMENT = 4
    STOPPED = 75


class CodedError(Exception):
    """An error whose text a person reads, and whose `code` (kebab-case, listed in docs/errors.md) a program does."""

    code = "error"
    exit_code = ExitCode.FAULT

    def __init__(self, text: str, *, code: str | None = None) -> None:
        """Say `text`; without a `code`, the error has its class's."""
        super().__init__(text)
        if code is not None:
            self.code = code


class UsageError(CodedError, ValueError):
    """Something that the user can mend; its text says how. Exit code 2."""

    code = "usage"
    exit_code = ExitCode.USAGE


class FaultError(CodedError, RuntimeError):
    """Something broke that is neither the user's doing nor a bug; its text says what. Exit code 1."""

    code = "fault"


class DivergedError(CodedError, RuntimeError):
    """A loss, a gradient or the last evaluation is not finite, or out of range. Exit code 3."""

    code = "diverged"
    exit_code = ExitCode.DIVERGED


class DisagreementError(CodedError, RuntimeError):
    """Ranks hold different weights or noise; its text names them. Exit code 4."""

    code = "disagreement"
    exit_code = ExitCode.DISAGREEMENT


class StoppedError(CodedError):
    """The run saved and stopped because it was asked to. Exit code 75."""

    code = "stopped"
    exit_code = ExitCode.STOPPED


SHARED_ERRORS = (DivergedError, DisagreementError, StoppedError)
"""Errors that end a run on all ranks alike; any other error is that of one rank."""


class PeerFailedError(UsageError):
    """Another rank failed, with this exit code, and reports why."""

    code = "peer-failed"

    def __init__(self, text: str, exit_code: ExitCode) -> None:
        super().__init__(text)
        self.exit_code = exit_code


@contextmanager
def writing(place: Path, fix: str) -> Iterator[None]:
    """Turn an OSError in the block into a UsageError: `place` cannot be written, and how to fix it."""
    try:
        yield
    except OSError as error:
        raise UsageError(
            f"cannot write {place} ({error.strerror or error}): {fix}", code="output-unwritable"
        ) from error


@contextmanager
def reading(place: Path, fix: str = "", code: str = "data-unreadable") -> Iterator[None]:
    """Turn an OSError in the block into a UsageError: `place` cannot be read, and how to fix it."""
    try:
        yield
    except OSError as error:
        ending = f". {fix}" if fix else ""
        raise UsageError(f"cannot read {place}: {error.strerror or error}{ending}", code=code) from error


def check_choice(name: str, value: object, choices: object) -> None:
    """Raise UsageError if the argument `name` is not one of `choices`, a Literal."""
    if value not in get_args(choices):
        raise UsageError(f"{name} is {', '.join(get_args(choices))}, not {value!r}", code="no-such-choice")


_GENERAL = frozenset(kind.code for kind in (UsageError, FaultError, DivergedError, DisagreementError, StoppedError))


def text_with_code(error: CodedError) -> str:
    """Return the text of `error`, and behind it its [code] where that says more than the exit code does."""
    return str(error) if error.code in _GENERAL else f"{error} [{error.code}]"


def exit_code_of(error: BaseException) -> ExitCode:
    """Return the exit code that `error` leads to."""
    return error.exit_code if isinstance(error, CodedError) else ExitCode.FAULT


def escaped(text: str) -> str:
    r"""Return `text`, of a file or a name, as one line that does nothing to a terminal: ESC becomes \x1b, NUL \x00."""
    return "".join(each if each.isprintable() else each.encode("unicode_escape").decode() for each in text)


def printable(message: str) -> str:
    """Return `message` with its lines escaped, and names, passwords and queries in URLs masked."""
    masked = _QUERY.sub(r"\1***", _LOGIN.sub("***", message))
    return "\n".join(map(escaped, masked.split("\n")))
