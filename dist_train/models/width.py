"""`model.width`: the factor on the number of channels."""

from __future__ import annotations


def scaled(channels: int, width: float) -> int:
    """Return `channels` times `width`, rounded; at least one."""
    return max(1, round(channels * width))
