"""The NCCL process group for GPU tensors of one generation, which any thread can abort.

When a rank is lost, NCCL's kernels wait for it for ever, and so does every stream and thread that waits for them;
within a node NCCL does not even notice. So no stream here waits for an operation that is not done, and once the
generation is over, a separate thread aborts the group: its kernels end, everything that waited for them continues, and
the results are discarded.
"""

from __future__ import annotations

import os
import threading
import time
from collections.abc import Callable
from contextlib import suppress
from datetime import timedelta
from typing import Any

import torch
import torch.distributed as dist

from dist_train.cluster.torch_engine import abort_nccl, nccl_options, sum_options

POLL_SECONDS = 5e-5  # pause between two checks of whether an operation is done: the longest delay that this adds to it


class DeviceGroup:
    """A group that `connect` makes and `abort` ends; each at most once, in any order, from any thread."""

    def __init__(self, make: Callable[[], Any], end: Callable[[Any], None] = abort_nccl) -> None:
        """`make` returns the process group, `end` aborts it; both may take long."""
        self._make = make
        self._end = end
        self._lock = threading.Lock()
        self._group: Any = None
        self.is_over = False  # whether an abort has begun: what completes after that may have a wrong result
        self._is_aborted = threading.Event()

    def connect(self, device: torch.device) -> None:
        """Connect the ranks, each on its own `device`, by a first sum: NCCL connects lazily, and blocks while it does.

        Raises RuntimeError, from torch or because the group was aborted.
        """
        made = [self._make()]  # in a list, so that no local variable keeps an aborted group alive
        with self._lock:
            is_late = self.is_over
            if not is_late:
                self._group = made.pop()
        if is_late:
            self._end(made.pop())
            raise RuntimeError("the group was aborted while it was made")
        first = torch.zeros(1, device=device)
        work = self.start(lambda group: group.allreduce([first], sum_options()))
        while not work.is_completed():
            time.sleep(POLL_SECONDS)
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
            return

        def end() -> None:
            with suppress(RuntimeError):  # it was broken already
                self._end(aborted[0])
            aborted.clear()
            self._is_aborted.set()

        threading.Thread(target=end, name="aborted-group", daemon=True).start()

    def await_end(self, seconds: float) -> bool:
        """Wait up to `seconds` for the abort to complete, and return whether it has."""
        return self._is_aborted.wait(seconds)


def abortable_nccl(store: dist.Store, rank: int, size: int, timeout: timedelta) -> Any:
    """Return an NCCL group whose calls never block for good: an abort from another thread ends them."""
    # Torch reads it once per process, at the first use.
    os.environ.setdefault("TORCH_NCCL_NONBLOCKING_TIMEOUT", f"{timeout.total_seconds():.0f}")
    # Torch's monitor would kill a process whose NCCL watchdog stalls, as that of an aborted group may.
    os.environ.setdefault("TORCH_NCCL_ENABLE_MONITORING", "0")
    options = nccl_options(timeout)
    # As in torchft: otherwise an abort cannot reach a thread that is inside NCCL while ranks connect.
    options.config.blocking = False
    return dist.ProcessGroupNCCL(store, rank, size, options)
