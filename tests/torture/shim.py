"""A jumping clock and a slow disk for the processes of a trial, by a preloaded library."""

from __future__ import annotations

import mmap
import shutil
import struct
import subprocess
from pathlib import Path

_FORMAT = "qq"
_SOURCE = Path(__file__).with_name("shim.c")


def build_shim(folder: Path) -> Path | None:
    """Compile the library into `folder`; None where there is no C compiler."""
    compiler = shutil.which("cc") or shutil.which("gcc")
    if compiler is None:
        return None
    library = folder / "shim.so"
    subprocess.run(
        [compiler, "-shared", "-fPIC", "-O1", "-o", str(library), str(_SOURCE), "-ldl"], check=True, capture_output=True
    )
    return library


class Shim:
    """Controls the clock and the disk of a trial's processes."""

    def __init__(self, library: Path | None, state: Path) -> None:
        self._library = library
        self._path = state
        state.write_bytes(bytes(struct.calcsize(_FORMAT)))
        with state.open("r+b") as file:
            self._map = mmap.mmap(file.fileno(), 0)
        self._clock, self._disk = 0, 0

    def environment(self) -> dict[str, str]:
        """Return the variables that load the library."""
        if self._library is None:
            return {}
        return {"LD_PRELOAD": str(self._library), "TORTURE_STATE": str(self._path)}

    def set_clock(self, seconds: int) -> None:
        """Shift the time of day by so many seconds."""
        self._clock = seconds
        self._write()

    def set_disk(self, milliseconds: int) -> None:
        """Delay every flush to disk by so much."""
        self._disk = milliseconds
        self._write()

    def close(self) -> None:
        """Unmap the shared file."""
        self._map.close()

    def _write(self) -> None:
        self._map[:] = struct.pack(_FORMAT, self._clock, self._disk)
