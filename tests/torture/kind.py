"""A kind of fuzzed input, and helpers of all kinds."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

from hypothesis import strategies as st


@dataclass(frozen=True)
class Kind:
    """A kind of input, with the strategy that draws it and the check of the program's reaction."""

    name: str
    inputs: st.SearchStrategy[object]
    check: Callable[[object], bool]
    """Returns whether the program accepted the input; raises if it reacted in a forbidden way."""


class Call:
    """Runs code when it is unpickled."""

    def __init__(self, marker: Path) -> None:
        self.marker = str(marker)

    def __reduce__(self) -> tuple[object, tuple[str]]:
        return exec, (f"open({self.marker!r}, 'w')",)


def refused(error: Exception) -> bool:
    """Return False for a refused input; the error must have a message."""
    assert str(error).strip(), "an error without a message"
    return False
