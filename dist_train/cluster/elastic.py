"""The ranks of an elastic launch over torch.distributed: each generation of ranks has its own process groups.

One object serves the whole run; its rank and size change from one generation to the next (`rendezvous`). A generation
has a Gloo group, and an NCCL group beside it if the ranks compute on GPUs. A broken Gloo group cannot be aborted: a
thread destroys it, however long that takes.

A broken NCCL group must be aborted: its kernels wait for a lost rank for ever, and so does every stream and thread that
waits for them; within a node NCCL does not even notice. So no stream here waits for an operation that is not done, and
once the generation is over, a separate thread aborts the group: its kernels end, everything that waited for them
continues, and the results are discarded. Memory that a broken group may still write to must not be used again.
"""

from __future__ import annotations

import os
import threading
import time
from collections.abc import Callable
from concurrent.futures import Future, wait
from contextlib import suppress
from dataclasses import dataclass
from datetime import timedelta
from functools import partial
from typing import Any

import torch
import torch.distributed as dist

from dist_train.cluster.communicator import Counters, Generation, GroupBrokenError, Pending, Result, naming_lost_ranks
from dist_train.cluster.devices import FIRST_SUMS, check_own_gpu
from dist_train.cluster.heartbeats import longest_wait
from dist_train.cluster.member import Member
from dist_train.cluster.rendezvous import end_process
from dist_train.cluster.torch_engine import (
    CLOSE_SECONDS,
    DEVICE_POLL_SECONDS,
    StoreCounters,
    TorchOperations,
    abort_in_thread,
    gloo_options,
    nccl_options,
)
from dist_train.outcome import say_on_stderr, shortened

_POLL_INTERVAL = timedelta(milliseconds=100)  # between checks of a waiting operation, of ms each
_STORE_TIMEOUT = timedelta(seconds=60)
# Parts of `comm.timeout`; after all of it, a rank is expelled.
_CONNECTING_SHARE = 0.5  # that one call of NCCL may take: torch holds a lock meanwhile, for which an abort waits
_ABORT_SHARE = 0.75  # that aborting NCCL may take

_naming_breaks = partial(naming_lost_ranks, kind=GroupBrokenError, opening="")


class ElasticCommunicator(TorchOperations):
    """The ranks of the current generation."""

    is_elastic = True

    def __init__(self, *, timeout: float, device_type: str) -> None:
        """Connect to the coordinator and meet the others; who joins a run meets them later. Raises RankLostError."""
        self.has_nccl = device_type == "cuda"
        self.backend = "torch-nccl" if self.has_nccl else "torch-gloo"
        self._timeout = timeout
        self._operation_timeout = timedelta(seconds=longest_wait(timeout))
        self._member = Member(timeout)
        self._store = dist.TCPStore(
            self._member.address, 0, is_master=True, wait_for_workers=False, timeout=_STORE_TIMEOUT
        )
        self._group: Any = None
        self._group_store: dist.Store | None = None  # where the ranks of the current generation meet
        self._device: torch.device | None = None  # this rank's GPU
        self._device_group: DeviceGroup | None = None
        self._member.on_break = self._abort_device_group
        self.generation = 0
        self.is_joining = self._member.joins
        if self.is_joining:
            # Until it meets the others, it prepares as rank 1 of 2, whose sums are its own values.
            self.rank, self.size = 1, 2
            # It gets the GPU of the process that it replaces.
            self.local_rank = int(os.environ.get("LOCAL_RANK", "0"))
        else:
            self.rendezvous("")

    @property
    def most_ranks(self) -> int:
        return self._member.most_ranks

    @property
    def wants_rendezvous(self) -> bool:
        return self._member.wants_rendezvous

    def note_work(self) -> None:
        self._member.pulse.move()

    def note_rest(self) -> None:
        self._member.pulse.rest()

    def note_state(self) -> None:
        self._member.report_state(works=False)

    def note_working_group(self) -> None:
        self._member.report_state(works=True)

    def rendezvous(self, why: str, on_begin: Callable[[Generation], None] = lambda generation: None) -> Generation:
        """Switch to the next generation; raise UsageError if this rank joins, and another rank has its GPU."""
        if not why and self._device_group is not None:
            # The first abort frees memory that another rank's kernel may still read.
            with suppress(GroupBrokenError):
                self.barrier()
        self._discard_groups()
        new = self._member.await_generation(self._store.port, why)
        self.is_joining = False
        self.generation, self.rank, self.size = new.generation, new.rank, new.size
        self.local_rank = new.nodes[: new.rank].count(new.nodes[new.rank])
        self.local_size = new.nodes.count(new.nodes[new.rank])
        on_begin(new)
        if new.size > 1:
            self._group, self._group_store = self.run_while_whole(lambda: self._make_gloo(new), "meeting")
        if self._device is not None:
            self._connect(self._device)
        return new

    def use_device(self, device: torch.device) -> None:
        """Compute on `device` from now on, in later generations too."""
        if device.type == "cuda":
            self._device = device
            if not self.is_joining:
                self._connect(device)

    def open_counters(self) -> Counters:
        """Return counters that all ranks of the current generation share."""
        # The rank that is lost may be the server of the store.
        return Counters() if self._group_store is None else StoreCounters(self._group_store, self.run_while_whole)

    def close(self, error: BaseException | None = None) -> None:
        """Leave; the others continue without this rank if the `error` is its own."""
        self._member.leave("" if error is None else f"failed: {shortened(str(error) or type(error).__name__)}")
        self._abort_device_group()
        if self._device_group is not None:
            self._device_group.await_end(CLOSE_SECONDS)

    def check(self) -> None:
        """Raise GroupBrokenError if this generation is over. A call also counts as progress of this rank."""
        self._member.pulse.move_within()
        if self._member.interruption:
            raise GroupBrokenError(self._member.interruption)

    def _start(self, tensor: torch.Tensor, operation: Callable[[Any], Any], name: str) -> Pending:
        self.check()
        if self._group is None:
            return Pending()
        deadline = time.monotonic() + self._operation_timeout.total_seconds()
        device_group = self._device_group if self._is_on_device(tensor) else None
        with _naming_breaks(name):
            work = operation(self._group) if device_group is None else device_group.start(operation)
        return _Work(self, work, name, deadline, device_group)

    def _is_on_device(self, tensor: torch.Tensor) -> bool:
        return tensor.is_cuda

    def _make_gloo(self, new: Generation) -> tuple[Any, dist.Store]:
        store = self._store
        if new.rank != 0:
            store = dist.TCPStore(*new.store, is_master=False, timeout=_STORE_TIMEOUT)
        group_store = dist.PrefixStore(f"generation.{new.generation}", store)
        # where the others reach this node, whatever its own name resolves to
        options = gloo_options(self._operation_timeout, self._member.address)
        return dist.ProcessGroupGloo(group_store, new.rank, new.size, options), group_store

    def _connect(self, device: torch.device) -> None:
        if self._group_store is None:
            return
        check_own_gpu(self, device)
        store, rank, size = dist.PrefixStore("device", self._group_store), self.rank, self.size
        group = DeviceGroup(lambda: abortable_nccl(store, rank, size, self._timeout))
        self._device_group = group
        self.run_while_whole(lambda: group.connect(device), "connecting GPUs within half of comm.timeout")

    def run_while_whole(self, function: Callable[[], Result], name: str) -> Result:
        """Return `function()`, called in a thread that is abandoned if a rank is lost meanwhile."""
        self.check()
        future: Future[Result] = Future()

        def run() -> None:
            try:
                future.set_result(function())
            except Exception as error:
                # Without its frames, which hold the process group: with this future it is a reference cycle, which
                # would keep the group beyond its abort.
                future.set_exception(error.with_traceback(None))

        threading.Thread(target=run, name=f"generation-{self.generation}", daemon=True).start()
        while not wait([future], _POLL_INTERVAL.total_seconds()).done:
            self.check()
        with _naming_breaks(name):
            return future.result()

    def _discard_groups(self) -> None:
        """Discard the groups. A thread destroys Gloo's: with an operation in flight that takes up to its timeout."""
        self._group_store = None
        if self._group is not None:
            discarded, self._group = [self._group], None
            threading.Thread(target=discarded.clear, name="broken-group", daemon=True).start()
        self._abort_device_group()
        if self._device_group is not None and not self._device_group.await_end(self._timeout * _ABORT_SHARE):
            # The GPU may hang: the others continue without this rank.
            why = "NCCL does not let go of its GPU"
            say_on_stderr(f"dist-train: {why}; this rank ends [rank-lost]")
            self._member.leave(f"failed: {why}")
            end_process()
        self._device_group = None

    def _abort_device_group(self) -> None:
        """Start to abort the NCCL group, if there is one. From any thread; does not wait."""
        if (group := self._device_group) is not None:
            group.abort()


@dataclass
class _Work(Pending):
    """An operation on CPU tensors or, with their `group`, on those of GPUs."""

    comm: ElasticCommunicator
    work: Any
    name: str
    deadline: float
    group: DeviceGroup | None

    def wait(self) -> None:
        """Return once the result is there, for which no GPU's stream waits earlier; else raise GroupBrokenError."""
        while not self._has_ended():
            self.comm.check()
            if time.monotonic() > self.deadline:
                raise GroupBrokenError(f"{self.name}: a rank does not come")
        # Aborted operations count as completed, too. An abort that begins only now cannot affect this one.
        if self.group is not None and self.group.is_over:
            self.comm.check()
            raise GroupBrokenError(f"{self.name}: the group was aborted")
        with _naming_breaks(self.name):
            self.work.wait()

    def _has_ended(self) -> bool:
        """Whether the operation has ended; waits a moment if it has not."""
        if self.group is None:
            with suppress(RuntimeError):  # the operation failed, or the interval is over
                self.work.wait(_POLL_INTERVAL)
                return True
        with _naming_breaks(self.name):
            has_ended = bool(self.work.is_completed())
        if self.group is not None and not has_ended:
            time.sleep(DEVICE_POLL_SECONDS)
        return has_ended


class DeviceGroup:
    """A group that `connect` makes and `abort` ends; each at most once, in any order, from any thread."""

    def __init__(self, make: Callable[[], Any]) -> None:
        """`make` returns the process group, and may take long."""
        self._make = make
        self._lock = threading.Lock()
        self._group: Any = None
        self.is_over = False  # whether an abort has begun: what completes after that may have a wrong result
        self._is_aborted = threading.Event()

    def connect(self, device: torch.device) -> None:
        """Connect the ranks, each on its own `device`, by `FIRST_SUMS`: NCCL connects lazily, and blocks while it does.

        Raises RuntimeError, from torch or because the group was aborted.
        """
        made = [self._make()]  # in a list, so that no local variable keeps an aborted group alive
        with self._lock:
            is_late = self.is_over
            if not is_late:
                self._group = made.pop()
        if is_late:
            made.pop().abort()
            raise RuntimeError("the group was aborted while it was made")
        # What training in an earlier generation has left in torch's cache, NCCL cannot use.
        torch.cuda.empty_cache()
        for count in FIRST_SUMS:
            self._sum(torch.zeros(count, dtype=torch.int64, device=device))

    def _sum(self, tensor: torch.Tensor) -> None:
        work = self.start(lambda group: group.allreduce([tensor]))
        while not work.is_completed():
            time.sleep(DEVICE_POLL_SECONDS)
        if self.is_over:
            raise RuntimeError("the group was aborted while it connected")
        work.wait()

    def start(self, operation: Callable[[Any], Any]) -> Any:
        """Return the work that `operation` starts on the process group; raise RuntimeError if that was aborted."""
        group = self._group
        if group is None:
            raise RuntimeError("the group was aborted")
        return operation(group)

    def abort(self) -> None:
        """Abort the group in a thread, and return at once; `await_end` waits for that thread."""
        with self._lock:
            if self.is_over:
                return
            self.is_over = True
            aborted, self._group = [self._group], None
        if aborted[0] is None:
            self._is_aborted.set()
        else:
            abort_in_thread(aborted, self._is_aborted)

    def await_end(self, seconds: float) -> bool:
        """Wait up to `seconds` for the abort to complete, and return whether it has."""
        return self._is_aborted.wait(seconds)


def abortable_nccl(store: dist.Store, rank: int, size: int, timeout: float) -> Any:
    """Return an NCCL group whose calls never block for good: they end, or an abort from another thread ends them.

    `timeout`: `comm.timeout`, in seconds.
    """
    # In whole seconds; torch reads it once per process, at the first use.
    os.environ.setdefault("TORCH_NCCL_NONBLOCKING_TIMEOUT", str(int(timeout * _CONNECTING_SHARE)))
    options = nccl_options(timedelta(seconds=longest_wait(timeout)))
    # As in torchft: otherwise an abort cannot reach a thread that is inside NCCL while ranks connect.
    options.config.blocking = False
    return dist.ProcessGroupNCCL(store, rank, size, options)
