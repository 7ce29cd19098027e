"""Rows of the cost of working together: two ranks against two independent programs, in turn and in the same processes.

`mpirun -np 2 python -m benchmarks.together WIDTH GLOBAL_SIZE PAIRS` prints the rows. The programs begin each update at
the same moment and share no gradients. Two ranks also wait for the slower of them, as any synchronous training does: so
the second row compares with the slower program of each pair, and the third has the wait itself.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from statistics import fmean

from benchmarks.launching import measure, module, on_ranks
from benchmarks.overlap import print_rows
from benchmarks.shared_folder import shared_folder
from benchmarks.subject import QUIET, open_trainer, settings
from benchmarks.timing import Ratio, ratio_of, timed
from dist_train.cluster.communicator import Alone, Communicator, gather
from dist_train.training.trainer import Trainer

_BAR = 1.03
_WARM_UP = 1
_NANO = 1e9


@dataclass(frozen=True)
class Pair:
    """Seconds of one update on each rank: of both together, its wait for the allreduce, and of the rank's program."""

    together: list[float]
    waits: list[float]
    apart: list[float]


def rows(width: float, global_size: int, pairs: int) -> Iterator[Ratio]:
    """Yield the rows, measured on two ranks over MPI."""
    program = module("benchmarks.together", width, global_size, pairs)
    yield from (Ratio(**row) for row in measure(on_ranks("mpi", 2, program)))


def rows_on(comm: Communicator, width: float, global_size: int, pairs: int) -> Iterator[Ratio]:
    """Measure on this rank with all others, and yield the rows."""
    share = global_size // comm.size
    with shared_folder(comm) as folder:
        together = open_trainer(settings(width, global_size, **QUIET), comm, folder / "together")
        apart = open_trainer(settings(width, share, **QUIET), Alone(), folder / f"apart-{comm.rank}")
        measured = [_pair(comm, together, apart, turn) for turn in range(_WARM_UP + pairs)][_WARM_UP:]
        together.close()
        apart.close()
    title = f"width {width:g}, batch {global_size}"
    ranks, programs = f"{comm.size} ranks", f"{comm.size} programs side by side, batch {share} each"
    mean = [(fmean(pair.together), fmean(pair.apart)) for pair in measured]
    slower = [(fmean(pair.together), max(pair.apart)) for pair in measured]
    waits = [(fmean(pair.waits), fmean(pair.together)) for pair in measured]
    yield ratio_of(f"working together, {title}", ranks, programs, mean, _BAR, images=global_size)
    yield ratio_of(f"working together, {title}", ranks, f"the slower of {programs}", slower, _BAR, images=global_size)
    yield ratio_of(f"allreduce wait, {title}", f"mean of {ranks}", "their whole step", waits, None)


def _pair(comm: Communicator, together: Trainer, apart: Trainer, turn: int) -> Pair:
    """Time an update of each side, started by all ranks at once; the side that runs first alternates."""
    seconds = []
    for trainer in (together, apart) if turn % 2 == 0 else (apart, together):
        comm.barrier()
        seconds.append(timed(trainer.advance))
    if turn % 2:
        seconds.reverse()
    wait = together.take_step.clock.times().seconds_of("allreduce_wait")
    mine = [round(value * _NANO) for value in (seconds[0], wait, seconds[1])]
    return Pair(*([value / _NANO for value in each] for each in zip(*gather(comm, mine, "seconds"), strict=True)))


if __name__ == "__main__":
    print_rows(rows_on)
