"""Fashion-MNIST from its four IDX files, as Debian's package installs them or in a folder of the user's."""

from __future__ import annotations

import gzip
import math
import zlib
from pathlib import Path

import numpy as np
import torch
from numpy.typing import NDArray

from dist_train.data.cache import data_sets_folder
from dist_train.data.images import ImageSet, Split
from dist_train.outcome import UsageError

_UNSIGNED_BYTE = 0x08
_CHUNK = 1 << 22


def read_idx(path: Path, dimensions: int) -> NDArray[np.uint8]:
    """Return the unsigned bytes in `path` (gzip when it ends in .gz) with that many dimensions.

    Raises UsageError when the file cannot be read, is cut short, is longer than its
    header says, or is no IDX file of unsigned bytes with these dimensions.
    """
    header_bytes = 4 + 4 * dimensions
    content = _read(path, header_bytes, dimensions)
    if len(content) < header_bytes:
        raise _damaged(
            path, f"it holds {len(content)} bytes, less than an IDX header of {header_bytes}", code="data-length"
        )
    magic = (_UNSIGNED_BYTE << 8) | dimensions
    found = int.from_bytes(content[:4], "big")
    if found != magic:
        raise _damaged(
            path, f"it begins with {found:08x}, not with the IDX magic number {magic:08x}", code="data-format"
        )
    shape = _shape(content, dimensions)
    expected = header_bytes + math.prod(shape)
    if len(content) != expected:
        holds = f"more than {expected}" if len(content) > expected else f"{len(content)}"
        what = " x ".join(map(str, shape))
        raise _damaged(
            path, f"its header announces {what} bytes, {expected} in all; it holds {holds}", code="data-length"
        )
    return np.frombuffer(content, dtype=np.uint8, offset=header_bytes).reshape(shape)


def _read(path: Path, header_bytes: int, dimensions: int) -> bytearray:
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
        raise _damaged(path, f"gzip cannot unpack it ({error})", code="data-unpackable") from error
    except OSError as error:
        raise UsageError(f"cannot read {path}: {error.strerror or error}. {_FIX}", code="data-unreadable") from error
    return content


def _shape(content: bytearray, dimensions: int) -> tuple[int, ...]:
    return tuple(int.from_bytes(content[4 * i : 4 * i + 4], "big") for i in range(1, dimensions + 1))


def _damaged(path: Path, reason: str, code: str) -> UsageError:
    return UsageError(f"{path} is damaged: {reason}. {_FIX}", code=code)


VERSION = 1
CLASSES = 10
DEBIAN_FOLDER = Path("/usr/share/datasets/fashion-mnist")

_STEMS = {
    "train": ("train-images-idx3-ubyte", "train-labels-idx1-ubyte"),
    "test": ("t10k-images-idx3-ubyte", "t10k-labels-idx1-ubyte"),
}
_SIDE = 28
_FIX = (
    "Fetch the files with `apt-get install dataset-fashion-mnist` (without root: `docker/fashion_mnist.sh`), "
    "or set data.root to a folder that holds the four IDX files (plain or .gz)."
)


def find(root: Path | None, split: Split) -> tuple[Path, Path]:
    """Return the files with the images and the labels of `split`.

    Without `root`, Debian's folder is searched, then `datasets/fashion-mnist` in the cache folder.
    Raises UsageError when a file is missing.
    """
    folders = [root] if root is not None else [DEBIAN_FOLDER, data_sets_folder() / "fashion-mnist"]
    for folder in folders:
        images, labels = (_existing(folder, stem) for stem in _STEMS[split])
        if images is not None and labels is not None:
            return images, labels
    missing = [stem for stem in _STEMS[split] if all(_existing(folder, stem) is None for folder in folders)]
    names = " and ".join(f"{stem}[.gz]" for stem in missing or _STEMS[split])
    places = " or ".join(map(str, folders))
    raise UsageError(f"Fashion-MNIST: {names} not found in {places}. {_FIX}", code="data-missing")


def decode(files: tuple[Path, Path]) -> ImageSet:
    """Return the images and labels in the two files; UsageError when they are damaged or do not fit."""
    images_file, labels_file = files
    pixels = read_idx(images_file, 3)
    labels = read_idx(labels_file, 1)
    if len(pixels) == 0 or pixels.shape[1:] != (_SIDE, _SIDE):
        found = " x ".join(map(str, pixels.shape))
        raise _damaged(images_file, f"it holds {found} pixels, not images of 28 x 28", code="data-shape")
    if len(labels) != len(pixels):
        raise UsageError(
            f"{images_file} holds {len(pixels)} images but {labels_file} holds {len(labels)} labels: "
            f"one of them is damaged. {_FIX}",
            code="data-counts",
        )
    if labels.max() >= CLASSES:
        raise _damaged(labels_file, f"it holds the label {labels.max()}, not 0 to {CLASSES - 1}", code="data-labels")
    # The arrays are views of bytearrays, hence writable, so that torch takes them as they are.
    return ImageSet(torch.from_numpy(pixels).unsqueeze(1), torch.from_numpy(labels).long(), CLASSES)


def _existing(folder: Path, stem: str) -> Path | None:
    candidates = (folder / stem, folder / f"{stem}.gz")
    return next((path for path in candidates if path.is_file()), None)
