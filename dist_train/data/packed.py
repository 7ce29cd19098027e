"""Encoded images that lie in a few large files, many in each: where each one begins and ends, and its label.

A file's index, int64 [samples, 3] of offset, length and label, is made at its first use and kept in the cache. Shards
of WebDataset, tar files in which members of one name are one sample (000017.jpg and 000017.cls), may have one beside
them: SHARD.idx, as NVIDIA DALI's wds2idx writes it.
"""

from __future__ import annotations

import hashlib
import logging
import os
import re
import tarfile
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass
from itertools import groupby
from pathlib import Path
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from dist_train.config import DataSettings
from dist_train.data.cache import cache_folder, refuse_foreign_cache
from dist_train.data.image_folder import SUFFIXES
from dist_train.data.images import Split
from dist_train.outcome import UsageError
from dist_train.reproducible import generator
from dist_train.rundir.atomic import exclusive, replacing

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


_HEADER = 512
_LONGEST_LABEL = 32


@dataclass(frozen=True)
class _Member:
    """A file in a shard: which sample's, which part of it, and where."""

    sample: str
    suffix: str
    offset: int
    length: int


def list_shards(settings: DataSettings, split: Split, seed: int) -> PackedListing:
    """Return the images of a split of WebDataset's shards in `data.root`.

    Raises:
        UsageError: shards are missing or damaged, an index is not of its shard, or a sample has no image or label.
    """
    files = []
    for shard in find_shards(settings, split):
        try:
            files.append(PackedFile(shard, shard, _index(shard, settings)))
        except OSError as error:
            raise UsageError(f"cannot read {shard}: {error.strerror or error}", code="data-unreadable") from error
    return packed_listing(files, settings.image_format.classes, split, seed)


def find_shards(settings: DataSettings, split: Split) -> list[Path]:
    """Return the shards of a split. Raises UsageError where there are none."""
    return split_files(settings.folder, split, (".tar",))


def _index(shard: Path, settings: DataSettings) -> Index:
    beside = shard.with_suffix(".idx")
    own = beside if beside.exists() else None
    stamp = f"{own.stat().st_size} {own.stat().st_mtime_ns}" if own else ""

    def make() -> Index:
        members = _members_of_index(own, shard) if own else _members_of_shard(shard)
        return _rows(shard, members, settings)

    columns = f"{settings.image_column} {settings.label_column} {stamp}"
    try:
        return cached_index("webdataset", shard, columns, lambda content: make(), content=shard)[1]
    except OSError as error:
        _LOGGER.warning("the index of %s cannot be kept (%s): set DIST_TRAIN_CACHE to a folder of yours", shard, error)
        return make()


def _rows(shard: Path, members: Iterable[_Member], settings: DataSettings) -> Index:
    wanted = (settings.image_column,) if settings.image_column else tuple(each[1:] for each in SUFFIXES)
    label = settings.label_column or "cls"
    rows = []
    with shard.open("rb") as file:
        for sample, parts in groupby(members, lambda member: member.sample):
            by_suffix = {member.suffix: member for member in parts}
            image = next((by_suffix[suffix] for suffix in wanted if suffix in by_suffix), None)
            if image is None or label not in by_suffix:
                what, setting = ("label", f"label_column={label}") if image else ("image", "image_column")
                raise UsageError(
                    f"sample {sample} of {shard} has no {what}: it has .{', .'.join(by_suffix)}; set data.{setting}",
                    code="column-missing",
                )
            at = by_suffix[label]
            text = os.pread(file.fileno(), min(at.length, _LONGEST_LABEL), at.offset)
            try:
                rows.append((image.offset, image.length, int(text)))
            except ValueError:
                raise UsageError(
                    f"the label of sample {sample} of {shard} is {text.decode(errors='replace')!r}, not a whole number",
                    code="data-labels",
                ) from None
    return np.array(rows, np.int64).reshape(-1, 3)


def _members_of_shard(shard: Path) -> Iterator[_Member]:
    try:
        with tarfile.open(shard, "r:") as archive:
            for each in archive:
                if each.isfile():
                    yield _Member(*_parted(each.name), each.offset_data, each.size)
    except tarfile.TarError as error:
        raise UsageError(
            f"{shard} is damaged, or compressed: images are read from the middle of a plain tar file ({error})",
            code="data-format",
        ) from error


def _members_of_index(index: Path, shard: Path) -> Iterator[_Member]:
    """Yield what `index` lists: a line "v1.2 SAMPLES", then for each sample a line of suffix, offset, length, name."""
    mistake = UsageError(
        f"{index} is not an index of {shard}: remove it, or make it anew with wds2idx", code="data-index"
    )
    try:
        head, *lines = index.read_text(encoding="utf-8").splitlines()
        version, samples = head.split()
        words = [line.split() for line in lines if line.strip()]
        wide = {"v1.1": 3, "v1.2": 4}[version]
        members = [
            _Member(
                _parted(parts[at + 3])[0] if wide == 4 else str(number),
                parts[at],
                int(parts[at + 1]),
                int(parts[at + 2]),
            )
            for number, parts in enumerate(words)
            for at in range(0, len(parts), wide)
        ]
    except (ValueError, KeyError, IndexError) as error:
        raise mistake from error
    if len(words) != int(samples) or not members:
        raise mistake
    with shard.open("rb") as file:
        for member in (members[0], members[len(members) // 2], members[-1]):
            if not _is_there(os.pread(file.fileno(), _HEADER, member.offset - _HEADER), member):
                raise mistake
    yield from members


def _is_there(header: bytes, member: _Member) -> bool:
    """Whether a member's header in the shard says what the index says."""
    try:
        found = tarfile.TarInfo.frombuf(header, tarfile.ENCODING, "surrogateescape")
    except tarfile.TarError:
        return False
    return found.size == member.length and _parted(found.name)[1] == member.suffix


def _parted(name: str) -> tuple[str, str]:
    """Return a member's sample and suffix, as WebDataset has it: cut at the first dot of its base name."""
    folder, slash, base = name.rpartition("/")
    stem, _, suffix = base.partition(".")
    return f"{folder}{slash}{stem}", suffix.lower()
