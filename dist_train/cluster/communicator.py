"""The process group as the rest of the program sees it, whatever the backend; and the group of a single rank."""

from __future__ import annotations

import hashlib
import json
import socket
from collections import defaultdict
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import Future, ThreadPoolExecutor, wait
from contextlib import contextmanager
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import TYPE_CHECKING, TypeVar

import torch
from pydantic import TypeAdapter

from dist_train.outcome import ExitCode, FaultError, PeerFailedError, UsageError, exit_code_of

if TYPE_CHECKING:
    from mpi4py.MPI import Comm

Result = TypeVar("Result")

_POLL_SECONDS = 1.0  # how long one wait of `run_long_on_all_ranks` lasts, far below the time limit of any engine


class RankLostError(FaultError):
    """A rank has died or no longer answers: the group cannot continue. Exit code 1."""

    code = "rank-lost"


class GroupBrokenError(RankLostError):
    """The current generation of an elastic launch has lost a rank; the remaining ranks can form the next one."""


class RendezvousRequestedError(GroupBrokenError):
    """All ranks have agreed to form a new generation after this update; nothing is broken."""


_FULL_GPU = ("out of memory", "Failed to CUDA")  # "malloc", "calloc", "calloc async"
_FAILED_GPU = ("CUDA error", "HIP error")  # torch's: this process can use its GPU no more
_NO_INTERFACE = "Unable to find address for: "  # Gloo's


@contextmanager
def naming_lost_ranks(
    operation: str = "",
    kind: type[RankLostError] = RankLostError,
    opening: str = "a rank was lost or, as after a long suspension, did not come in time, so all stop",
) -> Iterator[None]:
    """Raise `kind` in place of an engine's RuntimeError in the block, unless its cause is this rank alone.

    Then, since the others can continue without it: UsageError if its GPU is full, or its node lacks the network
    interface that the user has named; FaultError if the GPU has failed, or that interface is down.
    """
    try:
        yield
    except RuntimeError as error:  # HorovodInternalError is one, too
        text = " ".join(str(error).split())
        if any(sign in text for sign in _FULL_GPU):
            raise UsageError(
                f"the GPU has no memory left for NCCL: begin with a smaller batch.micro_size, or end what else runs on "
                f"the GPU ({text})",
                code="out-of-memory",
            ) from error
        if any(sign in text for sign in _FAILED_GPU):
            raise FaultError(f"the GPU has failed: {text}", code="gpu-failed") from error
        if _NO_INTERFACE in text:
            interface = text.partition(_NO_INTERFACE)[2]
            # One that is down may be up at the next start, or on another node.
            is_down = Path("/sys/class/net", interface).exists()
            raise (FaultError if is_down else UsageError)(
                f"{socket.gethostname()} has no address at the interface {interface}: set GLOO_SOCKET_IFNAME to one "
                f"that has (ip address lists them)",
                code="ranks-cannot-meet",
            ) from error
        raise kind(": ".join(filter(None, (opening, operation, text)))) from error


@dataclass(frozen=True)
class Generation:
    """One numbering of the ranks of an elastic launch, as its coordinator (`membership_server.py`) sends it to them."""

    generation: int
    rank: int
    size: int
    store: tuple[str, int]  # where the ranks meet, served by rank 0
    nodes: tuple[str, ...]  # host names, by rank
    lost: tuple[str, ...]  # the ranks lost from the generation before, with reasons
    report: str  # how a rank described the failure
    joined: tuple[str, ...]  # the new ranks


class Pending:
    """A collective operation in flight; this base class is one that has completed."""

    def wait(self) -> None:
        """Return once the tensor holds the result; raise RankLostError if a rank is lost meanwhile."""

    def wait_on_host(self) -> None:
        """Wait as `wait` does, before the host reads the result.

        For a tensor on a GPU `wait` lets only the GPU's stream wait, and reading would hang if a rank does not come.
        """
        self.wait()


@dataclass(frozen=True)
class Operation(Pending):
    """An engine's operation, which `finish` ends; a RuntimeError means that a rank was lost."""

    finish: Callable[[], object]
    name: str = ""

    def wait(self) -> None:
        """Call `finish`; on a GPU, the current stream then waits for the result."""
        with naming_lost_ranks(self.name):
            self.finish()


class Counters:
    """Counters by name, each from 0, which all ranks of a group share; this base class is that of a single rank."""

    def __init__(self) -> None:
        self._values: defaultdict[str, int] = defaultdict(int)

    def fetch_and_add(self, name: str) -> int:
        """Return the value of the counter `name`, and add 1 to it. Raises RankLostError."""
        value = self._values[name]
        self._values[name] += 1
        return value

    def delete(self, name: str) -> None:
        """Delete the counter `name`, which no rank uses any more."""
        self._values.pop(name, None)


class Communicator:
    """The collective operations of a run, which all ranks call alike. This base class is that of a single rank."""

    rank: int = 0
    size: int = 1
    local_rank: int = 0  # this rank's number on its node
    local_size: int = 1  # number of ranks on this node
    backend: str = "alone"  # or Horovod's mpi or gloo, torch-gloo or torch-nccl, mpi4py
    has_nccl: bool = True  # whether the group can sum GPU tensors
    has_counters: bool = False  # whether `open_counters` needs no further connections
    is_elastic: bool = False  # whether ranks may leave and join: after a GroupBrokenError `rendezvous` continues
    is_joining: bool = False  # whether this rank joins a run under way and has not met the others yet
    generation: int = 1  # number of the current process group, from 1
    last_action_failed: bool = False  # of `run_on_all_ranks`, on any rank, as all ranks know

    @property
    def most_ranks(self) -> int:
        """How many ranks there may be, counting those that may still join."""
        return self.size

    @property
    def wants_rendezvous(self) -> bool:
        """Whether ranks are waiting to join, as far as this rank knows."""
        return False

    def allreduce_async(self, tensor: torch.Tensor, name: str) -> Pending:
        """Start to sum the contiguous `tensor` over all ranks, in place."""
        return Pending()

    def adasum_async(self, tensor: torch.Tensor, name: str) -> Pending:
        """Start to combine `tensor` over all ranks by Adasum (arXiv 2006.02924), in place."""
        return Pending()

    def broadcast(self, tensor: torch.Tensor, name: str, root: int = 0) -> None:
        """Overwrite `tensor` with that of rank `root`."""

    def open_counters(self) -> Counters:
        """Return counters that all ranks share; all ranks call this. Raises UsageError if they cannot connect."""
        assert self.size == 1, "an engine has counters of its own"
        return Counters()

    def barrier(self) -> None:
        """Wait for all ranks."""
        self.allreduce_async(torch.zeros(1, dtype=torch.int64), "barrier").wait()

    def start_timeline(self, path: Path) -> None:
        """Start to write a timeline of the group's operations to `path`, on rank 0, if the engine can trace them."""

    def stop_timeline(self) -> None:
        """Stop writing the timeline."""

    def use_device(self, device: torch.device) -> None:
        """Compute on `device`, chosen once: all ranks that have met call this before they sum tensors on it."""

    def note_work(self) -> None:
        """Report progress: a rank hangs if it does not report again, rest or wait for others in time."""

    def note_rest(self) -> None:
        """Report that what follows may take any time, until the next `note_work`."""

    def note_state(self) -> None:
        """Report that the run can continue from this rank's state."""

    def note_working_group(self) -> None:
        """Report as `note_state` does, and that this generation works: it begins the run, or has made an update."""

    def rendezvous(self, why: str, on_begin: Callable[[Generation], None] = lambda generation: None) -> Generation:
        """Leave this generation, wait for the next one, switch this object to it and return it.

        `why`: what broke this generation; empty if all ranks meet by agreement. `on_begin` is called with the next one
        before its ranks connect. Raises GroupBrokenError if that generation breaks meanwhile, too; RankLostError if the
        run cannot continue.
        """
        raise RankLostError("this launch is not elastic")

    def close(self, error: BaseException | None = None) -> None:
        """Leave the group, in order or because of an `error` of this rank."""


class SingleProcess(Communicator):
    """The only rank."""


class MpiCommunicator(Communicator):
    """The ranks over MPI by mpi4py, for CPU tensors: for work that they share without training."""

    def __init__(self, communicator: Comm, local: Comm) -> None:
        self.backend = "mpi4py"
        self.has_nccl = False
        self._communicator = communicator
        self.rank = communicator.Get_rank()
        self.size = communicator.Get_size()
        self.local_rank = local.Get_rank()
        self.local_size = local.Get_size()

    def allreduce_async(self, tensor: torch.Tensor, name: str) -> Pending:
        from mpi4py import MPI

        self._communicator.Allreduce(MPI.IN_PLACE, tensor.numpy())
        return Pending()

    def broadcast(self, tensor: torch.Tensor, name: str, root: int = 0) -> None:
        self._communicator.Bcast(tensor.numpy(), root=root)


def signed_digest(content: bytes) -> int:
    """Return a digest of `content` as a signed 64-bit integer, which `gather` accepts."""
    return int.from_bytes(hashlib.blake2b(content, digest_size=8).digest(), "little", signed=True)


def gather(comm: Communicator, values: Sequence[int], name: str) -> list[list[int]]:
    """Return every rank's `values` (64-bit integers, the same number on each), by rank."""
    slots = torch.zeros(comm.size, len(values), dtype=torch.int64)
    slots[comm.rank] = torch.tensor(values, dtype=torch.int64)
    comm.allreduce_async(slots, name).wait()
    gathered: list[list[int]] = slots.tolist()
    return gathered


def gather_int(comm: Communicator, value: int, name: str) -> list[int]:
    """Return every rank's `value`, by rank."""
    return [each for (each,) in gather(comm, [value], name)]


def gather_str(comm: Communicator, text: str, name: str) -> tuple[str, ...]:
    """Return every rank's `text`, which must not end in NUL, by rank."""
    encoded = text.encode()
    longest = max(gather_int(comm, len(encoded), f"{name}.length"))
    return tuple(bytes(row).rstrip(b"\0").decode() for row in gather(comm, list(encoded.ljust(longest, b"\0")), name))


def broadcast_bytes(comm: Communicator, content: bytes, name: str, root: int = 0) -> bytes:
    """Return the `content` of rank `root`; the other ranks' is ignored."""
    length = torch.tensor([len(content)], dtype=torch.int64)
    comm.broadcast(length, f"{name}.length", root)
    if not length:
        return b""
    place = bytearray(content) if comm.rank == root else bytearray(int(length))
    sent = torch.frombuffer(place, dtype=torch.uint8)
    comm.broadcast(sent, name, root)
    return sent.numpy().tobytes()


def broadcast_str(comm: Communicator, text: str, name: str, root: int = 0) -> str:
    """Return the `text` of rank `root`; the other ranks' is ignored."""
    return broadcast_bytes(comm, text.encode(), name, root).decode()


def broadcast_value(comm: Communicator, value: Result, name: str, root: int = 0) -> Result:
    """Return the `value` of rank `root`; the other ranks' is ignored, but for its type.

    A data class, or numbers, texts and lists and dictionaries of them; tuples become lists, except in a data class.
    """
    text = json.dumps(value, default=asdict) if comm.rank == root else ""
    return TypeAdapter(type(value)).validate_python(json.loads(broadcast_str(comm, text, name, root)))


def run_on_all_ranks(comm: Communicator, action: Callable[[], Result], name: str) -> Result:
    """Return `action()`; if it fails on any rank, the first raises its error and all others PeerFailedError."""
    failure: Exception | None = None
    try:
        result = action()
    except Exception as error:
        failure = error
    codes = gather_int(comm, 0 if failure is None else exit_code_of(failure), name)
    failed = [rank for rank, code in enumerate(codes) if code]
    comm.last_action_failed = bool(failed)
    if failure is not None and failed[0] == comm.rank:
        raise failure
    if failed:
        ranks = ", ".join(map(str, failed))
        raise PeerFailedError(f"rank {ranks} could not {name}; see its message", ExitCode(codes[failed[0]]))
    return result


def await_on_all_ranks(comm: Communicator, attempt: Callable[[], bool], name: str) -> None:
    """Call `attempt` on all ranks, again until it returns true on each of them; errors are those of `run_on_all_ranks`.

    For what may take longer than an engine lets ranks wait for each other.
    """
    while not all(gather_int(comm, run_on_all_ranks(comm, attempt, name), f"{name}: done")):
        pass


def run_long_on_all_ranks(comm: Communicator, action: Callable[[], Result], name: str) -> Result:
    """Do what `run_on_all_ranks` does, for an `action` that may take longer than an engine lets ranks wait.

    A thread talks to the other ranks meanwhile: an action of the user's code may need to stay in its own.
    """
    if comm.size == 1 or comm.is_joining:  # which does not hear the others yet
        return action()
    future: Future[Result] = Future()
    with ThreadPoolExecutor(max_workers=1) as thread:
        others = thread.submit(await_on_all_ranks, comm, lambda: bool(wait([future], _POLL_SECONDS).done), name)
        try:
            future.set_result(action())
        except BaseException as error:
            future.set_exception(error)
        others.result()
    return run_on_all_ranks(comm, future.result, name)
