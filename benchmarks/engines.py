"""Rows of the engines: torch.distributed against Horovod over MPI, and our start-up against a bare program's.

`torchrun --nproc-per-node 2 -m benchmarks.engines WHAT` prints what two ranks measured; WHAT is a name in `main`.
"""

from __future__ import annotations

import statistics
import sys
import tempfile
import time
from collections.abc import Iterator
from pathlib import Path

import torch
import torch.distributed as dist

from benchmarks.launched_run import seconds_to_step, write_settings
from benchmarks.launching import measure, module, on_ranks, tell
from benchmarks.ranks import shared_folder, tell_measured
from benchmarks.subject import QUIET, open_trainer, settings
from benchmarks.timing import Ratio, ratio_of, timed
from dist_train.cluster.communicator import Communicator

_SUMS = 1000
_STEPS = {128: 40, 8192: 2}
"""Measured steps for each batch size, after one warm-up step."""
_LONGEST_SUM = 0.3e-3
"""Seconds; the bar of a tiny sum over torch's Gloo."""


def rows(pairs: int) -> Iterator[Ratio]:
    """Yield rows of a tiny sum, steps and a start-up on two ranks; the engines are launched in turn."""
    sums = [(_measure_on("torch", "sum"), _measure_on("mpi", "sum")) for _ in range(pairs)]
    yield ratio_of("tiny sum, 2 ranks", "torch.distributed", "Horovod over MPI", sums, None)
    bare = [(_measure_on("torch", "sum"), _measure_on("torch", "bare-sum")) for _ in range(pairs)]
    yield ratio_of("tiny sum, 2 ranks", "torch.distributed", "dist.all_reduce of a bare program", bare, 1.1)
    against_bar = [(ours, _LONGEST_SUM) for ours, _ in sums + bare]
    yield ratio_of("tiny sum, 2 ranks", "torch.distributed", "0.3 ms", against_bar, 1.0)
    for batch in _STEPS:
        steps = [(_measure_on("torch", f"step-{batch}"), _measure_on("mpi", f"step-{batch}")) for _ in range(pairs)]
        row = f"step, width 0.25, batch {batch}, 2 ranks"
        yield ratio_of(row, "torch.distributed", "Horovod over MPI", steps, 1.0, images=batch)
    over_mpi, over_bare = [], []
    with tempfile.TemporaryDirectory() as folder:
        config = write_settings(Path(folder), 0.25)
        for pair in range(pairs):
            run = Path(folder) / str(pair)
            ours = seconds_to_step(1, config, run / "torch", controller="torch", ranks=2)
            over_mpi.append((ours, seconds_to_step(1, config, run / "mpi", controller="mpi", ranks=2)))
            started = time.time()
            over_bare.append((ours, _measure_on("torch", "bare") - started))
    yield ratio_of(
        "start, 2 ranks", "dist-train launch, to the first step", "mpirun, to the first step", over_mpi, None
    )
    yield ratio_of("start, 2 ranks", "dist-train launch, to the first step", "bare torchrun", over_bare, 1.15)


def _measure_on(controller: str, what: str) -> float:
    return float(measure(on_ranks(controller, 2, module("benchmarks.engines", what))))


def main() -> None:
    """Measure on every rank; rank 0 prints the result."""
    what = sys.argv[1]
    if what in _BARE:
        _BARE[what]()
    elif what == "sum":
        tell_measured(_seconds_of_a_sum)
    else:
        tell_measured(lambda comm: _seconds_of_a_step(comm, int(what.removeprefix("step-"))))


def _seconds_of_a_sum(comm: Communicator) -> float:
    tensor = torch.ones(8, dtype=torch.int64)

    def add() -> None:
        comm.allreduce_async(tensor, "sum").wait()

    return statistics.median(timed(add) for _ in range(_SUMS))


def _seconds_of_a_step(comm: Communicator, batch: int) -> float:
    config = settings(0.25, batch, **QUIET, batch={"micro_size": 64})
    with shared_folder(comm) as folder:
        trainer = open_trainer(config, comm, folder / "run")
        trainer.advance()
        seconds = [timed(trainer.advance) for _ in range(_STEPS[batch])]
        trainer.close()
    return statistics.median(seconds)


def _bare_start() -> None:
    dist.init_process_group("gloo")
    dist.all_reduce(torch.ones(1))
    if dist.get_rank() == 0:
        tell(time.time())
    dist.destroy_process_group()


def _bare_sum() -> None:
    dist.init_process_group("gloo")
    tensor = torch.ones(8, dtype=torch.int64)
    seconds = statistics.median(timed(lambda: dist.all_reduce(tensor)) for _ in range(_SUMS))
    if dist.get_rank() == 0:
        tell(seconds)
    dist.destroy_process_group()


_BARE = {"bare": _bare_start, "bare-sum": _bare_sum}


if __name__ == "__main__":
    main()
