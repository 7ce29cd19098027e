"""Encoded images that lie in a few large files, many in each: where each one begins and ends, and its label.

A file's index, int64 [samples, 3] of offset, length and label, is made at its first use and kept in the cache.
"""

from __future__ import annotations

import hashlib
import logging
import re
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from dist_train.data.cache import cache_folder, exclusive, refuse_foreign_cache
from dist_train.data.images import Split
from dist_train.outcome import UsageError
from dist_train.randomness import generator
from dist_train.rundir.atomic import replacing

_LOGGER = logging.getLogger("dist_train.data")
_VERSION = 1

NAMES: dict[Split, tuple[str, ...]] = {
    "train": ("train",),
    "validation": ("train",),
    "test": ("val", "validation", "test"),
}
"""What a split's folder or files may be called; the first that there are."""

Index = NDArray[np.int64]
"""Offset, length and label of each sample of a file, int64 [samples, 3]."""


@dataclass(frozen=True)
class PackedFile:
    """A file with encoded images: where their bytes are, what messages call it, where each image lies in it."""

    path: Path
    origin: Path
    index: Index


@dataclass(frozen=True)
class PackedListing:
    """The images of a split, in the order of its samples."""

    files: tuple[str, ...]
    origins: tuple[str, ...]
    parts: Tensor
    """int64 [n, 4]: number of the file, offset, length, number of the sample in its file"""
    labels: Tensor
    """int64 [n]"""

    def __len__(self) -> int:
        return len(self.labels)

    def reference(self, sample: int) -> tuple[str, int, int, str]:
        """Return where an image lies (`decoding.Part`)."""
        file, offset, length, number = self.parts[sample].tolist()
        return self.files[file], offset, length, f"{self.origins[file]}, sample {number}"

    def digest(self) -> str:
        """Return what names this listing: its files, and what lies where, not the images."""
        hashed = hashlib.sha256("\0".join(Path(each).name for each in self.origins).encode("utf-8", "surrogateescape"))
        hashed.update(self.parts.numpy().tobytes())
        hashed.update(self.labels.numpy().tobytes())
        return hashed.hexdigest()[:16]

    def select(self, samples: Tensor) -> PackedListing:
        """Return the listing of `samples`, int64, in their order."""
        return PackedListing(self.files, self.origins, self.parts[samples], self.labels[samples])


def packed_listing(files: Sequence[PackedFile], classes: int, split: Split, seed: int) -> PackedListing:
    """Return the images of `files`, shuffled by the seed as an image folder's are.

    Raises:
        UsageError: a label is not below `classes`, or there is no image.
    """
    parts, labels = [], []
    for number, file in enumerate(files):
        rows = np.arange(len(file.index))
        parts.append(np.stack([np.full_like(rows, number), *file.index.T[:2], rows], axis=1))
        found = file.index[:, 2]
        if len(wrong := np.flatnonzero((found < 0) | (found >= classes))):
            raise UsageError(
                f"sample {wrong[0]} of {file.origin} has the label {found[wrong[0]]}, but data.classes is {classes}: "
                f"labels count from 0",
                code="data-labels",
            )
        labels.append(found)
    whole = PackedListing(
        tuple(str(file.path) for file in files),
        tuple(str(file.origin) for file in files),
        torch.from_numpy(np.concatenate(parts)),
        torch.from_numpy(np.concatenate(labels)),
    )
    if not len(whole):
        raise UsageError(f"{files[0].origin} holds no image", code="data-counts")
    return whole.select(torch.randperm(len(whole), generator=generator(seed, "image folder", split)))


def split_files(root: Path, split: Split, suffixes: tuple[str, ...]) -> list[Path]:
    """Return the files of a split, sorted: those in the folder of its name, else those that have it in their own.

    Raises:
        UsageError: there are none.
    """
    try:
        for name in NAMES[split]:
            if (root / name).is_dir():
                found = [path for path in (root / name).iterdir() if path.name.endswith(suffixes)]
            else:
                part = re.compile(rf"(^|[-_.]){name}[-_.]")
                found = [path for path in root.iterdir() if path.name.endswith(suffixes) and part.search(path.name)]
            if found := [path for path in found if not path.name.startswith(".")]:
                return sorted(found)
    except OSError as error:
        raise UsageError(
            f"cannot list {error.filename or root}: {error.strerror or error}", code="image-folder-unreadable"
        ) from error
    name = NAMES[split][0]
    raise UsageError(
        f"{root} holds no {split} data: {name}/*{suffixes[0]} or {name}-*{suffixes[0]} "
        f"(for test: {', '.join(NAMES['test'])}); set data.root",
        code="data-missing",
    )


def cached_index(
    kind: str, source: Path, columns: str, make: Callable[[Path], Index], content: Path | None = None
) -> tuple[Path, Index]:
    """Return the file that the images of `source` lie in, and its index, made once by `make`.

    The file is `content`; none: one in the cache, which `make` writes. Another size or time of change of `source`, or
    other `columns`, make another entry.

    Raises:
        OSError: the cache cannot be used, or `source` cannot be read.
        UsageError: others could exchange what is in the cache.
    """
    found = source.stat()
    text = f"{kind} {_VERSION} {source.resolve()} {found.st_size} {found.st_mtime_ns} {columns}"
    folder = cache_folder() / "packed"
    folder.mkdir(parents=True, exist_ok=True)
    refuse_foreign_cache(folder)
    stem = folder / hashlib.sha256(text.encode("utf-8", "surrogateescape")).hexdigest()[:32]
    content, file = content or stem.with_suffix(".bin"), stem.with_suffix(".npy")
    with exclusive(stem.with_suffix(".lock")):
        if (index := _stored(file, content)) is None:
            _LOGGER.info("reading %s once, to know where its images lie", source)
            index = make(content)
            with replacing(file) as written:
                np.lib.format.write_array(written, index, allow_pickle=False)
    return content, index


def _stored(file: Path, content: Path) -> Index | None:
    """Return the index in `file`, if there is a whole one."""
    try:
        index: Any = np.load(file, allow_pickle=False)
    except FileNotFoundError:
        return None
    except (OSError, ValueError, EOFError) as error:
        _LOGGER.warning("the cached index %s is damaged (%s): making it again", file, error)
        return None
    if index.dtype != np.int64 or index.ndim != 2 or index.shape[1] != 3:
        return None
    if len(index) and not (content.exists() and content.stat().st_size >= (index[:, 0] + index[:, 1]).max()):
        return None
    return index  # type: ignore[no-any-return]  # checked above
