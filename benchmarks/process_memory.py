"""Memory of a process as Linux counts it, and a process of the bare loop, which loads PyTorch and nothing of ours.

`python -m benchmarks.process_memory FOLDER WIDTH UPDATES` trains on the images in FOLDER and tells its memory.
"""

from __future__ import annotations

import sys
from dataclasses import astuple, dataclass
from pathlib import Path

import numpy
import torch

from benchmarks.bare_loop import bare_loop
from benchmarks.launching import tell

MICRO_SIZE = 128
_KIB = 1024
_SIDE, _IMAGES_HEAD, _LABELS_HEAD = 28, 16, 8


@dataclass(frozen=True)
class Memory:
    """Bytes of one process."""

    proportional: int
    """Proportional set size: its own pages, and its share of those that it has in common with others."""
    private: int
    """The part of it that comes from no file: heap and stacks."""
    peak: int
    """The largest resident set that it ever had, shared pages counted in full."""


def memory_in(rollup: str, status: str) -> Memory:
    """Return what the texts of /proc/PID/smaps_rollup and /proc/PID/status say."""
    return Memory(_bytes_of("Pss", rollup), _bytes_of("Pss_Anon", rollup), _bytes_of("VmHWM", status))


def _bytes_of(name: str, text: str) -> int:
    [line] = [line for line in text.splitlines() if line.startswith(f"{name}:")]
    return int(line.split()[1]) * _KIB


def own_memory() -> Memory:
    """Return that of this process."""
    process = Path("/proc/self")
    return memory_in((process / "smaps_rollup").read_text(), (process / "status").read_text())


def _bare(folder: Path, width: float, updates: int) -> None:
    """Train by the bare loop on mapped images, as a rank maps them, and tell the memory."""
    torch.set_num_threads(1)
    pixels = numpy.memmap(folder / "train-images-idx3-ubyte", numpy.uint8, "c", _IMAGES_HEAD)
    labels = numpy.fromfile(folder / "train-labels-idx1-ubyte", numpy.uint8, offset=_LABELS_HEAD)
    update = bare_loop(
        torch.from_numpy(pixels).view(-1, 1, _SIDE, _SIDE),
        torch.from_numpy(labels).long(),
        width=width,
        batch=MICRO_SIZE,
        channels_last=True,
        precision=torch.float32,
    )
    for _ in range(updates):
        update()
    tell([astuple(own_memory())])


if __name__ == "__main__":
    _bare(Path(sys.argv[1]), float(sys.argv[2]), int(sys.argv[3]))
