"""Rows of the wait for the allreduce: gradients sent during the backward pass, as we do, against summed after it.

`mpirun -np 2 python -m benchmarks.overlap WIDTH GLOBAL_SIZE PAIRS` prints the rows.
"""

from __future__ import annotations

import sys
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, replace

from benchmarks.ranks import rows_of_two_ranks, shared_folder, tell_rows
from benchmarks.subject import QUIET, open_trainer, settings
from benchmarks.timing import Ratio, ratio_of, timed
from dist_train.cluster.communicator import Communicator
from dist_train.training.accumulators import ExactAccumulator
from dist_train.training.reduction import GradientReduction, buckets_of
from dist_train.training.trainer import Trainer

_BUCKET = 1 << 20
_OVERLAPPED, _AFTERWARDS = "sent during the backward pass", "summed after it"


class SummedAfterwards(GradientReduction):
    """A reduction that sends nothing before the end of the last backward pass."""

    @contextmanager
    def last_micro_batch(self) -> Iterator[None]:
        """Accumulate the gradients of the backward pass within the block, as for any other micro-batch."""
        with self.micro_batch():
            yield


@dataclass(frozen=True)
class Times:
    """Seconds of a step and of its wait for the allreduce."""

    step: float
    wait: float


def summed_afterwards(trainer: Trainer) -> None:
    """Make `trainer` sum its gradients after the backward pass, still exactly."""
    step = trainer.training_step
    step.reduction.close()
    accumulator = ExactAccumulator(step.weights, trainer.comm, len(trainer.plan.micro_batches))
    trainer.training_step = replace(
        step, reduction=SummedAfterwards(step.weights, accumulator, buckets_of(step.weights, _BUCKET))
    )


def times_of(trainer: Trainer) -> Times:
    """Make an update and return its times."""
    step = timed(trainer.advance)
    return Times(step, trainer.training_step.clock.times().seconds_of("allreduce_wait"))


def rows(controller: str, width: float, global_size: int, pairs: int) -> Iterator[Ratio]:
    """Return the rows of two ranks over `controller`."""
    return rows_of_two_ranks(controller, "benchmarks.overlap", width, global_size, pairs)


def rows_on(comm: Communicator, width: float, global_size: int, pairs: int) -> Iterator[Ratio]:
    """Measure on this rank, and yield its rows."""
    sections = {**QUIET, "batch": {"micro_size": min(128, global_size // comm.size)}}
    config = settings(width, global_size, **sections)
    with shared_folder(comm) as folder:
        ours, theirs = (open_trainer(config, comm, folder / name) for name in ("overlapped", "afterwards"))
        summed_afterwards(theirs)
        measured = [_pair(comm, ours, theirs, turn) for turn in range(pairs + 1)][1:]
        ours.close()
        theirs.close()
    title = f"width {width:g}, batch {global_size}, {comm.size} ranks over {comm.backend}"
    waits = [(mine.wait, other.wait) for mine, other in measured]
    steps = [(mine.step, other.step) for mine, other in measured]
    share, without = ([(times.wait, times.step) for times in side] for side in zip(*measured, strict=True))
    yield ratio_of(f"allreduce wait, {title}", _OVERLAPPED, _AFTERWARDS, waits, None)
    yield ratio_of(f"step, {title}", _OVERLAPPED, _AFTERWARDS, steps, 1.03, images=global_size)
    yield ratio_of(f"allreduce wait, {title}", _OVERLAPPED, "its whole step", share, None)
    yield ratio_of(f"allreduce wait, {title}", _AFTERWARDS, "its whole step", without, None)


def _pair(comm: Communicator, ours: Trainer, theirs: Trainer, turn: int) -> tuple[Times, Times]:
    """Return the times of both sides, started by all ranks at once; the side that runs first alternates."""
    sides = [ours, theirs] if turn % 2 == 0 else [theirs, ours]
    times = []
    for trainer in sides:
        comm.barrier()
        times.append(times_of(trainer))
    return (times[0], times[1]) if turn % 2 == 0 else (times[1], times[0])


def print_rows(rows_on: Callable[[Communicator, float, int, int], Iterable[Ratio]]) -> None:
    """Measure on every rank with the command line's WIDTH GLOBAL_SIZE PAIRS; rank 0 prints the rows."""
    width, global_size, pairs = float(sys.argv[1]), int(sys.argv[2]), int(sys.argv[3])
    tell_rows(lambda comm: rows_on(comm, width, global_size, pairs))


if __name__ == "__main__":
    print_rows(rows_on)
