"""WebDataset's shards: tar files in which members of one name are one sample, as 000017.jpg and 000017.cls.

An index says where the members lie: the file SHARD.idx beside the shard, as NVIDIA DALI's wds2idx writes it, else one
made by reading the shard's headers once.
"""

from __future__ import annotations

import logging
import os
import tarfile
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from itertools import groupby
from pathlib import Path

import numpy as np

from dist_train.config import DataSettings
from dist_train.data.image_folder import SUFFIXES
from dist_train.data.images import Split
from dist_train.data.packed import Index, PackedFile, PackedListing, cached_index, packed_listing, split_files
from dist_train.outcome import UsageError

_LOGGER = logging.getLogger("dist_train.data")
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
    assert settings.root is not None
    assert settings.classes is not None
    files = []
    for shard in find_shards(settings, split):
        try:
            files.append(PackedFile(shard, shard, _index(shard, settings)))
        except OSError as error:
            raise UsageError(f"cannot read {shard}: {error.strerror or error}", code="data-unreadable") from error
    return packed_listing(files, settings.classes, split, seed)


def find_shards(settings: DataSettings, split: Split) -> list[Path]:
    """Return the shards of a split. Raises UsageError where there are none."""
    assert settings.root is not None
    return split_files(settings.root, split, (".tar",))


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
