"""Rows of memory: a rank's peak, and the memory that a second rank adds to its node, as proportional set size.

In the proportional set size a page that several processes map is divided among them, so the sum over processes is the
memory that the node provides.

`mpirun -np 2 python -m benchmarks.memory FOLDER` trains on the images in FOLDER and prints each rank's memory.
"""

from __future__ import annotations

import sys
import tempfile
from collections.abc import Iterator
from dataclasses import astuple
from pathlib import Path

from benchmarks.idx_files import write_unpacked
from benchmarks.launching import measure, module, on_ranks
from benchmarks.process_memory import MICRO_SIZE, Memory, own_memory
from benchmarks.ranks import tell_measured
from benchmarks.subject import QUIET, open_trainer, settings
from benchmarks.timing import Ratio, ratio_of
from dist_train.cluster.communicator import Communicator, gather
from dist_train.config import Config

_IMAGES, _FEW_IMAGES = 200_000, 1_000
_WIDTH, _GLOBAL_SIZE = 1.0, 2 * MICRO_SIZE
_UPDATES = 5
"""Until both sides' heaps have stopped growing."""
_MB = 1e6
BAR = 1.1
"""A tenth for libraries, shared with other processes; another copy of the data would be a quarter."""
PEAK_BAR = 1.05


def rows(rounds: int) -> Iterator[Ratio]:
    """Yield the rows; a round takes about a minute."""
    with tempfile.TemporaryDirectory() as folder:
        many, few = Path(folder) / "many", Path(folder) / "few"
        for images, count in ((many, _IMAGES), (few, _FEW_IMAGES)):
            images.mkdir()
            write_unpacked(images, "train", count)
            write_unpacked(images, "test", _FEW_IMAGES)
        peaks, added, shares = [], [], []
        for _ in range(rounds):
            [one], two, small = _trained(many, 1), _trained(many, 2), _trained(few, 2)
            # As many samples, and so as many pages of mapped images.
            passes = _UPDATES * _GLOBAL_SIZE // MICRO_SIZE
            [bare] = _memories(module("benchmarks.process_memory", many, _WIDTH, passes), many)
            extra = sum(rank.proportional for rank in two) - one.proportional
            peaks.append((one.peak / _MB, bare.peak / _MB))
            added.append((extra / _MB, small[1].private / _MB))
            shares.append((extra / _MB, one.proportional / _MB))
    title = f"width {_WIDTH:g}, micro-batch {MICRO_SIZE}, {_IMAGES:,} images"
    second = f"memory a second rank adds, {title}"
    yield ratio_of(f"memory, peak of a rank, {title}", "dist-train", "bare PyTorch loop", peaks, PEAK_BAR, unit="MB")
    yield ratio_of(second, "2 ranks less 1", "its model, optimizer, activations", added, BAR, unit="MB")
    yield ratio_of(second, "2 ranks less 1", "1 rank", shares, None, unit="MB")


def _trained(images: Path, ranks: int) -> list[Memory]:
    return _memories(on_ranks("mpi", ranks, module("benchmarks.memory", images)), images)


def _memories(command: list[str], images: Path) -> list[Memory]:
    measured = measure(command, {"DIST_TRAIN_CACHE": str(images / "cache")})
    return [Memory(*numbers) for numbers in measured]


def _settings(images: Path) -> Config:
    data = {"name": "fashion-mnist", "root": str(images)}
    batch = {"global_size": _GLOBAL_SIZE, "micro_size": MICRO_SIZE}
    return settings(_WIDTH, _GLOBAL_SIZE, **{**QUIET, "data": data, "batch": batch})


def _memory_of_ranks(comm: Communicator, images: Path) -> object:
    """Train as one of the ranks, and return the memory of all."""
    with tempfile.TemporaryDirectory() as folder:
        trainer = open_trainer(_settings(images), comm, Path(folder) / "run")
        for _ in range(_UPDATES):
            trainer.advance()
        comm.barrier()
        memories = gather(comm, astuple(own_memory()), "memory")
        trainer.close()
    return memories


if __name__ == "__main__":
    tell_measured(lambda comm: _memory_of_ranks(comm, Path(sys.argv[1])))
