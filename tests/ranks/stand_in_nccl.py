"""Ranks on CPUs that take themselves for ranks on GPUs: a stand-in for NCCL sums what would lie there.

It is as bad as NCCL may be: an operation with a lost rank neither ends nor fails, until the group is aborted; then it
counts as completed, and its tensor holds anything. `environment_of` makes every rank of a launch import this module.
"""

from __future__ import annotations

import os
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
from dist_train.cluster.device_group import DeviceGroup
from dist_train.cluster.elastic import ElasticCommunicator
from dist_train.cluster.membership_server import SLOT_VARIABLE

_ON_DEVICE = ("gradient.", "tally", "evaluation", "state.")
"""How the operations begin of what lies on a GPU where there is one."""
_ROOT = Path(__file__).parents[2]


def environment_of(folder: Path) -> dict[str, str]:
    """Return the environment of a launch whose ranks are to have the stand-in."""
    lines = ["import os", f"if {SLOT_VARIABLE!r} in os.environ:", "    import tests.ranks.stand_in_nccl as it"]
    (folder / "sitecustomize.py").write_text("\n".join([*lines, "    it.stand_in()", ""]))
    return {"PYTHONPATH": f"{folder}:{_ROOT}"}


class StandInWork:
    """Of one operation."""

    def __init__(self, group: StandInNccl, work: Any, tensor: torch.Tensor) -> None:
        self._group = group
        self._work = work
        self._tensor = tensor
        self.is_done = False

    def is_completed(self) -> bool:
        """Whether the sum is there, or the group was aborted."""
        if not self.is_done and self._work.is_completed():
            try:
                self._work.wait()
                self.is_done = True
            except RuntimeError:  # a rank is lost, which NCCL does not notice
                return self._group.is_aborted
        return self.is_done or self._group.is_aborted

    def wait(self) -> None:
        """Return at once, as what only orders streams."""

    def spoil(self) -> None:
        """Leave anything in the tensor of an operation that is not done."""
        if not self.is_done:
            self._tensor.fill_(12345)


class StandInNccl:
    """NCCL's group, over Gloo."""

    def __init__(self, store: dist.Store, rank: int, size: int, timeout: timedelta) -> None:
        self._gloo: Any = dist.ProcessGroupGloo(store, rank, size, timeout)
        self._works: list[StandInWork] = []
        self.is_aborted = False

    def allreduce(self, tensors: list[torch.Tensor], options: Any) -> StandInWork:
        """Start a sum."""
        return self._note(self._gloo.allreduce(tensors, options), tensors[0])

    def broadcast(self, tensors: list[torch.Tensor], options: Any) -> StandInWork:
        """Start a broadcast."""
        return self._note(self._gloo.broadcast(tensors, options), tensors[0])

    def abort(self) -> None:
        """End every operation: not at once, and with anything in the tensors, also a while later."""
        time.sleep(0.02)
        self.is_aborted = True
        works = [work for work in self._works if not work.is_completed() or not work.is_done]

        def spoil() -> None:
            for _ in range(20):
                for work in works:
                    work.spoil()
                time.sleep(0.02)

        threading.Thread(target=spoil, daemon=True).start()

    def _note(self, work: Any, tensor: torch.Tensor) -> StandInWork:
        self._works = [each for each in self._works if not each.is_done]
        self._works.append(StandInWork(self, work, tensor))
        return self._works[-1]


def stand_in() -> None:
    """Give this process the stand-in."""
    begin, start = ElasticCommunicator.__init__, ElasticCommunicator._start

    def begin_on_gpus(self: ElasticCommunicator, *, timeout: float, device_type: str) -> None:
        begin(self, timeout=timeout, device_type="cuda")

    def use_device(self: ElasticCommunicator, device: torch.device) -> None:
        self._device = device
        if not self.is_joining:
            self._connect(device)

    def start_there(
        self: ElasticCommunicator, tensor: torch.Tensor, operation: Callable[[Any], Any], name: str
    ) -> Pending:
        self._is_on_device = lambda tensor: name.startswith(_ON_DEVICE)  # type: ignore[method-assign]
        return start(self, tensor, operation, name)

    ElasticCommunicator.__init__ = begin_on_gpus  # type: ignore[method-assign]
    ElasticCommunicator.use_device = use_device  # type: ignore[method-assign]
    ElasticCommunicator._start = start_there  # type: ignore[method-assign]
    vars(elastic)["abortable_nccl"] = StandInNccl
    made = DeviceGroup.connect

    def connect(self: DeviceGroup, device: torch.device) -> None:
        made(self, device)
        print(f"stand-in for NCCL connected in process {os.getpid()}", flush=True)

    DeviceGroup.connect = connect  # type: ignore[method-assign]
