"""A group of one: no Horovod, no MPI."""

from __future__ import annotations

from pathlib import Path

import torch

from dist_train.cluster.communicator import Pending


class _Done:
    def wait(self) -> None:
        """Return at once."""


class Alone:
    """The only rank: every sum is the value itself."""

    rank = 0
    size = 1
    local_rank = 0
    local_size = 1
    controller = "alone"

    def allreduce_async(self, tensor: torch.Tensor, name: str) -> Pending:
        """Leave `tensor` as it is."""
        return _Done()

    def adasum_async(self, tensor: torch.Tensor, name: str) -> Pending:
        """Leave `tensor` as it is."""
        return _Done()

    def broadcast(self, tensor: torch.Tensor, name: str) -> None:
        """Leave `tensor` as it is."""

    def barrier(self) -> None:
        """Return at once."""

    def start_timeline(self, path: Path) -> None:
        """Do nothing: there are no operations."""

    def stop_timeline(self) -> None:
        """Do nothing."""

    def close(self) -> None:
        """Return at once."""
