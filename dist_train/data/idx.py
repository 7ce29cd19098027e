"""IDX files, the format of MNIST and its successors: a big-endian header and plain bytes."""

from __future__ import annotations

import gzip
import math
import zlib
from pathlib import Path

import numpy as np
from numpy.typing import NDArray

from dist_train.outcome import UsageError

_UNSIGNED_BYTE = 0x08
_CHUNK = 1 << 22


def read_idx(path: Path, dimensions: int, fix: str) -> NDArray[np.uint8]:
    """Return the unsigned bytes in `path` (gzip when it ends in .gz) with that many dimensions.

    Raises UsageError, ending in `fix`, when the file cannot be read, is cut short, is longer than its
    header says, or is no IDX file of unsigned bytes with these dimensions.
    """
    header_bytes = 4 + 4 * dimensions
    content = _read(path, header_bytes, dimensions, fix)
    if len(content) < header_bytes:
        raise _damaged(path, f"it holds {len(content)} bytes, less than an IDX header of {header_bytes}", fix)
    magic = (_UNSIGNED_BYTE << 8) | dimensions
    found = int.from_bytes(content[:4], "big")
    if found != magic:
        raise _damaged(path, f"it begins with {found:08x}, not with the IDX magic number {magic:08x}", fix)
    shape = _shape(content, dimensions)
    expected = header_bytes + math.prod(shape)
    if len(content) != expected:
        holds = f"more than {expected}" if len(content) > expected else f"{len(content)}"
        what = " x ".join(map(str, shape))
        raise _damaged(path, f"its header announces {what} bytes, {expected} in all; it holds {holds}", fix)
    return np.frombuffer(content, dtype=np.uint8, offset=header_bytes).reshape(shape)


def _read(path: Path, header_bytes: int, dimensions: int, fix: str) -> bytearray:
    """Read `path` up to one byte more than its header announces, so that no file can fill the memory."""
    content = bytearray()
    limit = header_bytes
    try:
        with gzip.open(path, "rb") if path.suffix == ".gz" else path.open("rb") as file:
            while len(content) <= limit:
                chunk = file.read(_CHUNK)
                if not chunk:
                    break
                content += chunk
                if len(content) >= header_bytes:
                    limit = header_bytes + math.prod(_shape(content, dimensions))
    except (gzip.BadGzipFile, EOFError, zlib.error) as error:
        raise _damaged(path, f"gzip cannot unpack it ({error})", fix) from error
    except OSError as error:
        raise UsageError(f"cannot read {path}: {error.strerror or error}. {fix}") from error
    return content


def _shape(content: bytearray, dimensions: int) -> tuple[int, ...]:
    return tuple(int.from_bytes(content[4 * i : 4 * i + 4], "big") for i in range(1, dimensions + 1))


def _damaged(path: Path, reason: str, fix: str) -> UsageError:
    return UsageError(f"{path} is damaged: {reason}. {fix}")
