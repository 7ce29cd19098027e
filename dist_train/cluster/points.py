"""Independent points of work, distributed over ranks: by mpi4py under mpirun and srun, otherwise as in training."""

from __future__ import annotations

import os
from collections.abc import Sequence
from typing import TYPE_CHECKING, TypeVar

import torch

from dist_train.cluster.communicator import Alone, Communicator, Pending
from dist_train.cluster.joining import join_ranks
from dist_train.cluster.launch import current_launch
from dist_train.outcome import UsageError

if TYPE_CHECKING:
    from mpi4py.MPI import Comm

Value = TypeVar("Value")

_TIMEOUT = 8 * 3600.0  # seconds; a rank that is done waits for those that still evaluate


class MpiCommunicator(Communicator):
    """The ranks of an MPI communicator, for CPU tensors."""

    def __init__(self, communicator: Comm, local: Comm) -> None:
        self.controller = "mpi4py"
        self.has_nccl = False
        self._communicator = communicator
        self.rank = communicator.Get_rank()
        self.size = communicator.Get_size()
        self.local_rank = local.Get_rank()
        self.local_size = local.Get_size()

    def allreduce_async(self, tensor: torch.Tensor, name: str) -> Pending:
        """Sum the contiguous `tensor` over all ranks, in place."""
        from mpi4py import MPI

        self._communicator.Allreduce(MPI.IN_PLACE, tensor.numpy())
        return Pending()

    def broadcast(self, tensor: torch.Tensor, name: str, root: int = 0) -> None:
        """Overwrite `tensor` with that of rank `root`."""
        self._communicator.Bcast(tensor.numpy(), root=root)


def join_points() -> Communicator:
    """Return the launcher's ranks; without a launcher, a single rank. Raises UsageError."""
    launch = current_launch()
    if launch.size == 1:
        return Alone()
    if launch.launcher not in ("mpirun", "srun", "horovodrun"):
        return join_ranks(timeout=_TIMEOUT, device_type="cpu", engine="torch")
    if launch.launcher == "horovodrun":
        raise UsageError(
            "points are not distributed by Horovod: start with dist-train launch, mpirun or srun",
            code="launcher-unsupported",
        )
    # Otherwise Open MPI busy-waits on the core that computes.
    os.environ.setdefault("OMPI_MCA_mpi_yield_when_idle", "1")
    try:
        from mpi4py import MPI
    except (ImportError, RuntimeError) as error:
        raise UsageError(
            f"mpi4py cannot be used ({error}): run make setup, or start with dist-train launch", code="mpi4py-missing"
        ) from error
    communicator = MPI.COMM_WORLD
    if communicator.Get_size() != launch.size:
        raise UsageError(
            f"{launch.launcher} started {launch.size} ranks, but MPI sees {communicator.Get_size()}: "
            f"start with the mpirun of mpi4py's MPI, or srun --mpi=pmix; see dist-train doctor",
            code="rank-count",
        )
    return MpiCommunicator(communicator, communicator.Split_type(MPI.COMM_TYPE_SHARED))


def deal(points: Sequence[Value], rank: int, size: int) -> Sequence[Value]:
    """Return the `points` for rank `rank` of `size`, round robin."""
    assert 0 <= rank < size
    return points[rank::size]
