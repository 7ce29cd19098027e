"""How a command can end: exit codes and errors; and how to print texts safely."""

from __future__ import annotations

import difflib
import errno
import re
import signal
import sys
from collections.abc import Iterable, Iterator
from contextlib import contextmanager, suppress
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
    """An error with a text for people and a `code` for programs (kebab-case, listed in docs/errors.md)."""

    code = "error"
    exit_code = ExitCode.FAULT

    def __init__(self, text: str, *, code: str | None = None) -> None:
        """Without a `code`, the error has that of its class."""
        super().__init__(text)
        if code is not None:
            self.code = code


class UsageError(CodedError, ValueError):
    """Something that the user can fix; the text says how. Exit code 2."""

    code = "usage"
    exit_code = ExitCode.USAGE


class PluginResultError(UsageError):
    """A plug-in returned something that is not what it must return, or that cannot be trained with. Exit code 2."""

    code = "plugin-result"


class FaultError(CodedError, RuntimeError):
    """A failure that is neither the user's mistake nor a bug, such as a full disk. Exit code 1."""

    code = "fault"


class DivergedError(CodedError, RuntimeError):
    """A loss, a gradient or the last evaluation is not finite, or out of range. Exit code 3."""

    code = "diverged"
    exit_code = ExitCode.DIVERGED


class DisagreementError(CodedError, RuntimeError):
    """Ranks hold different weights or noise; the text names them. Exit code 4."""

    code = "disagreement"
    exit_code = ExitCode.DISAGREEMENT


class StoppedError(CodedError):
    """The run has saved and stopped on request. Exit code 75."""

    code = "stopped"
    exit_code = ExitCode.STOPPED


class OutOfMemoryError(UsageError):
    """A training step or an evaluation does not fit the device of some rank; raised on all ranks. Exit code 2."""

    code = "out-of-memory"


SHARED_ERRORS = (DivergedError, DisagreementError, StoppedError, OutOfMemoryError)
"""Errors that end a run on all ranks alike; any other error is that of one rank."""


class PeerFailedError(UsageError):
    """Another rank failed, with this exit code, and reports why."""

    code = "peer-failed"

    def __init__(self, text: str, exit_code: ExitCode) -> None:
        super().__init__(text)
        self.exit_code = exit_code


@contextmanager
def writing(place: Path, fix: str, code: str = "output-unwritable") -> Iterator[None]:
    """Turn an OSError in the block into a UsageError that says that `place` cannot be written, and the `fix`."""
    try:
        yield
    except OSError as error:
        raise UsageError(f"cannot write {place} ({error.strerror or error}): {fix}", code=code) from error


DISK_FAILED = frozenset(
    {errno.EIO, errno.ESTALE, errno.ETIMEDOUT, errno.ENOTCONN, errno.ESHUTDOWN, errno.EHOSTDOWN, errno.EREMOTEIO}
)
"""Errors of a disk or a file server, which may work again later."""


@contextmanager
def reading(place: Path, fix: str = "", code: str = "data-unreadable") -> Iterator[None]:
    """Turn an OSError in the block into a UsageError that names file and `fix`; a FaultError if the disk has failed."""
    try:
        yield
    except OSError as error:
        ending = f". {fix}" if fix else ""
        kind = FaultError if error.errno in DISK_FAILED else UsageError
        raise kind(f"cannot read {error.filename or place}: {error.strerror or error}{ending}", code=code) from error


def check_choice(name: str, value: object, choices: object) -> None:
    """Raise UsageError if `value`, of the argument `name`, is not one of `choices`, a Literal."""
    if value not in get_args(choices):
        raise UsageError(f"{name} must be one of {', '.join(get_args(choices))}, not {value!r}", code="no-such-choice")


def did_you_mean(word: str, known: Iterable[str], prefix: str = "") -> str:
    """Return "; did you mean X?" for the nearest of `known`, with `prefix` before it; "" if none is near."""
    close = difflib.get_close_matches(word, list(known), n=1)
    return f"; did you mean {prefix}{close[0]}?" if close else ""


_GENERAL = frozenset(kind.code for kind in (UsageError, FaultError, DivergedError, DisagreementError, StoppedError))


def text_with_code(error: CodedError) -> str:
    """Return the text of `error`, followed by its [code] unless that is the general one of its class."""
    return str(error) if error.code in _GENERAL else f"{error} [{error.code}]"


def exit_code_of(error: BaseException) -> ExitCode:
    """Return the exit code that `error` leads to."""
    return error.exit_code if isinstance(error, CodedError) else ExitCode.FAULT


def signal_name(number: int) -> str:
    """Return the name of a signal, such as SIGKILL; a real-time one has only its number."""
    return signal.Signals(number).name if number in {*signal.Signals} else f"signal {number}"


def escaped(text: str) -> str:
    r"""Return `text` as one line without control characters: ESC becomes \x1b, NUL \x00."""
    return "".join(each if each.isprintable() else each.encode("unicode_escape").decode() for each in text)


_LONGEST_REASON = 500  # characters; an error of a compiler may have 100,000


def shortened(reason: str) -> str:
    """Return `reason` as one line that is not too long for `status.json` and messages."""
    line = " ".join(reason.split())
    return line if len(line) <= _LONGEST_REASON else f"{line[:_LONGEST_REASON]}... (see the log)"


def printable(message: str) -> str:
    """Return `message` with its lines escaped, and names, passwords and queries in URLs masked."""
    masked = _QUERY.sub(r"\1***", _LOGIN.sub("***", message))
    return "\n".join(map(escaped, masked.split("\n")))


def say_on_stderr(text: str) -> None:
    """Print `text` to standard error, if that can be written."""
    # The terminal or reader may be gone, or the disk full. The message has no other place to go, and what the process
    # does next, such as saving the run, matters more.
    if sys.stderr is not None:
        with suppress(OSError, ValueError):  # a ValueError if it is closed
            # One write: where Python does not buffer, `print` writes the newline separately, and ranks' lines mix.
            sys.stderr.write(f"{text}\n")
            sys.stderr.flush()


_NOT_DETERMINISTIC = re.compile(r"(\w+) does not have a deterministic implementation")

_FIX_FOR_TRAINING = (
    "begin with precision.deterministic=false, which no longer gives the same bits in every run, or with another model"
)


def refuse_nondeterministic(error: BaseException, fix: str = _FIX_FOR_TRAINING) -> None:
    """Raise UsageError if `error` is torch's report that an operator has no deterministic kernel; else do nothing."""
    if "CUBLAS_WORKSPACE_CONFIG" in str(error):
        raise UsageError(
            "this process has multiplied matrices on a GPU before: train in a new process, or set "
            "CUBLAS_WORKSPACE_CONFIG=:4096:8 before Python starts",
            code="kernel-not-deterministic",
        ) from error
    if found := _NOT_DETERMINISTIC.search(str(error)):
        raise UsageError(
            f"the model needs {found[1]}, for which torch has no deterministic kernel: {fix}",
            code="kernel-not-deterministic",
        ) from error
