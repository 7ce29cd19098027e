"""Rows of memory: a rank's peak, and the memory that a second rank adds to its node, as proportional set size.

In the proportional set size a page that several processes map is divided among them, so the sum over processes is the
memory that the node provides.

`mpirun -np 2 python -m benchmarks.memory rank FOLDER` and `python -m benchmarks.memory bare FOLDER` train on the
images in FOLDER and print each rank's memory.
"""

from __future__ import annotations

import sys
import tempfile
from collections.abc import Callable, Iterator, Mapping
from dataclasses import astuple, dataclass
from pathlib import Path
from types import MappingProxyType

import torch

from benchmarks.bare_loop import bare_loop
from benchmarks.idx_files import write_unpacked
from benchmarks.launching import measure, module, on_ranks, tell
from benchmarks.subject import QUIET, open_trainer, settings
from benchmarks.timing import Ratio, ratio_of
from dist_train.cluster.communicator import gather
from dist_train.cluster.joining import join_ranks
from dist_train.config import Config
from dist_train.data.catalog import load_images
from dist_train.start_up import ask_for_large_pages

_IMAGES, _FEW_IMAGES = 200_000, 1_000
_WIDTH, _MICRO_SIZE, _GLOBAL_SIZE = 1.0, 128, 256
_UPDATES = 3
_KIB, _MB = 1024, 1e6
BAR = 1.1
"""A tenth for libraries, shared with other processes; another copy of the data would be a quarter."""


@dataclass(frozen=True)
class Memory:
    """Bytes of one process."""

    proportional: int
    """Proportional set size: its own pages, and its share of pages shared with other processes."""
    private: int
    """The anonymous part of it: heap and stacks."""
    peak: int
    """The largest resident set size so far, with shared pages counted in full."""


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
            [bare] = _memories(module("benchmarks.memory", "bare", many), many)
            extra = sum(rank.proportional for rank in two) - one.proportional
            peaks.append((one.peak / _MB, bare.peak / _MB))
            added.append((extra / _MB, small[1].private / _MB))
            shares.append((extra / _MB, one.proportional / _MB))
    title = f"width {_WIDTH:g}, micro-batch {_MICRO_SIZE}, {_IMAGES:,} images"
    second = f"memory a second rank adds, {title}"
    yield ratio_of(f"memory, peak of a rank, {title}", "dist-train", "bare PyTorch loop", peaks, None, unit="MB")
    yield ratio_of(second, "2 ranks less 1", "its model, optimizer, activations", added, BAR, unit="MB")
    yield ratio_of(second, "2 ranks less 1", "1 rank", shares, None, unit="MB")


def memory_in(rollup: str, status: str) -> Memory:
    """Return the memory given by the texts of /proc/PID/smaps_rollup and /proc/PID/status."""
    return Memory(_bytes_of("Pss", rollup), _bytes_of("Pss_Anon", rollup), _bytes_of("VmHWM", status))


def _bytes_of(name: str, text: str) -> int:
    [line] = [line for line in text.splitlines() if line.startswith(f"{name}:")]
    return int(line.split()[1]) * _KIB


def _own_memory() -> Memory:
    process = Path("/proc/self")
    return memory_in((process / "smaps_rollup").read_text(), (process / "status").read_text())


def _trained(images: Path, ranks: int) -> list[Memory]:
    return _memories(on_ranks("mpi", ranks, module("benchmarks.memory", "rank", images)), images)


def _memories(command: list[str], images: Path) -> list[Memory]:
    measured = measure(command, {"DIST_TRAIN_CACHE": str(images / "cache")})
    return [Memory(*numbers) for numbers in measured]


def _settings(images: Path) -> Config:
    data = {"name": "fashion-mnist", "root": str(images)}
    batch = {"global_size": _GLOBAL_SIZE, "micro_size": _MICRO_SIZE}
    return settings(_WIDTH, _GLOBAL_SIZE, **{**QUIET, "data": data, "batch": batch})


def _rank(images: Path) -> None:
    """Train as one of the ranks; rank 0 prints the memory of all."""
    ask_for_large_pages()
    comm = join_ranks(timeout=600.0, device_type="cpu")
    with tempfile.TemporaryDirectory() as folder:
        trainer = open_trainer(_settings(images), comm, Path(folder) / "run")
        for _ in range(_UPDATES):
            trainer.advance()
        comm.barrier()
        memories = gather(comm, astuple(_own_memory()), "memory")
        if comm.rank == 0:
            tell(memories)
        trainer.close()
    comm.close()


def _bare(images: Path) -> None:
    """Train with the bare loop, in micro-batches of the same size, and print the memory."""
    torch.set_num_threads(1)
    data = load_images(_settings(images).data, "train", 0)
    update = bare_loop(
        data.images, data.labels, width=_WIDTH, batch=_MICRO_SIZE, channels_last=False, precision=torch.float32
    )
    for _ in range(_UPDATES):
        update()
    tell([astuple(_own_memory())])


_ROLES: Mapping[str, Callable[[Path], None]] = MappingProxyType({"rank": _rank, "bare": _bare})

if __name__ == "__main__":
    _ROLES[sys.argv[1]](Path(sys.argv[2]))
