"""The ranks of an elastic launch over torch.distributed: a group that is thrown away and made anew.

One object for the whole run, whose rank and size change from one generation to the next (`meet`). Within a
generation it is a plain group of Gloo's. What is broken cannot be aborted: it is left to a thread to die, and whatever
it may still write to must not be used again.
"""

from __future__ import annotations

import os
import threading
import time
from collections.abc import Callable
from datetime import timedelta
from queue import Empty, SimpleQueue
from typing import Any

import torch
import torch.distributed as dist

from dist_train.cluster.communicator import Communicator, Generation, GroupBrokenError, Pending
from dist_train.cluster.member import Member
from dist_train.cluster.torch_engine import refuse_adasum
from dist_train.outcome import UsageError

_SLICE = timedelta(milliseconds=100)
"""Between two looks, while an operation is waited for, at whether the generation is over: torch's error at the end of
each costs milliseconds, so that most operations must be done before.
"""
_STORE_TIMEOUT = timedelta(seconds=60)


class ElasticCommunicator(Communicator):
    """The ranks of the present generation."""

    controller = "torch-gloo"
    has_nccl = False
    is_elastic = True

    def __init__(self, *, timeout: float, device_type: str) -> None:
        """Connect to the authority, and meet the others; a process that joins a run under way meets them later.

        Raises:
            UsageError: the ranks compute on GPUs.
            RankLostError: the authority does not answer, or a rank was lost meanwhile.
        """
        if device_type != "cpu":
            raise UsageError(
                "ranks that compute on GPUs cannot come and go yet: start without --min-ranks and --restarts; a lost "
                "rank then ends the launch, and the same command resumes",
                code="elastic-on-gpus",
            )
        # Longer than anything that is merely slow, as without elasticity.
        self._patience = timedelta(seconds=max(60.0, 3 * timeout))
        self._member = Member(timeout)
        self._store = dist.TCPStore(
            self._member.address, 0, is_master=True, wait_for_workers=False, timeout=_STORE_TIMEOUT
        )
        self._group: Any = None
        self.generation = 0
        self.is_joining = self._member.joins
        if self.is_joining:
            # As one of two whose other says nothing: it gets ready without the others.
            self.rank, self.size = 1, 2
        else:
            self.meet("")

    @property
    def wants_meeting(self) -> bool:
        """Whether ranks wait to be let in, as far as this rank knows."""
        return self._member.wants_meeting

    def begin_training(self) -> None:
        """Let the run be continued from this rank's state, from now on."""
        self._member.trains()

    def meet(self, why: str) -> Generation:
        """Stop work, and return in the next generation, of which this object is now.

        `why` is empty where nothing is broken and all ranks come.

        Raises:
            GroupBrokenError: it is already over again.
            RankLostError: the run cannot continue.
        """
        self._let_die()
        begun = self._member.await_generation(self._store.port, why)
        self.is_joining = False
        self.generation, self.rank, self.size = begun.generation, begun.rank, begun.size
        self.local_rank = begun.nodes[: begun.rank].count(begun.nodes[begun.rank])
        self.local_size = begun.nodes.count(begun.nodes[begun.rank])
        if begun.size > 1:
            self._group = self._form(begun)
        return begun

    def allreduce_async(self, tensor: torch.Tensor, name: str) -> Pending:
        """Start to replace the contiguous `tensor` by its sum over all ranks."""
        options = dist.AllreduceOptions()
        options.reduceOp = dist.ReduceOp(dist.ReduceOp.SUM)
        return self._start(lambda: self._group.allreduce([tensor], options), name)

    def adasum_async(self, tensor: torch.Tensor, name: str) -> Pending:
        """Raise UsageError: torch.distributed has no Adasum."""
        raise refuse_adasum()

    def broadcast(self, tensor: torch.Tensor, name: str, root: int = 0) -> None:
        """Replace `tensor` by that of rank `root`."""
        options = dist.BroadcastOptions()
        options.rootRank = root
        self._start(lambda: self._group.broadcast([tensor], options), name).wait()

    def close(self, error: BaseException | None = None) -> None:
        """Leave; after an `error` of this rank alone the others continue without it."""
        self._member.leave("" if error is None else " ".join(f"failed: {error}".split()))

    def check(self) -> None:
        """Raise GroupBrokenError where this generation is over."""
        if interruption := self._member.interruption:
            raise GroupBrokenError(interruption)

    def _start(self, operation: Callable[[], Any], name: str) -> Pending:
        self.check()
        if self._group is None:
            return Pending()
        try:
            work = operation()
        except RuntimeError as error:
            raise _broken(name, error) from error
        return _Work(self, work, name, time.monotonic() + self._patience.total_seconds())

    def _form(self, begun: Generation) -> Any:
        """Return the group of `begun`; made by a thread, which is left behind where a rank is lost meanwhile."""
        made: SimpleQueue[Any] = SimpleQueue()

        def make() -> None:
            try:
                store = self._store
                if begun.rank != 0:
                    store = dist.TCPStore(*begun.store, is_master=False, timeout=_STORE_TIMEOUT)
                prefixed = dist.PrefixStore(f"generation.{begun.generation}", store)
                made.put(dist.ProcessGroupGloo(prefixed, begun.rank, begun.size, self._options()))
            except RuntimeError as error:
                made.put(error)

        threading.Thread(target=make, name=f"generation-{begun.generation}", daemon=True).start()
        while True:
            try:
                group = made.get(timeout=_SLICE.total_seconds())
            except Empty:
                self.check()
                continue
            if isinstance(group, RuntimeError):
                raise _broken("meeting", group) from group
            return group

    def _options(self) -> Any:
        """Return Gloo's options: it listens where the others reach this node, not where the node's own name leads."""
        options = dist.ProcessGroupGloo._Options()  # type: ignore[attr-defined]  # in no stub
        options._timeout = self._patience
        interface = os.environ.get("GLOO_SOCKET_IFNAME", "")
        place = {"interface": interface.split(",")[0]} if interface else {"hostname": self._member.address}
        options._devices = [dist.ProcessGroupGloo.create_device(**place)]
        return options

    def _let_die(self) -> None:
        """Let go of the group. With an operation under way that takes as long as the group's own timeout."""
        if self._group is not None:
            left, self._group = [self._group], None
            threading.Thread(target=left.clear, name="broken-group", daemon=True).start()


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


def _broken(name: str, error: BaseException) -> GroupBrokenError:
    return GroupBrokenError(f"{name}: {' '.join(str(error).split())}")
