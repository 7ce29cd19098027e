"""Where data lies on this machine, and how a published archive is fetched."""

from __future__ import annotations

import hashlib
import http.client
import logging
import os
import urllib.error
import urllib.request
from collections.abc import Iterator
from pathlib import Path

from dist_train.data.cache import exclusive, refuse_foreign_cache
from dist_train.outcome import UsageError
from dist_train.rundir.atomic import replacing


def cache_folder() -> Path:
    """Return `$DIST_TRAIN_CACHE`, else `dist_train` in `$XDG_CACHE_HOME`, else `~/.cache/dist_train`."""
    named = os.environ.get("DIST_TRAIN_CACHE")
    if named:
        return Path(named).expanduser()
    shared = os.environ.get("XDG_CACHE_HOME")
    return (Path(shared) if shared else Path("~/.cache").expanduser()) / "dist_train"


def data_sets_folder() -> Path:
    """Return the folder in the cache where the set-up scripts and downloads put data sets.

    Raises UsageError where another user could exchange what is in it.
    """
    folder = cache_folder() / "datasets"
    if folder.is_dir():
        refuse_foreign_cache(folder)
    return folder


def decoded_folder() -> Path:
    """Return the folder in the cache that holds decoded data sets."""
    return cache_folder() / "decoded"


_LOGGER = logging.getLogger("dist_train.data")
_TIMEOUT_SECONDS = 30
_CHUNK = 1 << 20


def fetch(url: str, path: Path, sha256: str) -> None:
    """Download `url` to `path` unless it is there; of several processes one does, the others wait.

    Raises UsageError when there is no network, when the bytes do not have the digest `sha256`, or when
    the folder cannot be written; `path` is then as it was.
    """
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        with exclusive(path.parent / f".{path.name}.lock"):
            if not path.exists():
                _LOGGER.info("downloading %s to %s", url, path)
                _fetch(url, path, sha256)
    except OSError as error:
        raise UsageError(
            f"cannot write {path}: {error.strerror or error}. Set data.root to a folder that can be written, "
            "with space for the archive.",
            code="download-unwritable",
        ) from error


def _fetch(url: str, path: Path, sha256: str) -> None:
    digest = hashlib.sha256()
    with replacing(path) as file:
        for chunk in _chunks(url, path):
            digest.update(chunk)
            file.write(chunk)
        if digest.hexdigest() != sha256:
            raise UsageError(
                f"{url} gave {file.tell()} bytes with SHA-256 {digest.hexdigest()}, but {sha256} was "
                f"published: nothing was kept. Try again, or put {path.name} from a source that you trust "
                f"into {path.parent}.",
                code="download-digest",
            )


def _chunks(url: str, path: Path) -> Iterator[bytes]:
    try:
        # the addresses are the program's own
        with urllib.request.urlopen(url, timeout=_TIMEOUT_SECONDS) as response:  # nosec B310
            while chunk := response.read(_CHUNK):
                yield chunk
    except (OSError, http.client.HTTPException) as error:
        if isinstance(error, urllib.error.HTTPError):
            error.close()  # it holds the connection
        raise UsageError(
            f"cannot download {url}: {error}. On a machine without network access, fetch {path.name} "
            f"elsewhere and put it into {path.parent}.",
            code="download-failed",
        ) from error
