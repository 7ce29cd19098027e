"""The cache of data sets: downloaded archives, and decoded images, which all local ranks map (one copy in memory).

An entry is NumPy files and a JSON record with their digests. The record is written last; without it there is no
entry. Every file is written under a temporary name and renamed, by one process at a time.
"""

from __future__ import annotations

import hashlib
import http.client
import json
import logging
import os
import tempfile
import urllib.error
import urllib.request
from collections.abc import Callable, Iterator, Sequence
from contextlib import suppress
from dataclasses import dataclass, replace
from functools import cache
from pathlib import Path
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray

from dist_train.data.images import ImageSet, Split
from dist_train.outcome import UsageError, reading, writing
from dist_train.rundir.atomic import exclusive, remove_partial_files, replacing, sha256_of, write_text
from dist_train.rundir.paths import refuse_foreign

_LOGGER = logging.getLogger("dist_train.data")
_TIMEOUT_SECONDS = 30
_CHUNK = 1 << 20
_IDLE_SECONDS = 3600
"""After which nobody writes to a partial file. Where locks hold within a node only (Lustre with localflock), another
node may be writing one."""


@dataclass(frozen=True)
class Source:
    """The source of a cache entry; another reader version or other bytes make another entry."""

    name: str
    split: Split
    reader_version: int
    files: Sequence[Path]
    classes: int

    def key(self) -> str:
        """Return the entry's file stem; reads every source file. Raises UsageError if one cannot be read."""
        digest = hashlib.sha256()
        for path in self.files:
            with reading(path):
                digest.update(f"{path.stat().st_size}:{sha256_of(path)}\n".encode())
        return f"{self.name}-{self.split}-v{self.reader_version}-{digest.hexdigest()[:16]}"


def refuse_foreign_cache(folder: Path) -> None:
    """Raise UsageError if others can write to `folder` of the cache or to the cache itself; see `refuse_foreign`."""
    for each in (folder.parent, folder):
        refuse_foreign(each, "set DIST_TRAIN_CACHE to a folder of your own")


class DamagedError(OSError):
    """A file of the cache is not what was written."""


def decoded_once(folder: Path, source: Source, decode: Callable[[], ImageSet]) -> ImageSet:
    """Return the decoded `source`, mapped from its verified entry in `folder`, which is filled by `decode` if missing.

    A damaged entry is replaced, with a warning. If the folder cannot be used (no permission, disk full, no locks), a
    warning is logged and the images are decoded into memory.

    Raises UsageError if other users could replace the contents of the folder.
    """
    key, decode = source.key(), cache(decode)

    def make() -> tuple[NDArray[Any], NDArray[Any]]:
        return decode().images.numpy(), decode().labels.numpy()

    def is_sound(images: NDArray[Any], labels: NDArray[Any]) -> bool:
        has_form = images.dtype == np.uint8 and images.ndim == 4 and labels.dtype == np.int64
        return has_form and labels.shape == images.shape[:1] and bool(np.all((labels >= 0) & (labels < source.classes)))

    try:
        images, labels = map(torch.from_numpy, cached_arrays(folder / key, ("images", "labels"), make, is_sound))
        return ImageSet(images, labels, source.classes, key, is_mapped=True)
    except OSError as error:
        _LOGGER.warning(
            f"the cache folder {folder} cannot be used ({error}): decoding {source.name} into this process's own "
            f"memory. Free space there, or set DIST_TRAIN_CACHE to a folder that can be written."
        )
    return replace(decode(), identity=key)


def cached_arrays(
    stem: Path,
    names: Sequence[str],
    make: Callable[[], Sequence[NDArray[Any]]],
    is_sound: Callable[..., bool],
) -> list[NDArray[Any]]:
    """Return the arrays `names` of the entry `stem`, mapped; `make` makes them if the entry is missing or damaged.

    An entry for whose arrays `is_sound` returns False is damaged, too. Raises OSError if the folder cannot be used;
    UsageError if other users could replace its contents.
    """
    record, *files = (stem.with_name(f"{stem.name}.{end}") for end in ("json", *(f"{name}.npy" for name in names)))

    def mapped() -> list[NDArray[Any]]:
        try:
            digests = [str(json.loads(record.read_bytes())[name]) for name in names]
        except (ValueError, TypeError, KeyError, RecursionError) as error:
            raise DamagedError(f"{record.name} is not the record that was written: {error}") from error
        arrays = list(map(_map_array, files, digests))
        if not is_sound(*arrays):
            raise DamagedError("its arrays are not those that were written")
        return arrays

    stem.parent.mkdir(parents=True, exist_ok=True)
    refuse_foreign_cache(stem.parent)
    while True:
        before, damage = _version(record), None
        if before is not None:
            try:
                return mapped()  # without the lock, which a read-only file system does not give
            except DamagedError as error:
                damage = error
        with exclusive(stem.with_name(f"{stem.name}.lock")):
            with suppress(OSError):
                os.utime(stem.parent)  # otherwise an NFS client may not show what another node has just made
            if _version(record) != before:
                continue  # made meanwhile: all ranks that waited for the lock verify it at once, not one by one
            if damage is not None:
                _LOGGER.warning("the entry %s of the cache is damaged (%s): making it again", stem, damage)
            remove_partial_files(stem.parent, "*", idle_seconds=_IDLE_SECONDS)  # of other entries, too
            digests = map(_write_array, files, make())
            write_text(record, json.dumps(dict(zip(names, digests, strict=True))))
            return mapped()


def _version(record: Path) -> tuple[int, int] | None:
    """Return what changes when the record is written anew; None without one."""
    try:
        state = record.stat()
    except FileNotFoundError:
        return None
    return state.st_ino, state.st_mtime_ns


def _map_array(path: Path, sha256: str) -> NDArray[Any]:
    """Map the array in `path`, which must have this digest. Raises DamagedError, or OSError if it cannot be read.

    It is mapped copy-on-write: pages are shared with other ranks, and torch accepts the array as writable.
    """
    try:
        file = path.open("rb")
    except FileNotFoundError as error:
        raise DamagedError(f"{path.name} is missing") from error
    with file:  # opened once: of a thousand shards every rank maps an index, on a file system that all share
        digest = hashlib.file_digest(file, "sha256").hexdigest()
        if digest != sha256:
            raise DamagedError(f"the SHA-256 of {path.name} is {digest[:12]}..., not {sha256[:12]}...")
        file.seek(0)
        try:
            if (version := np.lib.format.read_magic(file)) != (1, 0):
                raise ValueError(f"version {version}")
            shape, is_by_column, kind = np.lib.format.read_array_header_1_0(file)
            if kind.hasobject:
                raise ValueError("it holds Python objects")
            return np.memmap(file, kind, "c", file.tell(), shape, "F" if is_by_column else "C")
        except OSError:  # of this process, which may have no file or no memory left
            raise
        except Exception as error:
            # Bytes that NumPy did not write raise errors of nearly any type.
            raise DamagedError(f"{path.name} is not an array: {error}") from error


def _write_array(path: Path, array: NDArray[Any]) -> str:
    """Write `array` to `path`, whole or not at all, and return the SHA-256 of the file. Raises OSError."""
    with replacing(path) as file:
        np.lib.format.write_array(file, array, allow_pickle=False)
    return sha256_of(path)


def cache_folder() -> Path:
    """Return `$DIST_TRAIN_CACHE`, else `dist_train` in `$XDG_CACHE_HOME`, else `~/.cache/dist_train`.

    Without a home folder it is `dist_train-UID` in the folder for temporary files.
    """
    own = os.environ.get("DIST_TRAIN_CACHE")
    if own:
        return Path(own).expanduser()
    user_cache = os.environ.get("XDG_CACHE_HOME")
    try:
        return (Path(user_cache) if user_cache else Path("~/.cache").expanduser()) / "dist_train"
    except RuntimeError:  # neither HOME nor an entry of the user in passwd
        return Path(tempfile.gettempdir(), f"dist_train-{os.getuid()}")


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
        if path.exists():
            return  # without the lock, which a folder that cannot be written does not give
        path.parent.mkdir(parents=True, exist_ok=True)
        with exclusive(path.parent / f".{path.name}.lock"):
            if path.exists():
                return
            _LOGGER.info("downloading %s to %s", url, path)
            remove_partial_files(path.parent, "*", idle_seconds=_IDLE_SECONDS)
            with replacing(path, is_shared=True) as file:
                digest = hashlib.sha256()
                for chunk in _chunks(url, path):
                    digest.update(chunk)
                    file.write(chunk)
                if (found := digest.hexdigest()) != sha256:
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
