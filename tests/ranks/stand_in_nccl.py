"""A stand-in for NCCL, by which ranks on CPUs behave like ranks on GPUs.

It is as bad as NCCL may be: an operation with a lost rank neither ends nor fails until the group is aborted; then it
counts as completed, with arbitrary contents of its tensor. As in torch, the first operation waits for all ranks, and
holds a lock meanwhile, for which an abort waits. `stand_in_environment` installs it in all ranks of a launch.
"""

from __future__ import annotations

import os
import signal
import threading
import time
from collections.abc import Callable
from datetime import timedelta
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist

from dist_train.cluster import elastic
from dist_train.cluster.communicator import Pending
from dist_train.cluster.elastic import _CONNECTING_SHARE, DeviceGroup, ElasticCommunicator
from dist_train.cluster.heartbeats import longest_wait
from dist_train.cluster.launch import MEMBERSHIP_VARIABLE

_ON_DEVICE = ("gradient.", "tally", "evaluation", "state.")
"""Prefixes of the names of operations whose tensors would be on a GPU."""
_ROOT = Path(__file__).parents[2]
_ORDERS = "STAND_IN_ORDERS"  # a folder: of a file die-PID there, that process dies before it connects


def stand_in_environment(folder: Path) -> dict[str, str]:
    """Return the environment of a launch whose ranks use the stand-in."""
    lines = ["import os", f"if {MEMBERSHIP_VARIABLE!r} in os.environ:", "    from tests.ranks import stand_in_nccl"]
    (folder / "sitecustomize.py").write_text("\n".join([*lines, "    stand_in_nccl.install()", ""]))
    return {"PYTHONPATH": f"{folder}:{_ROOT}", _ORDERS: str(folder)}


class StandInWork:
    """A started operation."""

    def __init__(self, group: StandInNccl, work: Any, tensor: torch.Tensor) -> None:
        self._group = group
        self._work = work
        self._tensor = tensor
        self.is_done = False

    def is_completed(self) -> bool:
        """Whether the result is there, or the group was aborted."""
        if not self.is_done and self._work.is_completed():
            try:
                self._work.wait()
                self.is_done = True
            except RuntimeError:  # a lost rank, which NCCL would not notice
                return self._group.is_aborted
        return self.is_done or self._group.is_aborted

    def wait(self) -> None:
        """Return at once, since NCCL's only orders streams."""

    def corrupt(self) -> None:
        """Overwrite the tensor of an unfinished operation."""
        if not self.is_done:
            self._tensor.fill_(12345)


class StandInNccl:
    """A process group like NCCL's, over Gloo."""

    def __init__(self, store: dist.Store, rank: int, size: int, timeout: float) -> None:
        self._arguments = store, rank, size
        self._timeout = timeout
        self._lock = threading.Lock()
        self._gloo: Any = None
        self._works: list[StandInWork] = []
        self.is_aborted = False

    def allreduce(self, tensors: list[torch.Tensor]) -> StandInWork:
        """Start a sum; the first connects."""
        with self._lock:
            if self._gloo is None:
                self._connect()
        return self._track(self._gloo.allreduce(tensors), tensors[0])

    def broadcast(self, tensor: torch.Tensor, root: int) -> StandInWork:
        """Start a broadcast."""
        return self._track(self._gloo.broadcast(tensor, root), tensor)

    def abort(self) -> None:
        """End all operations, with a delay; their tensors are overwritten for a while after."""
        with self._lock:
            time.sleep(0.02)
            self.is_aborted = True
        works = [work for work in self._works if not work.is_completed() or not work.is_done]

        def corrupt() -> None:
            for _ in range(20):
                for work in works:
                    work.corrupt()
                time.sleep(0.02)

        threading.Thread(target=corrupt, daemon=True).start()

    def _connect(self) -> None:
        if Path(os.environ[_ORDERS], f"die-{os.getpid()}").exists():
            os.kill(os.getpid(), signal.SIGKILL)
        self._gloo = dist.ProcessGroupGloo(*self._arguments, timedelta(seconds=self._timeout * _CONNECTING_SHARE))
        self._gloo._set_default_timeout(timedelta(seconds=longest_wait(self._timeout)))

    def _track(self, work: Any, tensor: torch.Tensor) -> StandInWork:
        self._works = [each for each in self._works if not each.is_done]
        self._works.append(StandInWork(self, work, tensor))
        return self._works[-1]


def install() -> None:
    """Let this process use the stand-in."""
    original_init, original_start = ElasticCommunicator.__init__, ElasticCommunicator._start

    def init_on_gpus(self: ElasticCommunicator, *, timeout: float, device_type: str) -> None:
        original_init(self, timeout=timeout, device_type="cuda")

    def use_device(self: ElasticCommunicator, device: torch.device) -> None:
        self._device = device
        if not self.is_joining:
            self._connect(device)

    def start_on_gpus(
        self: ElasticCommunicator, tensor: torch.Tensor, operation: Callable[[Any], Any], name: str
    ) -> Pending:
        self._is_on_device = lambda tensor: name.startswith(_ON_DEVICE)  # type: ignore[method-assign]
        return original_start(self, tensor, operation, name)

    ElasticCommunicator.__init__ = init_on_gpus  # type: ignore[method-assign]
    ElasticCommunicator.use_device = use_device  # type: ignore[method-assign]
    ElasticCommunicator._start = start_on_gpus  # type: ignore[method-assign]
    vars(elastic)["abortable_nccl"] = StandInNccl
    original_connect = DeviceGroup.connect

    def connect(self: DeviceGroup, device: torch.device) -> None:
        original_connect(self, device)
        print(f"stand-in for NCCL connected in process {os.getpid()}", flush=True)

    DeviceGroup.connect = connect  # type: ignore[method-assign]
