"""The cache of data sets: downloaded archives, and decoded images, which all local ranks map (one copy in memory).

An entry of decoded images is two NumPy files and a JSON record with their digests. The record is written last; without
it there is no entry. Every file is written under a temporary name and renamed, by one process at a time.
"""

from __future__ import annotations

import hashlib
import http.client
import json
import logging
import os
import urllib.error
import urllib.request
from collections.abc import Callable, Iterator, Sequence
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any, BinaryIO

import numpy as np
import torch
from numpy.typing import NDArray

from dist_train.data.images import ImageSet, Split
from dist_train.outcome import UsageError, reading, writing
from dist_train.rundir.atomic import exclusive, replacing, write_text
from dist_train.rundir.paths import refuse_foreign

_LOGGER = logging.getLogger("dist_train.data")
_TIMEOUT_SECONDS = 30
_CHUNK = 1 << 20


@dataclass(frozen=True)
class Source:
    """The source of a cache entry; another reader version or other bytes make another entry."""

    name: str
    split: Split
    reader_version: int
    files: Sequence[Path]

    def key(self) -> str:
        """Return the entry's file stem; reads every source file. Raises UsageError if one cannot be read."""
        digest = hashlib.sha256()
        for path in self.files:
            with reading(path):
                digest.update(f"{path.stat().st_size}:{_file_digest(path)}\n".encode())
        return f"{self.name}-{self.split}-v{self.reader_version}-{digest.hexdigest()[:16]}"


@dataclass(frozen=True)
class _Record:
    classes: int
    images_sha256: str
    labels_sha256: str
    check: str = ""  # digest of the other fields

    def with_check(self) -> _Record:
        text = f"{self.classes} {self.images_sha256} {self.labels_sha256}"
        return replace(self, check=hashlib.sha256(text.encode()).hexdigest())


def refuse_foreign_cache(folder: Path) -> None:
    """Raise UsageError if others can write to `folder` of the cache or to the cache itself; see `refuse_foreign`."""
    for each in (folder.parent, folder):
        refuse_foreign(each, "set DIST_TRAIN_CACHE to a folder of your own")


class DamagedError(Exception):
    """A file of the cache is not what was written."""


def decoded_once(folder: Path, source: Source, decode: Callable[[], ImageSet]) -> ImageSet:
    """Return the decoded `source`, mapped from its verified entry in `folder`, which is filled by `decode` if missing.

    A damaged entry is replaced, with a warning. If the folder cannot be used (no permission, disk full, no locks), a
    warning is logged and the images are decoded into memory.

    Raises UsageError if other users could replace the contents of the folder.
    """
    key = source.key()
    decoded = None
    try:
        folder.mkdir(parents=True, exist_ok=True)
        refuse_foreign_cache(folder)
        with exclusive(folder / f"{key}.lock"):
            if _files(folder, key)[0].exists():
                try:
                    return _open(folder, key)
                except DamagedError as error:
                    _LOGGER.warning("the cached data set %s is damaged (%s): decoding it again", folder / key, error)
            decoded = decode()
            _write(folder, key, decoded)
            return _open(folder, key)
    except (OSError, DamagedError) as error:
        _LOGGER.warning(
            "the cache folder %s cannot be used (%s): decoding %s into this process's own memory. "
            "Free space there, or set DIST_TRAIN_CACHE to a folder that can be written.",
            folder,
            error,
            source.name,
        )
    return replace(decode() if decoded is None else decoded, identity=key)


def _open(folder: Path, key: str) -> ImageSet:
    record_file, images_file, labels_file = _files(folder, key)
    try:
        record = _Record(**json.loads(record_file.read_bytes()))
    except (ValueError, TypeError, RecursionError) as error:
        raise DamagedError(f"{record_file.name} is not the record that was written: {error}") from error
    if record != record.with_check():
        raise DamagedError(f"{record_file.name} is not the record that was written")
    images = map_array(images_file, record.images_sha256)
    labels = map_array(labels_file, record.labels_sha256)
    has_form = images.dtype == np.uint8 and images.ndim == 4 and labels.dtype == np.int64
    if not has_form or labels.shape != images.shape[:1] or not np.all((labels >= 0) & (labels < record.classes)):
        raise DamagedError("its files do not hold images and their labels")
    return ImageSet(torch.from_numpy(images), torch.from_numpy(labels), record.classes, key)


def map_array(path: Path, sha256: str) -> NDArray[Any]:
    """Map the array in `path`, which must have this digest. Raises DamagedError, or OSError if it cannot be read.

    It is mapped copy-on-write: pages are shared with other ranks, and torch accepts the array as writable.
    """
    try:
        digest = _file_digest(path)
    except FileNotFoundError as error:
        raise DamagedError(f"{path.name} is missing") from error
    if digest != sha256:
        raise DamagedError(f"the SHA-256 of {path.name} is {digest[:12]}..., not {sha256[:12]}...")
    try:
        return np.load(path, mmap_mode="c", allow_pickle=False)  # type: ignore[no-any-return]
    except Exception as error:
        # Bytes that NumPy did not write raise errors of nearly any type.
        raise DamagedError(f"{path.name} is not an array: {error}") from error


def _write(folder: Path, key: str, decoded: ImageSet) -> None:
    for abandoned in folder.glob(f".{key}.*.part"):
        # Only the holder of the lock writes here: a process that was killed has left these.
        abandoned.unlink(missing_ok=True)
    record_file, images_file, labels_file = _files(folder, key)
    labels_sha256 = write_array(labels_file, decoded.labels.numpy())
    images_sha256 = write_array(images_file, decoded.images.numpy())
    record = _Record(decoded.classes, images_sha256, labels_sha256).with_check()
    write_text(record_file, json.dumps(asdict(record)))


def write_array(path: Path, array: NDArray[Any]) -> str:
    """Write `array` to `path`, whole or not at all, and return the SHA-256 of the file. Raises OSError."""
    with replacing(path) as file:
        hashing = _HashingFile(file)
        np.lib.format.write_array(hashing, array, allow_pickle=False)
    return hashing.digest.hexdigest()


class _HashingFile:
    """Writes to a file, and computes the digest of what it was given to write."""

    def __init__(self, file: BinaryIO) -> None:
        self._file = file
        self.digest = hashlib.sha256()

    def write(self, content: bytes) -> int:
        self.digest.update(content)
        return self._file.write(content)


def _file_digest(path: Path) -> str:
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def _files(folder: Path, key: str) -> tuple[Path, Path, Path]:
    """Return an entry's record, images and labels."""
    return folder / f"{key}.json", folder / f"{key}.images.npy", folder / f"{key}.labels.npy"


def cache_folder() -> Path:
    """Return `$DIST_TRAIN_CACHE`, else `dist_train` in `$XDG_CACHE_HOME`, else `~/.cache/dist_train`."""
    own = os.environ.get("DIST_TRAIN_CACHE")
    if own:
        return Path(own).expanduser()
    of_user = os.environ.get("XDG_CACHE_HOME")
    return (Path(of_user) if of_user else Path("~/.cache").expanduser()) / "dist_train"


def data_sets_folder() -> Path:
    """Return the folder in the cache where the set-up scripts and downloads put data sets. Raises UsageError."""
    folder = cache_folder() / "datasets"
    if folder.is_dir():
        refuse_foreign_cache(folder)
    return folder


def decoded_folder() -> Path:
    """Return the folder in the cache with decoded data sets."""
    return cache_folder() / "decoded"


def fetch(url: str, path: Path, sha256: str) -> None:
    """Download `url` to `path` unless the file exists; of several processes one downloads, the others wait.

    Raises UsageError if there is no network, the bytes do not have the digest `sha256`, or the folder cannot be
    written; `path` is then unchanged.
    """
    fix = "set data.root to a writable folder with space for the archive"
    with writing(path, fix, code="download-unwritable"):
        path.parent.mkdir(parents=True, exist_ok=True)
        with exclusive(path.parent / f".{path.name}.lock"):
            if path.exists():
                return
            _LOGGER.info("downloading %s to %s", url, path)
            with replacing(path) as file:
                written = _HashingFile(file)
                for chunk in _chunks(url, path):
                    written.write(chunk)
                found = written.digest.hexdigest()
                if found != sha256:
                    raise UsageError(
                        f"{url} returned {file.tell()} bytes with SHA-256 {found}, but the published one is {sha256}: "
                        f"the download was dropped. Try again, or put {path.name} from a source that you trust into "
                        f"{path.parent}.",
                        code="download-digest",
                    )


def _chunks(url: str, path: Path) -> Iterator[bytes]:
    try:
        # URLs are constants of this program
        with urllib.request.urlopen(url, timeout=_TIMEOUT_SECONDS) as response:  # nosec B310
            while chunk := response.read(_CHUNK):
                yield chunk
    except (OSError, http.client.HTTPException) as error:
        if isinstance(error, urllib.error.HTTPError):
            error.close()  # closes the connection
        raise UsageError(
            f"cannot download {url}: {error}. Without network access, download {path.name} elsewhere and put it into "
            f"{path.parent}.",
            code="download-failed",
        ) from error
