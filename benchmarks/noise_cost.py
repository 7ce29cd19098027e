"""Rows of noise on against noise off, for every kind of sharing and every scale."""

from __future__ import annotations

import tempfile
from collections.abc import Iterator
from pathlib import Path

from benchmarks.subject import QUIET, open_trainer, settings
from benchmarks.timing import Ratio, compare
from dist_train.cluster.communicator import SingleProcess

SHARINGS = ("global", "micro_batch")
SCALES = ("absolute", "weight", "filter")
BAR = 1.03


def sharing_rows(pairs: int) -> Iterator[Ratio]:
    """Yield a row for each kind of sharing, with absolute noise."""
    for sharing in SHARINGS:
        yield _row(f"sharing {sharing}", pairs, sharing=sharing)


def scale_rows(pairs: int) -> Iterator[Ratio]:
    """Yield a row for each scale, with one draw for all ranks."""
    for scale in SCALES:
        yield _row(f"scale {scale}", pairs, scale=scale)


def _row(words: str, pairs: int, **noise: str) -> Ratio:
    """Return the step time with SmoothOut and the settings `noise` over that without, VGG9 width 1, batch 128."""
    smoothout = {"method": "smoothout", "amplitude": 1e-4, **noise}
    with tempfile.TemporaryDirectory() as folder:
        noisy = open_trainer(settings(1.0, 128, noise=smoothout, **QUIET), SingleProcess(), Path(folder) / "noisy")
        plain = open_trainer(settings(1.0, 128, **QUIET), SingleProcess(), Path(folder) / "plain")
        return compare(
            f"noise on/off, width 1, batch 128, {words}",
            ("SmoothOut", noisy.advance),
            ("no noise", plain.advance),
            pairs=pairs,
            bar=BAR,
            images=128,
        )
