"""The ranks over torch.distributed: Gloo for CPU tensors, NCCL for GPU tensors.

The process groups are created directly over their own store, without torch's global default group. Unlike Horovod,
torch matches operations by order, not by name: all ranks must start the same operations in the same order, from one
thread. The training step does so by design (`GradientReduction` sends its buckets in order).
"""

from __future__ import annotations

import atexit
import os
import socket
import threading
import time
from abc import ABC, abstractmethod
from collections.abc import Callable, Sequence
from contextlib import suppress
from dataclasses import dataclass
from datetime import timedelta
from functools import cache
from typing import Any

import torch
import torch.distributed as dist

from dist_train.cluster.communicator import (
    Communicator,
    Counters,
    Operation,
    Pending,
    Result,
    broadcast_value,
    gather_int,
    naming_lost_ranks,
    run_on_all_ranks,
    signed_digest,
)
from dist_train.cluster.heartbeats import is_link_local, is_loopback, longest_wait, own_addresses
from dist_train.cluster.launch import Launch, StoreAddress
from dist_train.outcome import FaultError, UsageError, say_on_stderr

_INTERFACE = "GLOO_SOCKET_IFNAME"
_ANSWER_SECONDS = 5.0  # for an address of rank 0 to answer
DEVICE_POLL_SECONDS = 5e-5  # between checks of an operation on a GPU: the longest delay that this adds to it
CLOSE_SECONDS = 5.0  # how long a rank that ends waits for its NCCL group to be aborted
_STORE_TIMEOUT = timedelta(minutes=30)  # ranks that cannot meet give up much earlier (`rendezvous_within`)
_TORCH_WATCHDOGS = (
    "TORCH_NCCL_ASYNC_ERROR_HANDLING",  # its watchdog would end the process before ours has written a message
    "TORCH_NCCL_ENABLE_MONITORING",  # its monitor would, minutes after an operation has timed out, or a watchdog stalls
    "TORCH_NCCL_DUMP_ON_TIMEOUT",  # ranks that join later would find the signal to dump in the store
    "TORCH_NCCL_RETHROW_CUDA_ERRORS",  # its watchdog would end the process at a GPU's error, which our thread gets too
)
"""Variables that let torch's own threads react to NCCL operations that are late or fail."""


def _use_store(function: Callable[[], Result], name: str) -> Result:
    with naming_lost_ranks(name):
        return function()


class StoreCounters(Counters):
    """Counters in a store that one of the ranks serves, whatever that rank computes meanwhile."""

    def __init__(self, store: dist.Store, call: Callable[[Callable[[], Any], str], Any] = _use_store) -> None:
        """`call(function, name)` returns `function()`, or raises RankLostError if the store's server is lost."""
        self._store = dist.PrefixStore("counters", store)
        self._call = call

    def fetch_and_add(self, name: str) -> int:
        return int(self._call(lambda: self._store.add(name, 1), name)) - 1

    def delete(self, name: str) -> None:
        self._call(lambda: self._store.delete_key(name), name)


def open_counters_at_rank_0(comm: Communicator) -> Counters:
    """Return counters that rank 0 serves at a free port, for an engine without a store. All ranks call this.

    Raises UsageError if a rank cannot connect to rank 0.
    """
    served = dist.TCPStore("127.0.0.1", 0, is_master=True, wait_for_workers=False) if comm.rank == 0 else None
    place: list[Any] = [served.port, own_addresses()] if served is not None else []
    port, addresses = broadcast_value(comm, place, "counters.place")
    store = run_on_all_ranks(comm, lambda: served or _connect_to_any(addresses, port), "connect to rank 0")
    return StoreCounters(store)


def _connect_to_any(addresses: Sequence[str], port: int) -> dist.Store:
    """Return the store at `port` of the first of `addresses` that answers. Raises UsageError."""
    for address in addresses:
        with suppress(OSError, RuntimeError):
            # torch's own attempt to connect takes no shorter time than its timeout
            socket.create_connection((address, port), _ANSWER_SECONDS).close()
            return dist.TCPStore(address, port, is_master=False, wait_for_workers=False)
    raise UsageError(
        f"port {port} of rank 0's node does not answer at {', '.join(addresses)}: allow connections between the nodes, "
        f"or set batch.dealing=even",
        code="ranks-cannot-meet",
    )


class TorchOperations(Communicator, ABC):
    """The operations of torch.distributed; a subclass starts them in its process groups."""

    has_counters = True

    def allreduce_async(self, tensor: torch.Tensor, name: str) -> Pending:
        return self._start(tensor, lambda group: group.allreduce([tensor]), name)  # a sum, by default

    def broadcast(self, tensor: torch.Tensor, name: str, root: int = 0) -> None:
        self._start(tensor, lambda group: group.broadcast(tensor, root), name).wait_on_host()

    @abstractmethod
    def _start(self, tensor: torch.Tensor, operation: Callable[[Any], Any], name: str) -> Pending:
        """Start `operation`, given the process group for `tensor`."""


@dataclass(frozen=True, kw_only=True)
class _OnGpu(Operation):
    """An operation of NCCL: a stream waits for it without end, the host `seconds` at most."""

    is_completed: Callable[[], bool]
    seconds: float
    abort: Callable[[], object]
    """Aborts the group, so that streams which wait for it continue, and with them whoever waits for the GPU."""

    def wait_on_host(self) -> None:
        end = time.monotonic() + self.seconds
        with naming_lost_ranks(self.name):
            while not self.is_completed():
                if time.monotonic() > end:
                    self.abort()
                    raise RuntimeError(f"not done within {self.seconds:g} s: a rank does not come, or NCCL hangs")
                time.sleep(DEVICE_POLL_SECONDS)
        self.wait()


class TorchCommunicator(TorchOperations):
    """The launcher's ranks, over torch.distributed."""

    def __init__(self, launch: Launch, *, timeout: float, device_type: str) -> None:
        if launch.store is None:
            raise UsageError(
                f"comm.engine=torch cannot find the other ranks under {launch.launcher}: "
                f"start with dist-train launch, torchrun or srun, or set comm.engine=horovod",
                code="launcher-unsupported",
            )
        self.rank = launch.rank
        self.size = launch.size
        store = _open_store(launch, launch.store)
        # The watchdog, which knows which rank is lost, must time out first.
        self._longest_wait = longest_wait(timeout)
        operation_timeout = timedelta(seconds=self._longest_wait)
        self._device: dist.ProcessGroupNCCL | None = None
        # A rank may be lost while the others meet, and with one of them the store.
        with naming_lost_ranks("meeting"):
            # All ranks may join several times: the keys of an earlier group must not be taken for those of this one.
            group = store.add(f"groups of rank {self.rank}", 1)
            store = self._store = dist.PrefixStore(f"group {group}", store)
            address = _address_for_others(store, launch.store, self.size)
            options = gloo_options(operation_timeout, address) if address else operation_timeout
            self._host: dist.ProcessGroupGloo | None = dist.ProcessGroupGloo(
                dist.PrefixStore("host", store), self.rank, self.size, options
            )
            if device_type == "cuda":
                self._device = dist.ProcessGroupNCCL(
                    dist.PrefixStore("device", store), self.rank, self.size, nccl_options(operation_timeout)
                )
        self.has_nccl = self._device is not None
        self.backend = "torch-nccl" if self.has_nccl else "torch-gloo"
        nodes = gather_int(self, signed_digest(socket.gethostname().encode()), "nodes")
        self.local_rank = nodes[: self.rank].count(nodes[self.rank])
        self.local_size = nodes.count(nodes[self.rank])

    def open_counters(self) -> Counters:
        return StoreCounters(self._store)

    def close(self, error: BaseException | None = None) -> None:
        aborting = self._abort()
        if error is None:
            # Joins Gloo's threads. One that releases a tensor while the interpreter is taken down aborts the process.
            self._host = None
            if aborting is not None:
                aborting.join(CLOSE_SECONDS)  # of NCCL's threads the same holds

    def _abort(self) -> threading.Thread | None:
        """Abort the NCCL group, if there is one; return the thread that ends with the group, None if NCCL hangs."""
        if self._device is None:
            return None
        aborted, self._device = [self._device], None
        is_aborted = threading.Event()
        thread = abort_in_thread(aborted, is_aborted)
        if is_aborted.wait(CLOSE_SECONDS):  # the watchdog, which would end a rank that hangs, may have left already
            return thread
        say_on_stderr("dist-train: NCCL does not let go of its GPU; this rank ends without waiting for it")
        return None

    def _start(self, tensor: torch.Tensor, operation: Callable[[Any], Any], name: str) -> Pending:
        with naming_lost_ranks(name):
            work = operation(self._device if tensor.is_cuda else self._host)
        if tensor.is_cuda:
            seconds = self._longest_wait
            return _OnGpu(work.wait, name, is_completed=work.is_completed, seconds=seconds, abort=self._abort)
        return Operation(work.wait, name)


def abort_in_thread(aborted: list[Any], is_aborted: threading.Event) -> threading.Thread:
    """Abort the NCCL group in the list `aborted`, which holds its only reference, in a thread; then set `is_aborted`.

    NCCL's abort itself may hang. Returns the thread, which ends once the group is gone.
    """

    def end() -> None:
        with suppress(RuntimeError):  # it was broken already
            aborted[0].abort()  # with its kernels; `shutdown` would wait for operations in flight
        is_aborted.set()
        # Not before: the group's end joins torch's watchdog, which may take long if it saw NCCL fail.
        aborted.clear()

    thread = threading.Thread(target=end, name="aborted-group", daemon=True)
    thread.start()
    return thread


def _open_store(launch: Launch, address: StoreAddress) -> dist.Store:
    try:
        store = _serve_store(address) if address.serves else _connect_to(address)
    except RuntimeError as error:
        # The next step of a Slurm job has another port.
        kind = FaultError if launch.launcher == "srun" and "EADDRINUSE" in str(error) else UsageError
        raise kind(
            f"the ranks cannot meet at {address.host}:{address.port}: {' '.join(str(error).split())}. "
            f"Set another address by MASTER_ADDR and MASTER_PORT",
            code="ranks-cannot-meet",
        ) from error
    return dist.PrefixStore(address.prefix, store)


def _connect_to(address: StoreAddress) -> dist.TCPStore:
    return dist.TCPStore(address.host, address.port, is_master=False, timeout=_STORE_TIMEOUT, wait_for_workers=False)


@cache
def _serve_store(address: StoreAddress) -> dist.TCPStore:
    """Serve the launch's store until the process ends, since ranks that join again must find what they left there."""
    atexit.register(_serve_store.cache_clear)  # not while the interpreter is taken down
    return dist.TCPStore(
        address.host,
        address.port,
        is_master=True,
        timeout=_STORE_TIMEOUT,
        wait_for_workers=False,
        master_listen_fd=address.listen_fd,
    )


def gloo_options(timeout: timedelta, address: str) -> Any:
    """Return options by which Gloo listens at `address`, or at the interface of GLOO_SOCKET_IFNAME if it is set."""
    options = dist.ProcessGroupGloo._Options()  # type: ignore[attr-defined]  # in no stub
    options._timeout = timeout
    interface = os.environ.get(_INTERFACE, "")
    place = {"interface": interface.split(",")[0]} if interface else {"hostname": address}
    options._devices = [dist.ProcessGroupGloo.create_device(**place)]
    return options


def _address_for_others(store: dist.Store, place: StoreAddress, size: int) -> str:
    """Return where ranks on other nodes reach this one, if its own name, at which Gloo listens, does not tell them.

    Empty if it does, and if there are no other nodes. All ranks must call this.
    """
    here, there = _route_to(place)
    if here and not is_loopback(here) and here != there:
        # On the store's node the route to it is within the node; the other nodes know its address.
        store.set("store_node", there)
    if store.add("met", 1) == size:
        store.set("all_met", "yes")
    own = _own_address()
    if os.environ.get(_INTERFACE) or not (is_loopback(own) or is_link_local(own)):
        return ""
    if here and not is_loopback(here):
        return here
    store.wait(["all_met"])
    return store.get("store_node").decode() if store.check(["store_node"]) else ""


def _route_to(place: StoreAddress) -> tuple[str, str]:
    """Return our own address on the way to `place`, and that of its node; empty if unknown."""
    for family, kind, protocol, _, address in socket.getaddrinfo(place.host, place.port, type=socket.SOCK_DGRAM):
        with suppress(OSError), socket.socket(family, kind, protocol) as datagrams:
            datagrams.connect(address)  # sends nothing
            return datagrams.getsockname()[0], datagrams.getpeername()[0]
    return "", ""


def _own_address() -> str:
    """Return what this node's own name resolves to; loopback if nothing, as for Gloo."""
    try:
        return str(socket.getaddrinfo(socket.gethostname(), None)[0][4][0])
    except OSError:
        return "127.0.0.1"


def nccl_options(timeout: timedelta) -> Any:
    """Return the options of an NCCL group that leaves the reaction to a lost rank to us."""
    for name in _TORCH_WATCHDOGS:
        os.environ.setdefault(name, "0")
    # torchrun sets it to 1 for every rank, unless the user has set it.
    if "TORCHELASTIC_RUN_ID" in os.environ and os.environ[_TORCH_WATCHDOGS[0]] == "1":
        os.environ[_TORCH_WATCHDOGS[0]] = "0"
    if os.environ["TORCH_NCCL_DUMP_ON_TIMEOUT"] == "0":
        # Otherwise torch's watchdog waits a minute after a failure, for dumps that nobody makes, and holds a lock that
        # this rank needs to start a sum: the others do not wait that long for it.
        os.environ.setdefault("TORCH_NCCL_WAIT_TIMEOUT_DUMP_MILSEC", "0")
    options = dist.ProcessGroupNCCL.Options()
    options._timeout = timeout
    return options
