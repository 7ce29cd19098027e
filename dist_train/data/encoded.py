"""Encoded images: in folders, a subfolder for each class, or packed in a few large files, such as WebDataset shards.

The index of a packed file, int64 [samples, 3] of offset, length and label, is made at its first use and kept in the
cache. In a WebDataset shard, a tar file, members with the same name form a sample (000017.jpg and 000017.cls). A shard
may have an index file beside it: SHARD.idx, as written by NVIDIA DALI's wds2idx.
"""

from __future__ import annotations

import hashlib
import logging
import os
import re
import secrets
import tarfile
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass
from functools import cache
from itertools import groupby
from pathlib import Path
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray

from dist_train.config import DataSettings
from dist_train.data.cache import cache_folder, cached_arrays
from dist_train.data.decoding import Part
from dist_train.data.images import Listing, Split, check_labels, digest_of
from dist_train.outcome import UsageError, reading
from dist_train.reproducible import generator

_LOGGER = logging.getLogger("dist_train.data")
_VERSION = 2
_CHUNK = 1 << 20

_SUFFIXES = (".jpg", ".jpeg", ".png", ".ppm", ".bmp", ".pgm", ".tif", ".tiff", ".webp")

SPLIT_NAMES: dict[Split, tuple[str, ...]] = {"train": ("train",), "test": ("val", "validation", "test")}
"""The names that a split's folder or files may have; the first that exists is used."""

_FOLDERS: dict[Split, tuple[str, ...]] = {"train": ("train",), "test": ("val", "test")}
_LAYOUT = "an image folder holds train/CLASS/*.jpg and val/CLASS/*.jpg (or test/...)"


def list_folder(settings: DataSettings, split: Split, seed: int = 0) -> Listing:
    """Return the images of a split of an image folder, shuffled by the seed: any prefix has images of all classes.

    Classes are numbered by their sorted names. Nothing depends on the order in which the file system lists files.
    Raises UsageError if a folder is missing, a class is empty, the number of classes is not that of the settings, or
    those of test are not those of train.
    """
    folder, classes = _folder(settings.folder, split), settings.image_format.classes
    class_names = _classes(folder)
    if split == "test":
        train = _folder(settings.folder, "train")
        if differing := sorted(set(_classes(train)) ^ set(class_names)):
            raise UsageError(
                f"{train} and {folder} hold different classes: only one of them has {differing[0]}",
                code="classes-differ",
            )
    joined, lengths = bytearray(), []  # paths, each with a NUL: millions of strings would take twice the memory
    with reading(folder, code="image-folder-unreadable"):
        for name in class_names:
            paths = [os.fsencode(os.path.join(name, image)) + b"\0" for image in _images_in(folder / name)]
            joined += b"".join(paths)
            lengths.append(np.array(list(map(len, paths)), np.int64))
    if len(class_names) != classes:
        fix = f"set data.classes to {len(class_names)}" if len(class_names) > 1 else _LAYOUT
        raise UsageError(
            f"{folder} holds {len(class_names)} class folders, but data.classes is {classes}: {fix}", code="class-count"
        )
    for name, images in zip(class_names, lengths, strict=True):
        if not len(images):
            raise UsageError(
                f"the class folder {folder / name} holds no image ({', '.join(_SUFFIXES)}): "
                "fill it, or remove the class from both splits and lower data.classes",
                code="class-empty",
            )
    counts = torch.tensor([len(images) for images in lengths])
    ends, labels = np.cumsum(np.concatenate(lengths)), torch.arange(classes).repeat_interleave(counts)

    def refer(number: int) -> str:
        start = ends[number - 1] if number else 0
        return os.path.join(folder, os.fsdecode(bytes(joined[start : ends[number] - 1])))

    source = digest_of(memoryview(joined)[:-1])
    return _shuffled(Listing(refer, torch.arange(len(labels)), labels, source, tuple(class_names)), split, seed)


def _shuffled(listing: Listing, split: Split, seed: int) -> Listing:
    return listing.select(torch.randperm(len(listing), generator=generator(seed, "image folder", split)))


def _folder(root: Path, split: Split) -> Path:
    candidates = [root / name for name in _FOLDERS[split]]
    folder = next((each for each in candidates if each.is_dir()), None)
    if folder is None:
        raise UsageError(
            f"there is no folder {' or '.join(map(str, candidates))}: {_LAYOUT}; set data.root to it",
            code="image-folder-missing",
        )
    return folder


def _classes(folder: Path) -> list[str]:
    with reading(folder, code="image-folder-unreadable"), os.scandir(folder) as entries:
        return sorted(entry.name for entry in entries if _is_visible(entry) and entry.is_dir())


def _images_in(folder: Path) -> list[str]:
    """Return the images in `folder` and the folders below it, as sorted paths relative to it."""
    with os.scandir(folder) as entries:
        visible = [entry for entry in entries if _is_visible(entry)]
    images, below = [], []
    for entry in visible:
        is_image = entry.name.lower().endswith(_SUFFIXES)
        # Links to images are not followed: to look at each takes long on a file system of the network.
        if entry.is_dir(follow_symlinks=not is_image):
            below.append(entry.name)
        elif is_image:
            images.append(entry.name)
    images.extend(os.path.join(name, image) for name in below for image in _images_in(folder / name))
    return sorted(images)


def _is_visible(entry: os.DirEntry[str]) -> bool:
    return not entry.name.startswith(".")


Index = NDArray[np.int64]  # offset, length and label of each sample in a file, int64 [samples, 3]
FileFinder = Callable[[DataSettings, Split], list[Path]]
FileIndexer = Callable[[Path, DataSettings], tuple[Path, Index]]


def packed_listing(settings: DataSettings, split: Split, seed: int, find: FileFinder, index_of: FileIndexer) -> Listing:
    """Return the images of a split of packed files, shuffled by the seed. Raises UsageError.

    `find` returns the split's files; `index_of` one of these, or a copy of its images in the cache, and the index.
    """
    classes, origins, files, parts, labels = settings.image_format.classes, find(settings, split), [], [], []
    indexed: dict[Path, tuple[Path, Index]] = {}
    start = secrets.randbelow(max(1, len(origins)))  # each rank at another, so that they make indexes side by side
    for origin in (*origins[start:], *origins[:start]):
        with reading(origin):
            indexed[origin] = index_of(origin, settings)
    for number, origin in enumerate(origins):
        file, index = indexed[origin]
        files.append(str(file))
        rows = np.arange(len(index))
        parts.append(np.stack([np.full_like(rows, number), *index.T[:2], rows], axis=1))
        labels.append(torch.from_numpy(index[:, 2]))
        check_labels(labels[-1], classes, str(origin))
    places, all_labels = np.concatenate(parts), torch.cat(labels)
    source = digest_of("\0".join(each.name for each in origins), torch.from_numpy(places), all_labels)

    def refer(number: int) -> Part:
        file, offset, length, row = places[number].tolist()
        return files[file], offset, length, f"{origins[file]}, sample {row}"

    return _shuffled(Listing(refer, torch.arange(len(places)), all_labels, source), split, seed)


def split_files(root: Path, split: Split, suffix: str) -> list[Path]:
    """Return a split's files, sorted: those in a folder of its name, else with it in their names. Raises UsageError."""
    with reading(root, code="image-folder-unreadable"):
        files = _files_of(root, split, suffix)
        in_both = set(files).intersection(_files_of(root, "train" if split == "test" else "test", suffix))
    if in_both:
        raise UsageError(
            f"{min(in_both)} is named as both train and test data: put the files into folders train/ and val/",
            code="data-format",
        )
    if files:
        return files
    name = SPLIT_NAMES[split][0]
    raise UsageError(
        f"{root} holds no {split} data: {name}/*{suffix} or {name}-*{suffix} "
        f"(for test: {', '.join(SPLIT_NAMES['test'])}); set data.root",
        code="data-missing",
    )


def _files_of(root: Path, split: Split, suffix: str) -> list[Path]:
    for name in SPLIT_NAMES[split]:
        if (root / name).is_dir():
            paths = [path for path in (root / name).iterdir() if path.name.endswith(suffix)]
        else:
            part = re.compile(rf"(^|[-_.]){name}[-_.]")
            paths = [path for path in root.iterdir() if path.name.endswith(suffix) and part.search(path.name)]
        if visible := [path for path in paths if not path.name.startswith(".")]:
            return sorted(visible)
    return []


def cached_index(
    kind: str, source: Path, columns: str, make: Callable[[Path], Index], content: Path | None = None
) -> tuple[Path, Index]:
    """Return the file with the images of `source`, and its index, which `make` creates at the first use.

    The file is `content` or, if that is None, a file in the cache, which `make` writes. If the size or modification
    time of `source`, or `columns`, change, a new entry is made. Raises OSError if the cache cannot be used, or `source`
    cannot be read; UsageError if other users could replace the contents of the cache.
    """
    status = source.stat()
    text = f"{kind} {_VERSION} {source.resolve()} {status.st_size} {status.st_mtime_ns} {columns}"
    stem = cache_folder() / "packed" / hashlib.sha256(text.encode("utf-8", "surrogateescape")).hexdigest()[:32]
    place = content or stem.with_suffix(".bin")

    def make_index() -> tuple[Index]:
        _LOGGER.info("reading %s once to index its images", source)
        return (make(place),)

    def is_sound(index: NDArray[Any]) -> bool:
        if index.dtype != np.int64 or index.ndim != 2 or index.shape[1] != 3:
            return False
        return not len(index) or (place.exists() and place.stat().st_size >= (index[:, 0] + index[:, 1]).max())

    # A copy: a mapped array keeps its file open, and there may be more shards than a process may open files.
    return place, np.array(cached_arrays(stem, ("index",), make_index, is_sound)[0])


_HEADER = 512
_LONGEST_LABEL = 32
_CHECKS = 2  # raised when a shard is checked for more, so that an index made without these checks is made again


@dataclass(frozen=True)
class _Member:
    """A file in a shard: the name of its sample, its suffix, and its place."""

    sample: str
    suffix: str
    offset: int
    length: int


def shard_index(shard: Path, settings: DataSettings) -> tuple[Path, Index]:
    """Return `shard` and its index, from the cache if possible; it is made from SHARD.idx if that exists.

    Raises UsageError if the shard is damaged, SHARD.idx does not match it, or a sample has no image or label.
    """
    path = shard.with_suffix(".idx")
    index_file = path if path.exists() else None
    stamp = f"{index_file.stat().st_size} {index_file.stat().st_mtime_ns}" if index_file else ""

    def make() -> Index:
        members = _members_of_index(index_file, shard) if index_file else _members_of_shard(shard)
        return _rows(shard, members, settings)

    columns = f"{settings.image_column} {settings.label_column} {stamp} {_CHECKS}"
    try:
        return cached_index("webdataset", shard, columns, lambda content: make(), content=shard)
    except OSError as error:
        _warn_of_no_cache(cache_folder(), error.strerror or str(error))
        return shard, make()


@cache
def _warn_of_no_cache(folder: Path, reason: str) -> None:
    """Warn once, whatever the number of shards."""
    _LOGGER.warning(
        "indexes of shards cannot be kept in %s (%s): set DIST_TRAIN_CACHE to a folder of your own", folder, reason
    )


def _rows(shard: Path, members: Iterable[_Member], settings: DataSettings) -> Index:
    """Return the index of the samples that `members` form, with labels read from the shard."""
    images = (settings.image_column,) if settings.image_column else _SUFFIXES
    suffixes = [each.lower().removeprefix(".") for each in images]
    label = (settings.label_column or "cls").lower().removeprefix(".")
    rows = []
    with shard.open("rb") as file:
        for sample, parts in groupby(members, lambda member: member.sample):
            group = list(parts)
            by_suffix = {member.suffix: member for member in group}
            if len(by_suffix) < len(group):
                raise UsageError(
                    f"sample {sample} of {shard} has two members of one suffix (.{', .'.join(by_suffix)}): give each "
                    f"sample a name of its own",
                    code="data-format",
                )
            image = next((by_suffix[suffix] for suffix in suffixes if suffix in by_suffix), None)
            if image is None or label not in by_suffix:
                what, setting = (f"label .{label}", "label_column") if image else ("image", "image_column")
                raise UsageError(
                    f"sample {sample} of {shard} has no {what}: it has .{', .'.join(by_suffix)}; set data.{setting}, "
                    f"or let the members of each sample follow each other (tar --sort=name)",
                    code="column-missing",
                )
            place = by_suffix[label]
            text = os.pread(file.fileno(), min(place.length, _LONGEST_LABEL), place.offset)
            try:
                rows.append((image.offset, image.length, np.int64(int(text))))
            except (ValueError, OverflowError):
                raise UsageError(
                    f"the label of sample {sample} of {shard} is {text.decode(errors='replace')!r}, not an integer",
                    code="data-labels",
                ) from None
    return np.array(rows, np.int64).reshape(-1, 3)


def _members_of_shard(shard: Path, start: int = 0) -> Iterator[_Member]:
    """Yield the members from the header at the offset `start` on. Raises UsageError if the shard is damaged."""
    try:
        with shard.open("rb") as file:
            file.seek(start)
            with tarfile.open(fileobj=file, mode="r:") as archive:
                for each in archive:
                    base = each.name.rpartition("/")[2]
                    if base.startswith(".") or "." not in base:  # of a Mac, or a README: no part of a sample
                        continue
                    if each.islnk() or each.issym():
                        raise UsageError(
                            f"{each.name} in {shard} is a link: pack the files themselves, with "
                            f"tar --hard-dereference --dereference",
                            code="data-format",
                        )
                    if each.isfile():
                        yield _Member(*_sample_and_suffix(each.name), each.offset_data, each.size)
                _check_end(archive)
    except tarfile.TarError as error:
        raise UsageError(
            f"{shard} is damaged or compressed: shards must be uncompressed tar files ({error})", code="data-format"
        ) from error


def _check_end(archive: tarfile.TarFile) -> None:
    """Raise ReadError unless NULs alone follow the members read: tarfile stops silently at a header that is damaged."""
    assert archive.fileobj is not None
    archive.fileobj.seek(archive.offset)
    if not (block := archive.fileobj.read(_CHUNK)):
        raise tarfile.ReadError("it ends too early")
    while block:
        if block.strip(b"\0"):
            raise tarfile.ReadError("a header is damaged, or another archive follows")
        block = archive.fileobj.read(_CHUNK)


def _members_of_index(index: Path, shard: Path) -> Iterator[_Member]:
    """Yield what `index` lists: a line "v1.2 SAMPLES", then for each sample a line of suffix, offset, length, name."""
    not_an_index = UsageError(
        f"{index} is not an index of {shard}: remove it, or create it again with wds2idx", code="data-index"
    )
    try:
        head, *lines = index.read_text(encoding="utf-8").splitlines()
        version, samples = head.split()
        count, size = int(samples), shard.stat().st_size
        rows = [line.split() for line in lines if line.strip()]
        width = {"v1.1": 3, "v1.2": 4}[version]
        members = [
            _Member(
                _sample_and_suffix(row[first + 3])[0] if width == 4 else str(number),
                row[first].lower(),
                int(row[first + 1]),
                int(row[first + 2]),
            )
            for number, row in enumerate(rows)
            for first in range(0, len(row), width)
        ]
    except (ValueError, KeyError, IndexError) as error:
        raise not_an_index from error
    is_within = all(each.offset >= _HEADER and 0 <= each.length <= size - each.offset for each in members)
    if len(rows) != count or not members or not is_within:
        raise not_an_index
    with shard.open("rb") as file:
        for member in (members[0], members[len(members) // 2], members[-1]):
            if not _matches(os.pread(file.fileno(), _HEADER, member.offset - _HEADER), member):
                raise not_an_index
        # A shard to which members were appended has more than its index.
        end = -(-max(each.offset + each.length for each in members) // _HEADER) * _HEADER
        goes_on = os.pread(file.fileno(), _HEADER, end).strip(b"\0")
    if goes_on and any(True for _ in _members_of_shard(shard, end)):
        raise not_an_index
    yield from members


def _matches(header: bytes, member: _Member) -> bool:
    """Whether a member's tar header in the shard agrees with the index."""
    try:
        info = tarfile.TarInfo.frombuf(header, tarfile.ENCODING, "surrogateescape")
    except tarfile.TarError:
        return False
    return info.size == member.length and _sample_and_suffix(info.name)[1] == member.suffix


def _sample_and_suffix(name: str) -> tuple[str, str]:
    """Split a member's name into sample and suffix as WebDataset does: at the first dot of the base name."""
    folder, slash, base = name.rpartition("/")
    stem, _, suffix = base.partition(".")
    return f"{folder}{slash}{stem}", suffix.lower()
