"""Work that falls into independent points, shared out over the ranks of mpirun or srun by mpi4py; alone without."""

from __future__ import annotations

import os
from collections.abc import Callable, Sequence
from typing import TYPE_CHECKING, Protocol, TypeVar

from dist_train.cluster.communicator import PeerFailedError, Place
from dist_train.cluster.launch import current_launch
from dist_train.outcome import UsageError

if TYPE_CHECKING:
    from mpi4py.MPI import Comm

Value = TypeVar("Value")


class PointRanks(Place, Protocol):
    """The ranks that share points, seen from one of them. Every rank must call the same operations."""

    def share(self, value: Value) -> Value:
        """Return rank 0's `value`; what the others pass is not used."""

    def collect(self, values: Sequence[Value]) -> list[Value]:
        """Return the values of all ranks, one rank after the other, on rank 0; nothing on the others."""

    def run_on_all_ranks(self, action: Callable[[], Value], name: str) -> Value:
        """Return `action()`; when it fails on some ranks, fail on all, after all have tried.

        Raises:
            PeerFailedError: on those whose action did not fail, naming those that failed.
        """


class AlonePoints:
    """The only rank: no MPI."""

    rank = 0
    size = 1
    local_rank = 0
    local_size = 1

    def share(self, value: Value) -> Value:
        """Return `value`."""
        return value

    def collect(self, values: Sequence[Value]) -> list[Value]:
        """Return `values`."""
        return list(values)

    def run_on_all_ranks(self, action: Callable[[], Value], name: str) -> Value:
        """Return `action()`."""
        return action()


class MpiPoints:
    """The ranks of an MPI communicator."""

    def __init__(self, communicator: Comm, local: Comm) -> None:
        """Take the communicator of all ranks, and that of those on this node."""
        self._communicator = communicator
        self.rank = communicator.Get_rank()
        self.size = communicator.Get_size()
        self.local_rank = local.Get_rank()
        self.local_size = local.Get_size()

    def share(self, value: Value) -> Value:
        """Return rank 0's `value`."""
        shared: Value = self._communicator.bcast(value, root=0)
        return shared

    def collect(self, values: Sequence[Value]) -> list[Value]:
        """Return the values of all ranks on rank 0; nothing on the others."""
        collected: list[Sequence[Value]] | None = self._communicator.gather(values, root=0)
        return [value for part in collected or () for value in part]

    def run_on_all_ranks(self, action: Callable[[], Value], name: str) -> Value:
        """Return `action()`; when it fails on some ranks, fail on all, after all have tried."""
        failure: Exception | None = None
        try:
            result = action()
        except Exception as error:
            failure = error
        outcomes: list[bool] = self._communicator.allgather(failure is not None)
        failed = [rank for rank, bad in enumerate(outcomes) if bad]
        # One of them tells, where all have met the same fault.
        if failure is not None and (failed[0] == self.rank or not isinstance(failure, UsageError)):
            raise failure
        if failed:
            raise PeerFailedError(f"rank {', '.join(map(str, failed))} could not {name}; see its message")
        return result


def join_points() -> PointRanks:
    """Return the ranks that mpirun or srun started, or one alone.

    Raises:
        UsageError: the launcher does not carry MPI, or mpi4py is missing.
    """
    launch = current_launch()
    if launch.size == 1:
        return AlonePoints()
    if launch.launcher == "horovodrun":
        raise UsageError("points are shared out by MPI: start with mpirun or srun instead of horovodrun --gloo")
    # Open MPI polls without pause while it waits, and so takes the core that computes.
    os.environ.setdefault("OMPI_MCA_mpi_yield_when_idle", "1")
    try:
        from mpi4py import MPI
    except (ImportError, RuntimeError) as error:
        raise UsageError(f"mpi4py cannot be used ({error}): run make setup, or start one rank alone") from error
    communicator = MPI.COMM_WORLD
    if communicator.Get_size() != launch.size:
        raise UsageError(
            f"{launch.launcher} started {launch.size} ranks, but MPI sees {communicator.Get_size()}: "
            f"start with the mpirun of mpi4py's MPI, or srun --mpi=pmix; see dist-train doctor"
        )
    return MpiPoints(communicator, communicator.Split_type(MPI.COMM_TYPE_SHARED))


def deal(points: Sequence[Value], rank: int, size: int) -> Sequence[Value]:
    """Return those of `points` that rank `rank` of `size` has to do, round robin."""
    assert 0 <= rank < size
    return points[rank::size]
