"""What a group of ranks can do, whatever carries it; and the group of one."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Protocol, TypeVar

import torch

from dist_train.outcome import FaultError, UsageError

Result = TypeVar("Result")


class RankLostError(FaultError):
    """A rank has died or no longer answers, so that the group cannot continue. Exit code 1."""

    code = "rank-lost"


class Pending(Protocol):
    """An operation under way."""

    def wait(self) -> None:
        """Return when the operation's result is in its tensor.

        Raises:
            RankLostError: a rank was lost meanwhile.
        """


class Place(Protocol):
    """Where one rank stands among all."""

    @property
    def rank(self) -> int:
        """This rank's number, from 0."""

    @property
    def size(self) -> int:
        """How many ranks there are."""

    @property
    def local_rank(self) -> int:
        """This rank's number on its node."""

    @property
    def local_size(self) -> int:
        """How many ranks this node has."""


class Communicator(Place, Protocol):
    """The ranks of a run, seen from one of them. Every rank must call the same operations."""

    @property
    def controller(self) -> str:
        """What carries the group: alone, Horovod's mpi or gloo, torch-gloo or torch-nccl."""

    @property
    def has_nccl(self) -> bool:
        """Whether the group can sum tensors of GPUs."""

    def allreduce_async(self, tensor: torch.Tensor, name: str) -> Pending:
        """Start to replace the contiguous `tensor` by its sum over all ranks."""

    def adasum_async(self, tensor: torch.Tensor, name: str) -> Pending:
        """Start to replace `tensor` by its Adasum over all ranks (arXiv 2006.02924)."""

    def broadcast(self, tensor: torch.Tensor, name: str) -> None:
        """Replace `tensor` by rank 0's."""

    def barrier(self) -> None:
        """Wait for all ranks."""

    def start_timeline(self, path: Path) -> None:
        """Start to write what the group's operations spend their time on to `path`, on rank 0."""

    def stop_timeline(self) -> None:
        """Write no more of it."""

    def close(self) -> None:
        """Leave the group."""


def gather(comm: Communicator, values: Sequence[int], name: str) -> list[list[int]]:
    """Return every rank's `values` (64-bit integers, as many on each), in the order of the ranks."""
    slots = torch.zeros(comm.size, len(values), dtype=torch.int64)
    slots[comm.rank] = torch.tensor(values, dtype=torch.int64)
    comm.allreduce_async(slots, name).wait()
    gathered: list[list[int]] = slots.tolist()
    return gathered


def broadcast_str(comm: Communicator, text: str, name: str) -> str:
    """Return rank 0's `text`; what the others pass is not used."""
    encoded = torch.tensor(list(text.encode()), dtype=torch.int64)
    length = torch.tensor([len(encoded)], dtype=torch.int64)
    comm.broadcast(length, f"{name}.length")
    if comm.rank != 0:
        encoded = torch.empty(int(length), dtype=torch.int64)
    if len(encoded):
        comm.broadcast(encoded, name)
    return bytes(encoded.tolist()).decode()


def run_on_all_ranks(comm: Communicator, action: Callable[[], Result], name: str) -> Result:
    """Return `action()`; when it fails on some ranks, fail on all, so that none waits for ever.

    The first of those that failed raises its own error, so that it is reported once.

    Raises:
        PeerFailedError: on all the others, naming those that failed.
    """
    failure: Exception | None = None
    try:
        result = action()
    except Exception as error:
        failure = error
    failed = [rank for rank, (bad,) in enumerate(gather(comm, [failure is not None], name)) if bad]
    if failure is not None and failed[0] == comm.rank:
        raise failure
    if failed:
        raise PeerFailedError(f"rank {', '.join(map(str, failed))} could not {name}; see its message")
    return result


class PeerFailedError(UsageError):
    """Another rank failed and has said why."""

    code = "peer-failed"


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
    has_nccl = True

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
