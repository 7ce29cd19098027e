"""Atomic files: written to a temporary file, flushed to disk, renamed into place. And JSON without NaN or infinities.

Temporary names are random and new, so that nobody can place a file or a link there beforehand.
"""

from __future__ import annotations

import errno
import fcntl
import hashlib
import json
import logging
import math
import os
import secrets
import stat
import time
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager, suppress
from itertools import compress
from pathlib import Path
from typing import BinaryIO

_logger = logging.getLogger(__name__)


def exists(path: Path) -> bool:
    """Whether `path` exists. Raises OSError if that cannot be told, where `Path.exists` says no since Python 3.14."""
    try:
        path.stat()
    except (OSError, ValueError) as error:
        if isinstance(error, OSError) and error.errno not in (errno.ENOENT, errno.ENOTDIR, errno.ELOOP):
            raise
        return False
    return True


@contextmanager
def replacing(path: Path, *, is_shared: bool = False) -> Iterator[BinaryIO]:
    """Open a temporary file beside `path`, which durably replaces `path` when the block ends without an error.

    The user alone may read it or, if it `is_shared`, those who may read the present one, by default those of the umask.
    If the block raises, `path` stays as it was and the temporary file is removed.
    """
    with _swapping(path, 0o666 if is_shared else 0o600) as file:
        if is_shared and path.exists():
            os.fchmod(file.fileno(), path.stat().st_mode & 0o777)
        yield file
        file.flush()
        os.fsync(file.fileno())
    flush_directory(path.parent)


@contextmanager
def _swapping(path: Path, mode: int) -> Iterator[BinaryIO]:
    """Open a temporary file, with `mode` less the umask, as `replacing` does, but without waiting for the disk."""
    temporary = path.with_name(f".{path.name}.{secrets.token_hex(8)}.part")
    flags = os.O_WRONLY | os.O_CREAT | os.O_EXCL | os.O_NOFOLLOW | os.O_CLOEXEC
    descriptor = os.open(temporary, flags, mode)
    try:
        with os.fdopen(descriptor, "wb") as file:
            yield file
        os.replace(temporary, path)
    except BaseException:
        temporary.unlink(missing_ok=True)
        raise


def remove_partial_files(folder: Path, pattern: str, idle_seconds: float = 0) -> None:
    """Delete what killed processes have left in `folder` of files whose names match `pattern`, as far as possible.

    No other process may be writing such files; only those are deleted that nobody has written to for `idle_seconds`.
    """
    with suppress(OSError):
        for part in folder.glob(f".{pattern}.*.part"):
            if not idle_seconds or time.time() - part.stat().st_mtime >= idle_seconds:
                part.unlink(missing_ok=True)


def write_bytes(path: Path, content: bytes, *, is_shared: bool = False) -> None:
    """Write `content` to `path`, whole or not at all, and flush it to disk; who may read it: see `replacing`."""
    with replacing(path, is_shared=is_shared) as file:
        file.write(content)


def write_text(path: Path, content: str, *, is_shared: bool = False) -> None:
    """Write `content` to `path` in UTF-8, as `write_bytes` does."""
    write_bytes(path, content.encode(), is_shared=is_shared)


def keep_lines(path: Path, is_kept: Callable[[bytes], bool]) -> None:
    """Remove from `path` the lines that are not to be kept, atomically; add the newline that the last one may lack.

    `is_kept` is called once for each line, in order. The file may be large: it is read line by line, and written only
    if it changes. Who may read it: see `replacing`. Raises OSError.
    """
    with open_regular(path) as before, _naming(path):
        line, kept = b"\n", bytearray()
        for line in before:
            kept.append(is_kept(line))
        if all(kept) and line.endswith(b"\n"):
            return
        before.seek(0)
        with replacing(path, is_shared=True) as after:
            after.writelines(line.removesuffix(b"\n") + b"\n" for line in compress(before, kept))


def flush_directory(directory: Path) -> None:
    """Flush the names in `directory` to disk, so that a rename survives a power failure."""
    descriptor = os.open(directory, os.O_RDONLY | os.O_DIRECTORY)
    try:
        os.fsync(descriptor)
    except OSError as error:
        # Some file systems, such as SMB's, cannot flush a folder, and say so by these. PostgreSQL ignores them, too.
        if error.errno not in (errno.EINVAL, errno.EBADF):
            raise
    finally:
        os.close(descriptor)


def swap_text(path: Path, content: str, mode: int | None = None) -> None:
    """Replace the content of `path`, without waiting for the disk; `mode`: its permissions, by default the umask's."""
    with _swapping(path, 0o666) as file:
        file.write(content.encode())
        if mode is not None:
            os.fchmod(file.fileno(), mode)


@contextmanager
def exclusive(path: Path) -> Iterator[None]:
    """Hold an exclusive lock on the file `path`, waiting for its present holder; the lock ends with this process.

    The empty file stays: deleting it would let two processes in. Raises OSError if the file cannot be made or its file
    system has no locks.
    """
    descriptor = os.open(path, os.O_RDWR | os.O_CREAT | os.O_CLOEXEC, 0o644)
    try:
        try:
            fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            _logger.info("waiting for the process that holds %s", path)
            fcntl.flock(descriptor, fcntl.LOCK_EX)
        yield
    finally:
        os.close(descriptor)


def open_regular(path: Path, flags: int = 0) -> BinaryIO:
    """Open the regular file at `path`, with `flags` of `os.open`. Raises OSError for a FIFO, too: it could block."""
    descriptor = os.open(path, os.O_RDONLY | os.O_NONBLOCK | os.O_CLOEXEC | flags)
    if not stat.S_ISREG(os.fstat(descriptor).st_mode):
        os.close(descriptor)
        raise OSError(errno.EINVAL, "not a regular file", str(path))
    return os.fdopen(descriptor, "rb")


def read_regular(path: Path) -> bytes:
    """Return the content of the regular file at `path`. Raises OSError as `open_regular` does; it names the file."""
    with open_regular(path) as file, _naming(path):
        return file.read()


def read_end(path: Path, most: int) -> tuple[bytes, int]:
    """Return the last `most` bytes of the regular file at `path`, and its size. Raises OSError as `read_regular`."""
    with open_regular(path) as file, _naming(path):
        size = file.seek(0, os.SEEK_END)
        file.seek(max(0, size - most))
        return file.read(), size


@contextmanager
def _naming(path: Path) -> Iterator[None]:
    try:
        yield
    except OSError as error:  # of a read, which names no file
        error.filename = str(path)
        raise


def sha256_of(path: Path) -> str:
    """Return the SHA-256 of the file at `path`. Raises OSError."""
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def finite(number: float) -> float | None:
    """Return `number`, or None if it is NaN or infinite."""
    return number if math.isfinite(number) else None


def json_text(value: object, indent: int | None = None) -> str:
    """Return `value`, of plain mappings, sequences and scalars, as JSON; numbers that are not finite become null."""
    return json.dumps(_plain(value), indent=indent, allow_nan=False)


def nan_for_null(fields: Mapping[str, object]) -> dict[str, object]:
    """Return `fields` with NaN in place of null, as `json_text` writes numbers that are not finite."""
    return {name: math.nan if value is None else value for name, value in fields.items()}


def _plain(value: object) -> object:
    match value:
        case float():
            return finite(value)
        case str():  # half a character, of a name or a message that is not UTF-8, most readers of JSON refuse
            return value.encode(errors="backslashreplace").decode()
        case Mapping():
            return {key: _plain(inner) for key, inner in value.items()}
        case list() | tuple():
            return [_plain(inner) for inner in value]
    return value
