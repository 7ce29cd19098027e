"""The device that a worker computes on, and how: threads, precision, memory."""

from __future__ import annotations

import os
from contextlib import AbstractContextManager
from dataclasses import dataclass

import torch

from dist_train.config import PrecisionSettings
from dist_train.outcome import UsageError
from dist_train.training.allocator import keep_freed_memory

_PRECISIONS = {"float32": torch.float32, "bfloat16": torch.bfloat16, "float16": torch.float16}


@dataclass(frozen=True)
class Compute:
    """A device and the precision of forward passes on it."""

    device: torch.device
    precision: torch.dtype

    def autocast(self) -> AbstractContextManager[None]:
        """Return a context in which forward passes use the precision."""
        return torch.autocast(self.device.type, dtype=self.precision, enabled=self.precision != torch.float32)


def device_type() -> str:
    """Return cuda where there is a GPU, else cpu."""
    return "cuda" if torch.cuda.is_available() else "cpu"


def set_up_compute(settings: PrecisionSettings, *, local_rank: int) -> Compute:
    """Set threads, memory and kernels as `settings` say and return the worker's device and precision.

    Raises:
        UsageError: the device cannot compute so.
    """
    assert settings.threads != "auto", "decided before"
    if settings.compute == "float16" and device_type() != "cuda":
        raise UsageError("precision.compute: float16 needs a GPU; use bfloat16")
    torch.set_num_threads(settings.threads)
    keep_freed_memory()
    if settings.deterministic:
        # cuBLAS reads it when it first starts; other values than these two are refused by torch.
        if os.environ.get("CUBLAS_WORKSPACE_CONFIG") not in (":4096:8", ":16:8"):
            os.environ["CUBLAS_WORKSPACE_CONFIG"] = ":4096:8"
        torch.use_deterministic_algorithms(mode=True)
        torch.backends.cudnn.deterministic = True
        torch.backends.cudnn.benchmark = False
    device = torch.device("cpu")
    if torch.cuda.is_available():
        device = torch.device("cuda", local_rank % torch.cuda.device_count())
        torch.cuda.set_device(device)
    return Compute(device, _PRECISIONS[settings.compute])


def share_of_threads(local_size: int) -> int:
    """Return the CPU threads of a worker: OMP_NUM_THREADS where it is set, else this node's cores shared out."""
    asked = os.environ.get("OMP_NUM_THREADS", "").split(",")[0]
    if asked.isdecimal() and int(asked) > 0:
        return int(asked)
    return max(1, len(os.sched_getaffinity(0)) // local_size)


def is_out_of_memory(error: BaseException) -> bool:
    """Whether `error` says that a device's memory is full."""
    return isinstance(error, torch.OutOfMemoryError | MemoryError) or "can't allocate memory" in str(error)
