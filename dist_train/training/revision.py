"""Which code a run is of."""

from __future__ import annotations

import os
import subprocess
from pathlib import Path

import dist_train

_PATIENCE_SECONDS = 5.0


def revision(root: Path = Path(dist_train.__file__).parents[1]) -> str:
    """Return dist_train's version, and the commit where `root`, which holds the package, is a git repository.

    Such as `0.1.0 (063e7bc-dirty)`: dirty where files differ from the commit. Without git the version alone.
    """
    commit = _commit(root) if (root / ".git").exists() else ""
    return f"{dist_train.__version__} ({commit})" if commit else dist_train.__version__


def _commit(root: Path) -> str:
    try:
        described = subprocess.run(
            ["git", "-C", str(root), "describe", "--always", "--dirty", "--exclude=*"],
            stdin=subprocess.DEVNULL,
            capture_output=True,
            text=True,
            check=True,
            timeout=_PATIENCE_SECONDS,
            # Looking must not write: others may share the repository.
            env={**os.environ, "GIT_OPTIONAL_LOCKS": "0"},
        )
    except (OSError, ValueError, subprocess.SubprocessError):
        return ""
    return described.stdout.strip()
