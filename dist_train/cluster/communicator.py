"""What a group of ranks can do, whatever carries it; and the group of one."""

from __future__ import annotations

import hashlib
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import TypeVar

import torch

from dist_train.outcome import FaultError, UsageError

Result = TypeVar("Result")


class RankLostError(FaultError):
    """A rank has died or no longer answers, so that the group cannot continue. Exit code 1."""

    code = "rank-lost"


class GroupBrokenError(RankLostError):
    """The group of an elastic launch is over, since a rank was lost; what is left can meet anew."""


class MeetingRequestedError(GroupBrokenError):
    """All ranks have agreed to meet anew after this update; nothing is broken."""


@contextmanager
def naming_lost_ranks(kind: type[Exception], operation: str = "") -> Iterator[None]:
    """Raise RankLostError in place of the engine's `kind` of error within the block."""
    try:
        yield
    except kind as error:
        text = " ".join(str(error).split())
        raise RankLostError(f"a rank was lost, so the others stop: {operation}{text}") from error


@dataclass(frozen=True)
class Generation:
    """One numbering of the ranks, as the authority gives it to one of them.

    `store`: where the ranks meet, served by rank 0. `nodes`: the ranks' nodes, by rank. `lost`: who was lost of the
    generation before, and why; `report`: what had broken it, as a rank saw it; `joined`: the ranks that are new.
    """

    generation: int
    rank: int
    size: int
    store: tuple[str, int]
    nodes: tuple[str, ...]
    lost: tuple[str, ...]
    report: str
    joined: tuple[str, ...]


class Pending:
    """An operation under way; here one that is done."""

    def wait(self) -> None:
        """Return when the operation's result is in its tensor; raise RankLostError where a rank is lost meanwhile."""


class Communicator:
    """The ranks of a run, seen from one of them. Every rank must call the same operations.

    What an engine does not replace is as for a single rank: every sum is the value itself.
    """

    rank: int = 0
    size: int = 1
    local_rank: int = 0
    """This rank's number on its node."""
    local_size: int = 1
    """How many ranks this node has."""
    controller: str = "alone"
    """What carries the group: alone, Horovod's mpi or gloo, torch-gloo or torch-nccl, mpi4py."""
    has_nccl: bool = True
    """Whether the group can sum tensors of GPUs."""
    is_elastic: bool = False
    """Whether ranks may come and go: a lost one raises GroupBrokenError, and `meet` continues without it."""
    is_joining: bool = False
    """Whether the run is under way, and this rank has yet to meet the others."""
    generation: int = 1
    """How many groups there have been."""

    @property
    def wants_meeting(self) -> bool:
        """Whether ranks wait to be let in, as far as this rank knows."""
        return False

    def allreduce_async(self, tensor: torch.Tensor, name: str) -> Pending:
        """Start to replace the contiguous `tensor` by its sum over all ranks."""
        return Pending()

    def adasum_async(self, tensor: torch.Tensor, name: str) -> Pending:
        """Start to replace `tensor` by its Adasum over all ranks (arXiv 2006.02924)."""
        return Pending()

    def broadcast(self, tensor: torch.Tensor, name: str, root: int = 0) -> None:
        """Replace `tensor` by that of rank `root`."""

    def barrier(self) -> None:
        """Wait for all ranks."""
        self.allreduce_async(torch.zeros(1, dtype=torch.int64), "barrier").wait()

    def start_timeline(self, path: Path) -> None:
        """Start to write what the group's operations spend their time on to `path`, on rank 0, if they are traced."""

    def stop_timeline(self) -> None:
        """Stop writing it."""

    def use_device(self, device: torch.device) -> None:
        """Compute on `device`, which is chosen once: all ranks that have met call it before they sum tensors on it."""

    def note_work(self) -> None:
        """Say that this rank works on: it hangs if it does not say so again, rest, or wait for others, in time."""

    def note_rest(self) -> None:
        """Say that what this rank does from now on may take as long as it takes."""

    def begin_training(self) -> None:
        """Let the run be continued from this rank's state, from now on."""

    def meet(self, why: str) -> Generation:
        """Stop work, and return in the next generation, of which this object is from then on.

        `why` says what broke this one; empty where all come by agreement.

        Raises:
            GroupBrokenError: that one is over as well.
            RankLostError: the run cannot continue.
        """
        raise RankLostError("this launch is not elastic")

    def close(self, error: BaseException | None = None) -> None:
        """Leave the group; for good, or by an `error` of this rank."""


class Alone(Communicator):
    """The only rank."""


def signed_digest(content: bytes) -> int:
    """Return a digest of `content` that `gather` takes: a signed 64-bit integer."""
    return int.from_bytes(hashlib.blake2b(content, digest_size=8).digest(), "little", signed=True)


def gather(comm: Communicator, values: Sequence[int], name: str) -> list[list[int]]:
    """Return every rank's `values` (64-bit integers, as many on each), in the order of the ranks."""
    slots = torch.zeros(comm.size, len(values), dtype=torch.int64)
    slots[comm.rank] = torch.tensor(values, dtype=torch.int64)
    comm.allreduce_async(slots, name).wait()
    gathered: list[list[int]] = slots.tolist()
    return gathered


def gather_str(comm: Communicator, text: str, name: str) -> tuple[str, ...]:
    """Return every rank's `text`, which does not end on NUL, in the order of the ranks."""
    encoded = text.encode()
    longest = max(length for (length,) in gather(comm, [len(encoded)], f"{name}.length"))
    return tuple(bytes(row).rstrip(b"\0").decode() for row in gather(comm, list(encoded.ljust(longest, b"\0")), name))


def broadcast_str(comm: Communicator, text: str, name: str, root: int = 0) -> str:
    """Return the `text` of rank `root`; what the others pass is not used."""
    encoded = torch.tensor(list(text.encode()), dtype=torch.int64)
    length = torch.tensor([len(encoded)], dtype=torch.int64)
    comm.broadcast(length, f"{name}.length", root)
    if comm.rank != root:
        encoded = torch.empty(int(length), dtype=torch.int64)
    if len(encoded):
        comm.broadcast(encoded, name, root)
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
