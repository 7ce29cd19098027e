"""Files of another user."""

from __future__ import annotations

import os
from pathlib import Path


def give_away(path: Path) -> bool:
    """Give `path` to another user; return False where even root may not, as in a user namespace."""
    try:
        os.chown(path, 12_345, -1)
    except OSError:
        return False
    return True
