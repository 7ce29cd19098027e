"""The bare loop with and without each of our allocator settings; each side runs in its own process.

`python -m benchmarks.allocator default|kept|large WIDTH` prints the seconds of one update.
"""

from __future__ import annotations

import subprocess
import sys

import torch

from benchmarks.bare_loop import bare_loop
from benchmarks.subject import settings
from benchmarks.timing import Ratio, ratio_of, timed
from dist_train.data.catalog import load_data
from dist_train.data.images import ImageSet
from dist_train.start_up import keep_freed_memory, use_large_pages

_UPDATES = {0.25: 40, 1.0: 6}
_WORDS = {"default": "glibc's default", "kept": "freed memory kept", "large": "kept, and pages of 2 MiB"}


def rows(pairs: int) -> list[Ratio]:
    """Return the ratios of the step times for both widths."""
    return [
        ratio_of(
            f"allocator, width {width:g}, batch 128, float32, bare loop",
            _WORDS[ours],
            _WORDS[theirs],
            [(seconds(ours, width), seconds(theirs, width)) for _ in range(pairs)],
            None,
        )
        for width in _UPDATES
        for ours, theirs in (("kept", "default"), ("large", "kept"))
    ]


def seconds(side: str, width: float) -> float:
    """Return the seconds of an update, measured in a new process."""
    command = [sys.executable, "-m", "benchmarks.allocator", side, str(width)]
    return float(subprocess.run(command, check=True, capture_output=True, text=True).stdout)


def main() -> None:
    """Print the seconds of an update."""
    side, width = sys.argv[1], float(sys.argv[2])
    torch.set_num_threads(1)
    if side != "default":
        assert keep_freed_memory()
    if side == "large":
        use_large_pages()
    data = load_data(settings(width, 128).data, "train", 0)
    assert isinstance(data, ImageSet)
    update = bare_loop(data.images, data.labels, width=width, batch=128, channels_last=False, precision=torch.float32)
    update()
    updates = _UPDATES[width]
    print(timed(lambda: [update() for _ in range(updates)]) / updates)


if __name__ == "__main__":
    main()
