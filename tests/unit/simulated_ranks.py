"""Several ranks in one process: one thread each, sums and broadcasts between them. For tests without a launcher."""

from __future__ import annotations

import threading
from collections import defaultdict
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import TypeVar

import torch

from dist_train.cluster.communicator import Communicator, Counters, Pending, RankLostError
from tests.waiting import PATIENCE

Result = TypeVar("Result")


@dataclass
class _Operation:
    """What the ranks have brought to one operation, by rank."""

    tensors: dict[int, torch.Tensor] = field(default_factory=dict)


class _LockedCounters(Counters):
    """Counters for several threads."""

    def __init__(self) -> None:
        super().__init__()
        self.lock = threading.Lock()

    def fetch_and_add(self, name: str) -> int:
        """Return the value of the counter `name`, and add 1 to it."""
        with self.lock:
            return super().fetch_and_add(name)


class _Group:
    """What the ranks share."""

    def __init__(self, size: int, backend: str) -> None:
        self.size = size
        self.backend = backend
        self.changed = threading.Condition()
        self.operations: defaultdict[tuple[str, int], _Operation] = defaultdict(_Operation)
        self.counters = _LockedCounters()
        self.lost = False


class _Waiting(Pending):
    def __init__(self, finish: Callable[[], None]) -> None:
        self._finish = finish

    def wait(self) -> None:
        self._finish()


class SimulatedRanks(Communicator):
    """One of the ranks; every rank must call the same operations, in any order of names."""

    def __init__(self, group: _Group, rank: int) -> None:
        self._group = group
        self._calls: defaultdict[str, int] = defaultdict(int)
        self.rank = rank
        self.size = group.size
        self.local_rank = rank
        self.local_size = group.size
        self.backend = group.backend
        self.has_nccl = False
        self.names: list[str] = []
        """The operations that this rank has started, in order."""

    def allreduce_async(self, tensor: torch.Tensor, name: str) -> Pending:
        """Bring `tensor`; `wait` puts the sum in its place, in the order of the ranks."""

        def add(tensors: list[torch.Tensor]) -> torch.Tensor:
            total = tensors[0].clone()
            for other in tensors[1:]:
                total += other
            return total

        return self._start(tensor, name, add)

    def adasum_async(self, tensor: torch.Tensor, name: str) -> Pending:
        """Bring `tensor`; two ranks' are combined as arXiv 2006.02924 says."""

        def combine(tensors: list[torch.Tensor]) -> torch.Tensor:
            if len(tensors) == 1:
                return tensors[0]
            half = len(tensors) // 2
            a, b = combine(tensors[:half]), combine(tensors[half:])
            dot = torch.dot(a, b)
            return (1 - dot / (2 * a.dot(a)).clamp_min(1e-30)) * a + (1 - dot / (2 * b.dot(b)).clamp_min(1e-30)) * b

        return self._start(tensor, name, combine)

    def open_counters(self) -> Counters:
        """Return counters that all ranks share."""
        return self._group.counters

    def broadcast(self, tensor: torch.Tensor, name: str, root: int = 0) -> None:
        """Replace `tensor` by that of rank `root`."""
        known = (torch.uint8, torch.int64, torch.float32, torch.float64)
        assert tensor.dtype in known, "neither Gloo nor Horovod sends every type"
        self._start(tensor, name, lambda tensors: tensors[root]).wait()

    def _start(self, tensor: torch.Tensor, name: str, combine: Callable[[list[torch.Tensor]], torch.Tensor]) -> Pending:
        assert tensor.is_contiguous()
        group = self._group
        self.names.append(name)
        with group.changed:
            operation = group.operations[name, self._calls[name]]
            self._calls[name] += 1
            operation.tensors[self.rank] = tensor.detach().clone()
            group.changed.notify_all()

        def finish() -> None:
            with group.changed:
                group.changed.wait_for(lambda: group.lost or len(operation.tensors) == group.size, timeout=PATIENCE)
                if len(operation.tensors) < group.size:
                    raise RankLostError(f"{name}: only ranks {sorted(operation.tensors)} came")
            with torch.no_grad():
                tensor.copy_(combine([operation.tensors[rank] for rank in range(group.size)]))

        return _Waiting(finish)


def on_ranks(size: int, job: Callable[[SimulatedRanks], Result], *, backend: str = "mpi") -> list[Result | Exception]:
    """Return what `job` returned or raised on each of `size` ranks, each with one thread to compute with."""
    group = _Group(size, backend)
    ended: dict[int, Result | Exception] = {}

    def work(rank: int) -> None:
        torch.set_num_threads(1)
        try:
            ended[rank] = job(SimulatedRanks(group, rank))
        except Exception as error:
            ended[rank] = error
            with group.changed:
                group.lost = True
                group.changed.notify_all()

    threads = [threading.Thread(target=work, args=(rank,), daemon=True) for rank in range(size)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    return [ended[rank] for rank in range(size)]


def results(size: int, job: Callable[[SimulatedRanks], Result], *, backend: str = "mpi") -> list[Result]:
    """Return what `job` returned on each of `size` ranks; raise what the first that failed on its own raised."""
    ended = on_ranks(size, job, backend=backend)
    failed = [value for value in ended if isinstance(value, Exception)]
    for error in sorted(failed, key=lambda error: isinstance(error, RankLostError)):
        raise error
    return [value for value in ended if not isinstance(value, Exception)]
