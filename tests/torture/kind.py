"""One kind of fuzzed input, and what all kinds share."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

from hypothesis import strategies as st


@dataclass(frozen=True)
class Kind:
    """A kind of input: how it is drawn, and the check, which raises where the program does what it must not."""

    name: str
    inputs: st.SearchStrategy[object]
    check: Callable[[object], bool]
    """Whether the program took the input; an AssertionError or any error that is not a message fails."""


class Call:
    """Runs a command when it is unpickled the ordinary way."""

    def __init__(self, marker: Path) -> None:
        self.marker = str(marker)

    def __reduce__(self) -> tuple[object, tuple[str]]:
        return exec, (f"open({self.marker!r}, 'w')",)


def refused(error: Exception) -> bool:
    """Return that an input was not taken; the error must say why."""
    assert str(error).strip(), "an error without a message"
    return False
