"""Follows a file that another process, on any machine, appends to or replaces: only what is new is read."""

from __future__ import annotations

import os
from dataclasses import dataclass
from pathlib import Path

_REMEMBERED = 256


@dataclass(frozen=True)
class News:
    """Whole lines since the last look, without their ends; `anew` where all that was read before is void."""

    lines: tuple[bytes, ...] = ()
    anew: bool = False


class Follower:
    """Reads `path` from where the last look ended; a torn last line waits until it is whole.

    A file that is another one now, has become shorter, or holds other bytes where the last look ended, is read anew.
    """

    def __init__(self, path: Path) -> None:
        self._path = path
        self._file: tuple[int, int] | None = None
        self._offset = 0
        self._before = b""
        """The last bytes before `_offset`, to tell this file from another one."""

    def look(self) -> News:
        """Return what is new. Raises OSError where the file is there but cannot be read."""
        try:
            with self._path.open("rb") as file:
                state = os.fstat(file.fileno())
                anew = not self._is_the_same(state, os.pread(file.fileno(), len(self._before), self._checked_from))
                if anew:
                    self._forget()
                self._file = (state.st_dev, state.st_ino)
                file.seek(self._offset)
                content = file.read()
        except FileNotFoundError:
            had_something = self._offset > 0
            self._forget()
            return News(anew=had_something)
        return News(self._take(content), anew)

    @property
    def _checked_from(self) -> int:
        return self._offset - len(self._before)

    def _is_the_same(self, state: os.stat_result, before: bytes) -> bool:
        if self._file is None:
            return True
        return self._file == (state.st_dev, state.st_ino) and state.st_size >= self._offset and before == self._before

    def _take(self, content: bytes) -> tuple[bytes, ...]:
        whole = content[: content.rfind(b"\n") + 1]
        if not whole:
            return ()
        self._offset += len(whole)
        self._before = (self._before + whole[-_REMEMBERED:])[-_REMEMBERED:]
        return tuple(whole[:-1].split(b"\n"))

    def _forget(self) -> None:
        self._file, self._offset, self._before = None, 0, b""
