"""A trial's small disk, which can be full, read-only or missing for a while."""

from __future__ import annotations

import fcntl
import os
import struct
import subprocess
import tempfile
import time
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from functools import cache
from pathlib import Path

_MEGABYTES = 24
_GET_FLAGS, _SET_FLAGS, _IMMUTABLE = 0x80086601, 0x40086602, 0x10
_BLOCK = 1 << 16


@cache
def can_mount() -> bool:
    """Whether this process may mount file systems: root in a user namespace may not, though it may make namespaces."""
    with tempfile.TemporaryDirectory() as folder:
        try:
            subprocess.run(_mount_command(Path(folder)), capture_output=True, check=True)
        except (OSError, subprocess.CalledProcessError):
            return False
        subprocess.run(["umount", "--lazy", folder], check=True)
    return True


def can_make_immutable(folder: Path) -> bool:
    """Whether this process may make folders in `folder` immutable."""
    probe = folder / "probe"
    probe.mkdir()
    try:
        _set_immutable(probe, is_immutable=True)
        _set_immutable(probe, is_immutable=False)
    except OSError:
        return False
    finally:
        probe.rmdir()
    return True


class Disk:
    """A folder, mounted as its own disk where the system allows it."""

    def __init__(self, folder: Path, is_mounted: bool) -> None:
        folder.mkdir()
        self.root = folder
        self._is_mounted = is_mounted
        if is_mounted:
            subprocess.run(_mount_command(folder), check=True)

    def close(self) -> None:
        """Unmount the disk."""
        if self._is_mounted:
            subprocess.run(["umount", "--lazy", str(self.root)], check=True)

    @contextmanager
    def full(self) -> Iterator[None]:
        """Keep the disk full."""
        ballast = self.root / "ballast"
        try:
            with suppress(OSError), ballast.open("wb", buffering=0) as file:
                while True:
                    file.write(bytes(_BLOCK))
            yield
        finally:
            ballast.unlink(missing_ok=True)

    @contextmanager
    def read_only(self, folder: Path) -> Iterator[None]:
        """Make `folder` and all folders below it immutable."""
        folders = [folder, *(path for path in folder.rglob("*") if path.is_dir())]
        try:
            for path in folders:
                _set_immutable(path, is_immutable=True)
            yield
        finally:
            for path in folders:
                with suppress(FileNotFoundError):
                    _set_immutable(path, is_immutable=False)


@contextmanager
def vanished(folder: Path) -> Iterator[None]:
    """Rename `folder`; a folder created in its place is renamed as well afterwards."""
    away = folder.with_name(f"{folder.name}.away")
    folder.rename(away)
    try:
        yield
    finally:
        if folder.exists():
            folder.rename(folder.with_name(f"{folder.name}.replacement-{time.monotonic_ns()}"))
        away.rename(folder)


def _set_immutable(path: Path, *, is_immutable: bool) -> None:
    descriptor = os.open(path, os.O_RDONLY)
    try:
        (flags,) = struct.unpack("l", fcntl.ioctl(descriptor, _GET_FLAGS, bytes(8)))
        flags = flags | _IMMUTABLE if is_immutable else flags & ~_IMMUTABLE
        fcntl.ioctl(descriptor, _SET_FLAGS, struct.pack("l", flags))
    finally:
        os.close(descriptor)


def _mount_command(folder: Path) -> list[str]:
    return ["mount", "-t", "tmpfs", "-o", f"size={_MEGABYTES}m", "tmpfs", str(folder)]
