"""Rows of the cost of working together: two ranks against two independent programs, in turn and in the same processes.

`mpirun -np 2 python -m benchmarks.together WIDTH GLOBAL_SIZE PAIRS` prints the rows. The programs begin each update at
the same moment and share no gradients. Two ranks also wait for the slower of them, as any synchronous training does: so
the second row compares with the slower program of each pair, and the third has the wait itself.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from statistics import fmean

from benchmarks.overlap import print_rows
from benchmarks.ranks import rows_of_two_ranks, shared_folder
from benchmarks.subject import QUIET, open_trainer, settings
from benchmarks.timing import Ratio, ratio_of, timed
from dist_train.cluster.communicator import Communicator, SingleProcess, gather
from dist_train.training.trainer import Trainer

_BAR = 1.03
_WARM_UP = 1
_NANO = 1e9
_DEALINGS = ("even", "dynamic")


@dataclass(frozen=True)
class Round:
    """Seconds on each rank of one update of each side: of both together by dealing, its wait, and of the programs."""

    together: dict[str, list[float]]
    waits: dict[str, list[float]]
    apart: list[float]


def rows(width: float, global_size: int, pairs: int) -> Iterator[Ratio]:
    """Return the rows, measured on two ranks over MPI."""
    return rows_of_two_ranks("mpi", "benchmarks.together", width, global_size, pairs)


def rows_on(comm: Communicator, width: float, global_size: int, pairs: int) -> Iterator[Ratio]:
    """Measure on this rank with all others, and yield the rows."""
    share = global_size // comm.size
    with shared_folder(comm) as folder:
        together = {
            dealing: open_trainer(
                settings(width, global_size, **{**QUIET, "batch": {"dealing": dealing}}), comm, folder / dealing
            )
            for dealing in _DEALINGS
        }
        apart = open_trainer(settings(width, share, **QUIET), SingleProcess(), folder / f"apart-{comm.rank}")
        measured = [_round(comm, together, apart, turn) for turn in range(_WARM_UP + pairs)][_WARM_UP:]
        even, dynamic = (trainer.training_step.weights.values for trainer in together.values())
        assert even.equal(dynamic), "results must not depend on the shares"
        for trainer in (*together.values(), apart):
            trainer.close()
    title = f"width {width:g}, batch {global_size}"
    programs = f"{comm.size} programs side by side, batch {share} each"
    for dealing in _DEALINGS:
        ranks = f"{comm.size} ranks, {dealing} shares"
        mean = [(fmean(each.together[dealing]), fmean(each.apart)) for each in measured]
        slower = [(fmean(each.together[dealing]), max(each.apart)) for each in measured]
        waits = [(fmean(each.waits[dealing]), fmean(each.together[dealing])) for each in measured]
        yield ratio_of(f"working together, {title}", ranks, programs, mean, _BAR, images=global_size)
        yield ratio_of(
            f"working together, {title}", ranks, f"the slower of {programs}", slower, _BAR, images=global_size
        )
        yield ratio_of(f"allreduce wait, {title}", f"mean of {ranks}", "their whole step", waits, None)


def _round(comm: Communicator, together: Mapping[str, Trainer], apart: Trainer, turn: int) -> Round:
    """Time an update of each side, started by all ranks at once; each turn another side is the first."""
    trainers = [*together.values(), apart]
    seconds = [0.0] * len(trainers)
    for place in range(len(trainers)):
        side = (place + turn) % len(trainers)
        comm.barrier()
        seconds[side] = timed(trainers[side].advance)
    waits = [trainer.training_step.clock.times().seconds_of("allreduce_wait") for trainer in together.values()]
    mine = [round(value * _NANO) for value in (*seconds, *waits)]
    rows = [[value / _NANO for value in each] for each in zip(*gather(comm, mine, "seconds"), strict=True)]
    count = len(together)
    return Round(
        dict(zip(together, rows[:count], strict=True)), dict(zip(together, rows[count + 1 :], strict=True)), rows[count]
    )


if __name__ == "__main__":
    print_rows(rows_on)
