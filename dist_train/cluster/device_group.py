"""The ranks' group for tensors of GPUs, of one generation: NCCL's, which any thread can abort.

When a rank is lost, NCCL's kernels wait for it for ever, and with them every stream and every thread that waits for
them; within a node NCCL does not even notice. So nobody here waits by a stream for what is not done yet, and once the
generation is over the group is aborted by a thread of its own: its kernels end, whatever stands still because of them
continues, and what it gets is not used.
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

LOOK_SECONDS = 5e-5
"""Between two looks at whether an operation is done: a step waits for at most that much more."""


class DeviceGroup:
    """A group that `connect` makes and `abort` ends; both at most once, in any order, by any thread."""

    def __init__(self, make: Callable[[], Any], end: Callable[[Any], None] = abort_nccl) -> None:
        """`make` returns the process group, `end` aborts it; both may take long."""
        self._make = make
        self._end = end
        self._changing = threading.Lock()
        self._group: Any = None
        self._is_over = False
        self._has_ended = threading.Event()

    @property
    def is_over(self) -> bool:
        """Whether it is being aborted, or was: what is done then need not be right."""
        return self._is_over

    def connect(self, device: torch.device) -> None:
        """Meet the others, each on its own `device`, by a first sum: NCCL connects when it must, and blocks meanwhile.

        Raises:
            RuntimeError: torch's error, or it was aborted.
        """
        made = [self._make()]
        with self._changing:
            is_late = self._is_over
            if not is_late:
                self._group = made.pop()
        if is_late:
            self._end(made.pop())
            raise RuntimeError("the group was aborted while it was made")
        first = torch.zeros(1, device=device)
        work = self.start(lambda group: group.allreduce([first], sum_options()))
        while not work.is_completed():
            time.sleep(LOOK_SECONDS)
        if self._is_over:
            raise RuntimeError("the group was aborted while it connected")
        work.wait()

    def start(self, operation: Callable[[Any], Any]) -> Any:
        """Return the work that `operation` starts with the process group; raise RuntimeError where that is over."""
        group = self._group
        if group is None:
            raise RuntimeError("the group was aborted")
        return operation(group)

    def abort(self) -> None:
        """End it. Returns at once: a thread does it, and says so to `await_end`."""
        with self._changing:
            if self._is_over:
                return
            self._is_over = True
            left, self._group = [self._group], None
        if left[0] is None:
            self._has_ended.set()
            return

        def end() -> None:
            with suppress(RuntimeError):  # it was broken
                self._end(left[0])
            left.clear()
            self._has_ended.set()

        threading.Thread(target=end, name="aborted-group", daemon=True).start()

    def await_end(self, seconds: float) -> bool:
        """Return whether it has ended, after at most so many `seconds`."""
        return self._has_ended.wait(seconds)


def abortable_nccl(store: dist.Store, rank: int, size: int, timeout: timedelta) -> Any:
    """Return a group of NCCL's of which no call blocks for good: an abort by another thread ends it."""
    # Read once a process, at the first use.
    os.environ.setdefault("TORCH_NCCL_NONBLOCKING_TIMEOUT", f"{timeout.total_seconds():.0f}")
    # It ends a process whose watchdog of a group stands still for long, as that of an aborted group may.
    os.environ.setdefault("TORCH_NCCL_ENABLE_MONITORING", "0")
    options = nccl_options(timeout)
    # As torchft has it: else a thread within NCCL, while ranks connect, is out of an abort's reach.
    options.config.blocking = False
    return dist.ProcessGroupNCCL(store, rank, size, options)
