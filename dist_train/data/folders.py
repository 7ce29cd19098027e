"""Where data lies on this machine when the configuration names no folder."""

from __future__ import annotations

import os
from pathlib import Path


def cache_folder() -> Path:
    """Return `$DIST_TRAIN_CACHE`, else `dist_train` in `$XDG_CACHE_HOME`, else `~/.cache/dist_train`."""
    named = os.environ.get("DIST_TRAIN_CACHE")
    if named:
        return Path(named).expanduser()
    shared = os.environ.get("XDG_CACHE_HOME")
    return (Path(shared) if shared else Path("~/.cache").expanduser()) / "dist_train"


def data_sets_folder() -> Path:
    """Return the folder in the cache where the set-up scripts and downloads put data sets."""
    return cache_folder() / "datasets"


def decoded_folder() -> Path:
    """Return the folder in the cache that holds decoded data sets."""
    return cache_folder() / "decoded"
