"""The ranks of an elastic launch over torch.distributed: a group that is thrown away and made anew.

One object for the whole run, whose rank and size change from one generation to the next (`meet`). Within a
generation it is a plain group of Gloo's, with one of NCCL's beside it where ranks compute on GPUs. What is broken of
Gloo's cannot be aborted: it is left to a thread to die; NCCL's must be aborted (`device_group.py`). Whatever either may
still write to must not be used again.
"""

from __future__ import annotations

import os
import sys
import threading
import time
from collections.abc import Callable
from contextlib import suppress
from datetime import timedelta
from queue import Empty, SimpleQueue
from typing import Any, TypeVar

import torch
import torch.distributed as dist

from dist_train.cluster.communicator import Communicator, Generation, GroupBrokenError, Pending
from dist_train.cluster.device_group import LOOK_SECONDS, DeviceGroup, abortable_nccl
from dist_train.cluster.devices import check_own_gpu
from dist_train.cluster.joining import end_process
from dist_train.cluster.member import Member
from dist_train.cluster.torch_engine import refuse_adasum, sum_options

Made = TypeVar("Made")

_SLICE = timedelta(milliseconds=100)
"""Between two looks, while an operation is waited for, at whether the generation is over: torch's error at the end of
each costs milliseconds, so that most operations must be done before.
"""
_STORE_TIMEOUT = timedelta(seconds=60)
_ABORT_SHARE = 0.5
"""Of `comm.timeout`: so long an aborted group may take to end. Who has not stopped within all of it is expelled."""
_STAY_SECONDS = 5.0
"""So long a rank that ends stays for its group to end."""


class ElasticCommunicator(Communicator):
    """The ranks of the present generation."""

    is_elastic = True

    def __init__(self, *, timeout: float, device_type: str) -> None:
        """Connect to the authority, and meet the others; a process that joins a run under way meets them later.

        `timeout` is in seconds, `device_type` cpu or cuda.

        Raises:
            RankLostError: the authority does not answer, or a rank was lost meanwhile.
        """
        self.has_nccl = device_type == "cuda"
        self.controller = "torch-nccl" if self.has_nccl else "torch-gloo"
        self._timeout = timeout
        # Longer than anything that is merely slow, as without elasticity.
        self._patience = timedelta(seconds=max(60.0, 3 * timeout))
        self._member = Member(timeout)
        self._store = dist.TCPStore(
            self._member.address, 0, is_master=True, wait_for_workers=False, timeout=_STORE_TIMEOUT
        )
        self._group: Any = None
        self._place: dist.Store | None = None
        """Where the ranks of the present generation meet."""
        self._device: torch.device | None = None
        """This rank's GPU."""
        self._device_group: DeviceGroup | None = None
        self._member.on_break = self._abort_device_group
        self.generation = 0
        self.is_joining = self._member.joins
        if self.is_joining:
            # As one of two whose other says nothing: it gets ready without the others.
            self.rank, self.size = 1, 2
            # It has the GPU of the process that it takes the place of.
            self.local_rank = int(os.environ.get("LOCAL_RANK", "0"))
        else:
            self.meet("")

    @property
    def wants_meeting(self) -> bool:
        """Whether ranks wait to be let in, as far as this rank knows."""
        return self._member.wants_meeting

    def note_work(self) -> None:
        """Say that this rank works on; if it does not say more within `comm.timeout`, it is expelled."""
        self._member.pulse.move()

    def note_rest(self) -> None:
        """Say that what this rank does from now on may take as long as it takes."""
        self._member.pulse.rest()

    def begin_training(self) -> None:
        """Let the run be continued from this rank's state, from now on."""
        self._member.trains()

    def meet(self, why: str) -> Generation:
        """Stop work, and return in the next generation, of which this object is now.

        `why` is empty where nothing is broken and all ranks come.

        Raises:
            GroupBrokenError: it is already over again.
            RankLostError: the run cannot continue.
            UsageError: this rank joins, and its GPU is another's.
        """
        if not why and self._device_group is not None:
            # Who aborts first frees memory that another's kernel may still read.
            with suppress(GroupBrokenError):
                self.barrier()
        self._let_die()
        begun = self._member.await_generation(self._store.port, why)
        self.is_joining = False
        self.generation, self.rank, self.size = begun.generation, begun.rank, begun.size
        self.local_rank = begun.nodes[: begun.rank].count(begun.nodes[begun.rank])
        self.local_size = begun.nodes.count(begun.nodes[begun.rank])
        if begun.size > 1:
            self._group, self._place = self._watched(lambda: self._form(begun), "meeting")
        if self._device is not None:
            self._connect(self._device)
        return begun

    def use_device(self, device: torch.device) -> None:
        """Compute on `device` from now on, in later generations too."""
        if device.type == "cuda":
            self._device = device
            if not self.is_joining:
                self._connect(device)

    def allreduce_async(self, tensor: torch.Tensor, name: str) -> Pending:
        """Start to replace the contiguous `tensor` by its sum over all ranks."""
        return self._start(tensor, lambda group: group.allreduce([tensor], sum_options()), name)

    def adasum_async(self, tensor: torch.Tensor, name: str) -> Pending:
        """Raise UsageError: torch.distributed has no Adasum."""
        raise refuse_adasum()

    def broadcast(self, tensor: torch.Tensor, name: str, root: int = 0) -> None:
        """Replace `tensor` by that of rank `root`."""
        options = dist.BroadcastOptions()
        options.rootRank = root
        self._start(tensor, lambda group: group.broadcast([tensor], options), name).wait()

    def close(self, error: BaseException | None = None) -> None:
        """Leave; after an `error` of this rank alone the others continue without it."""
        self._member.leave("" if error is None else " ".join(f"failed: {error}".split()))
        self._abort_device_group()
        if self._device_group is not None:
            self._device_group.await_end(_STAY_SECONDS)

    def check(self) -> None:
        """Raise GroupBrokenError where this generation is over. Who looks does not hang."""
        self._member.pulse.move_within()
        if interruption := self._member.interruption:
            raise GroupBrokenError(interruption)

    def _start(self, tensor: torch.Tensor, operation: Callable[[Any], Any], name: str) -> Pending:
        self.check()
        if self._group is None:
            return Pending()
        deadline = time.monotonic() + self._patience.total_seconds()
        on_device = self._device_group if self._is_on_device(tensor) else None
        try:
            if on_device is not None:
                return _DeviceWork(self, on_device, on_device.start(operation), name, deadline)
            return _Work(self, operation(self._group), name, deadline)
        except RuntimeError as error:
            raise _broken(name, error) from error

    def _is_on_device(self, tensor: torch.Tensor) -> bool:
        return tensor.is_cuda

    def _form(self, begun: Generation) -> tuple[Any, dist.Store]:
        """Return Gloo's group of `begun`, and the store that it has met through."""
        store = self._store
        if begun.rank != 0:
            store = dist.TCPStore(*begun.store, is_master=False, timeout=_STORE_TIMEOUT)
        place = dist.PrefixStore(f"generation.{begun.generation}", store)
        return dist.ProcessGroupGloo(place, begun.rank, begun.size, self._options()), place

    def _connect(self, device: torch.device) -> None:
        """Make the group for tensors of the ranks' GPUs, of which `device` is this rank's."""
        if self._place is None:
            return
        check_own_gpu(self, device)
        store, rank, size = dist.PrefixStore("device", self._place), self.rank, self.size
        made = DeviceGroup(lambda: abortable_nccl(store, rank, size, self._patience))
        self._device_group = made
        self._watched(lambda: made.connect(device), "connecting GPUs")

    def _watched(self, make: Callable[[], Made], name: str) -> Made:
        """Return what `make` returns; a thread calls it, which is left behind where a rank is lost meanwhile."""
        made: SimpleQueue[Made | Exception] = SimpleQueue()

        def run() -> None:
            try:
                made.put(make())
            except Exception as error:
                made.put(error)

        threading.Thread(target=run, name=f"generation-{self.generation}", daemon=True).start()
        while True:
            try:
                found = made.get(timeout=_SLICE.total_seconds())
            except Empty:
                self.check()
                continue
            if isinstance(found, RuntimeError):
                raise _broken(name, found) from found
            if isinstance(found, Exception):
                raise found
            return found

    def _options(self) -> Any:
        """Return Gloo's options: it listens where the others reach this node, not where the node's own name leads."""
        options = dist.ProcessGroupGloo._Options()  # type: ignore[attr-defined]  # in no stub
        options._timeout = self._patience
        interface = os.environ.get("GLOO_SOCKET_IFNAME", "")
        place = {"interface": interface.split(",")[0]} if interface else {"hostname": self._member.address}
        options._devices = [dist.ProcessGroupGloo.create_device(**place)]
        return options

    def _let_die(self) -> None:
        """Let go of the groups. Gloo's, with an operation under way, takes as long to die as its own timeout."""
        self._place = None
        if self._group is not None:
            left, self._group = [self._group], None
            threading.Thread(target=left.clear, name="broken-group", daemon=True).start()
        self._abort_device_group()
        if self._device_group is not None and not self._device_group.await_end(self._timeout * _ABORT_SHARE):
            self._give_up("NCCL does not let go of its GPU")
        self._device_group = None

    def _abort_device_group(self) -> None:
        """Abort NCCL's group, if there is one: in any thread, which does not wait for it."""
        group = self._device_group
        if group is not None:
            group.abort()

    def _give_up(self, why: str) -> None:
        """End this process, whose GPU may hang: the others continue without it."""
        print(f"dist-train: {why}; this rank ends [rank-lost]", file=sys.stderr, flush=True)
        self._member.leave(f"failed: {why}")
        end_process()


class _Work(Pending):
    def __init__(self, comm: ElasticCommunicator, work: Any, name: str, deadline: float) -> None:
        self._comm = comm
        self._work = work
        self._name = name
        self._deadline = deadline

    def wait(self) -> None:
        """Return when the result is there; raise GroupBrokenError where it never will be."""
        while not self._is_done_within_slice():
            self._comm.check()
            if time.monotonic() > self._deadline:
                raise GroupBrokenError(f"{self._name}: a rank does not come")

    def _is_done_within_slice(self) -> bool:
        try:
            self._work.wait(_SLICE)
            return True
        except RuntimeError:  # of the work, or since the time is over
            if not self._work.is_completed():
                return False
        try:
            self._work.wait()
            return True
        except RuntimeError as error:
            raise _broken(self._name, error) from error


class _DeviceWork(Pending):
    def __init__(self, comm: ElasticCommunicator, group: DeviceGroup, work: Any, name: str, deadline: float) -> None:
        self._comm = comm
        self._group = group
        self._work = work
        self._name = name
        self._deadline = deadline

    def wait(self) -> None:
        """Return when the result is there, which no stream waits for before; else raise GroupBrokenError."""
        while not self._is_completed():
            self._comm.check()
            if time.monotonic() > self._deadline:
                raise GroupBrokenError(f"{self._name}: a rank does not come")
            time.sleep(LOOK_SECONDS)
        # What was aborted is completed, too. An abort that begins only now has spoilt nothing.
        if self._group.is_over:
            self._comm.check()
            raise GroupBrokenError(f"{self._name}: the group was aborted")
        try:
            self._work.wait()
        except RuntimeError as error:
            raise _broken(self._name, error) from error

    def _is_completed(self) -> bool:
        try:
            return bool(self._work.is_completed())
        except RuntimeError as error:
            raise _broken(self._name, error) from error


def _broken(name: str, error: BaseException) -> GroupBrokenError:
    return GroupBrokenError(f"{name}: {' '.join(str(error).split())}")
