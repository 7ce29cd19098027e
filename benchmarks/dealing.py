"""The gain of `batch.dealing: measured` if one of two ranks has a third of its core; rank 0 prints the row as JSON.

`torchrun --standalone --nproc-per-node 2 --no-python python -m benchmarks.dealing PAIRS`
"""

from __future__ import annotations

import os
import subprocess
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import asdict

from benchmarks.launching import measure, module, on_ranks, tell
from benchmarks.shared_folder import shared_folder
from benchmarks.subject import QUIET, open_trainer, settings
from benchmarks.timing import Ratio, compare
from dist_train.cluster.communicator import Communicator
from dist_train.cluster.joining import join_ranks

_BATCH = 1024
_BUSY_PROCESSES = 2
"""Busy processes on the slow rank's core, each of which gets as much of it as the rank."""
_SETTLING_UPDATES = 6
"""Updates until the shares are stable."""
_BUSY_PROGRAM = "import os\nparent = os.getppid()\nwhile os.getppid() == parent: pass"


@contextmanager
def pinned_to_core(rank: int, busy_processes: int) -> Iterator[None]:
    """Pin this process to core `rank`, together with `busy_processes` busy processes."""
    cores = sorted(os.sched_getaffinity(0))
    os.sched_setaffinity(0, {cores[rank % len(cores)]})
    busy = [subprocess.Popen([sys.executable, "-c", _BUSY_PROGRAM]) for _ in range(busy_processes)]
    try:
        yield
    finally:
        for process in busy:
            process.kill()
            process.wait()


def dealing_row(comm: Communicator, pairs: int) -> Ratio:
    """Return the step time with measured over that with even shares, VGG9 width 0.25, with the last rank slowed."""
    with shared_folder(comm) as folder, pinned_to_core(comm.rank, _BUSY_PROCESSES if comm.rank == comm.size - 1 else 0):
        sides = {
            dealing: open_trainer(
                settings(0.25, _BATCH, **{**QUIET, "batch": {"dealing": dealing, "micro_size": 64}}),
                comm,
                folder / f"{dealing}-shares",
            )
            for dealing in ("measured", "even")
        }
        row = compare(
            f"dealing, width 0.25, batch {_BATCH}, {comm.size} ranks, one at a third of its core",
            ("measured", sides["measured"].advance),
            ("even", sides["even"].advance),
            pairs=pairs,
            bar=0.75,
            warm_up=_SETTLING_UPDATES,
            images=_BATCH,
        )
        measured, even = (side.take_step.weights.values for side in sides.values())
        assert measured.equal(even), "results must not depend on the shares"
        return row


def launch(pairs: int) -> Ratio:
    """Run this module on two ranks and return its row."""
    return Ratio(**measure(on_ranks("torch", 2, module("benchmarks.dealing", pairs))))


def main() -> None:
    """Measure on every rank, print on the first."""
    comm = join_ranks(timeout=600.0, device_type="cpu")
    row = dealing_row(comm, int(sys.argv[1]))
    if comm.rank == 0:
        tell(asdict(row))
    comm.close()


if __name__ == "__main__":
    main()
