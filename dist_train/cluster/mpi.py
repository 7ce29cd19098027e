"""The ranks over MPI, by mpi4py: for work that the ranks share without training."""

from __future__ import annotations

from typing import TYPE_CHECKING

import torch

from dist_train.cluster.communicator import Communicator, Pending

if TYPE_CHECKING:
    from mpi4py.MPI import Comm


class MpiCommunicator(Communicator):
    """The ranks of an MPI communicator, for CPU tensors."""

    def __init__(self, communicator: Comm, local: Comm) -> None:
        self.backend = "mpi4py"
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
