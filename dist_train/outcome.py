"""How a command can end: exit codes, the errors that lead to them, and texts that are safe to print."""

import re
from enum import IntEnum

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


class UsageError(ValueError):
    """Something that the user can mend; its text says how. Exit code 2."""


class FaultError(RuntimeError):
    """Something broke that is neither the user's doing nor a bug; its text says what. Exit code 1."""


class DivergedError(RuntimeError):
    """A loss, a gradient or the last evaluation is not finite, or out of range. Exit code 3."""


class DisagreementError(RuntimeError):
    """Ranks hold different weights or noise; its text names them. Exit code 4."""


class StoppedError(Exception):
    """The run saved and stopped because it was asked to. Exit code 75."""


def exit_code_of(error: BaseException) -> ExitCode:
    """Return the exit code that `error` leads to."""
    codes = (
        (UsageError, ExitCode.USAGE),
        (DivergedError, ExitCode.DIVERGED),
        (DisagreementError, ExitCode.DISAGREEMENT),
        (StoppedError, ExitCode.STOPPED),
    )
    return next((code for kind, code in codes if isinstance(error, kind)), ExitCode.FAULT)


def escaped(text: str) -> str:
    r"""Return `text`, of a file or a name, as one line that does nothing to a terminal: ESC becomes \x1b, NUL \x00."""
    shown = (each if each.isprintable() else each.encode("unicode_escape").decode() for each in text)
    return "".join(shown)


def printable(message: str) -> str:
    """Return `message` with its lines escaped, and names, passwords and queries in URLs masked."""
    masked = _QUERY.sub(r"\1***", _LOGIN.sub("***", message))
    return "\n".join(map(escaped, masked.split("\n")))
