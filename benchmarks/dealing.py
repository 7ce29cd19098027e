"""The gain of `batch.dealing` if one of two ranks has a third of its core; rank 0 prints the rows as JSON.

`torchrun --standalone --nproc-per-node 2 --no-python python -m benchmarks.dealing PAIRS`
"""

from __future__ import annotations

import os
import subprocess
import sys
from collections.abc import Iterator
from contextlib import contextmanager

from benchmarks.ranks import rows_of_two_ranks, shared_folder, tell_rows
from benchmarks.subject import QUIET, open_trainer, settings
from benchmarks.timing import Ratio, compare
from dist_train.cluster.communicator import Communicator

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


def dealing_rows(comm: Communicator, pairs: int) -> Iterator[Ratio]:
    """Yield the step times with measured and dynamic shares over that with even ones, with the last rank slowed."""
    with shared_folder(comm) as folder, pinned_to_core(comm.rank, _BUSY_PROCESSES if comm.rank == comm.size - 1 else 0):
        for dealing in ("measured", "dynamic"):
            side, even = (
                open_trainer(
                    settings(0.25, _BATCH, **{**QUIET, "batch": {"dealing": shares, "micro_size": 64}}),
                    comm,
                    folder / f"{shares}-beside-{dealing}",
                )
                for shares in (dealing, "even")
            )
            yield compare(
                f"dealing, width 0.25, batch {_BATCH}, {comm.size} ranks, one at a third of its core",
                (dealing, side.advance),
                ("even", even.advance),
                pairs=pairs,
                bar=0.75,
                warm_up=_SETTLING_UPDATES,
                images=_BATCH,
            )
            weights, others = (each.training_step.weights.values for each in (side, even))
            assert weights.equal(others), "bits depend on the shares"


def rows(pairs: int) -> Iterator[Ratio]:
    """Run this module on two ranks and return its rows."""
    return rows_of_two_ranks("torch", "benchmarks.dealing", pairs)


if __name__ == "__main__":
    tell_rows(lambda comm: dealing_rows(comm, int(sys.argv[1])))
