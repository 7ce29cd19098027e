"""The device that a rank computes on, and how: threads, precision, memory, the scale of losses in float16."""

from __future__ import annotations

import logging
import os
from contextlib import AbstractContextManager
from dataclasses import dataclass

import torch

from dist_train.checkpoint.state import Progress
from dist_train.config import PrecisionSettings
from dist_train.outcome import UsageError
from dist_train.start_up import keep_freed_memory

_PRECISIONS = {"float32": torch.float32, "bfloat16": torch.bfloat16, "float16": torch.float16}
_OUT_OF_MEMORY = (
    "can't allocate memory",
    "CUDA error: out of memory",
    "CUBLAS_STATUS_ALLOC_FAILED",
    "CUBLAS_STATUS_NOT_INITIALIZED",  # what cublasCreate gives where its workspace does not fit
    "CUDNN_STATUS_ALLOC_FAILED",
    "_ALLOCATION_FAILED",  # cuDNN 9's, of host and device
    "valid cuDNN algorithm to run convolution",  # each of them wants more workspace than there is
    "unable to find an engine to execute",
)


@dataclass(frozen=True)
class Compute:
    """A device and the precision of forward passes on it."""

    device: torch.device
    precision: torch.dtype

    def autocast(self) -> AbstractContextManager[None]:
        """Return a context in which forward passes use the precision."""
        return torch.autocast(self.device.type, dtype=self.precision, enabled=self.precision != torch.float32)


def set_up_compute(settings: PrecisionSettings, device: torch.device) -> Compute:
    """Set threads, memory and kernels as `settings` say and return how the rank computes on `device`.

    Raises:
        UsageError: the device cannot compute so.
    """
    assert settings.threads != "auto", "decided before"
    if settings.compute == "float16" and device.type != "cuda":
        raise UsageError("precision.compute: float16 needs a GPU; use bfloat16", code="float16-on-cpu")
    torch.set_num_threads(settings.threads)
    keep_freed_memory()
    # torch's newer fp32_precision says the same; once that is set, torch.compile fails to read these (2.15).
    torch.backends.cuda.matmul.allow_tf32 = settings.tf32
    torch.backends.cudnn.allow_tf32 = settings.tf32
    if settings.deterministic is True:
        _use_deterministic_kernels()
    return Compute(device, _PRECISIONS[settings.compute])


def _use_deterministic_kernels() -> None:
    # cuBLAS reads it when it first starts; other values than these two are refused by torch.
    if os.environ.get("CUBLAS_WORKSPACE_CONFIG") not in (":4096:8", ":16:8"):
        os.environ["CUBLAS_WORKSPACE_CONFIG"] = ":4096:8"
    torch.use_deterministic_algorithms(mode=True)
    # It helps to find reads of unwritten memory, at the price of a kernel for every new tensor.
    # torch adds the property to the module at run time
    torch.utils.deterministic.fill_uninitialized_memory = False  # type: ignore[attr-defined]
    torch.backends.cudnn.deterministic = True
    torch.backends.cudnn.benchmark = False


def share_of_threads(local_size: int) -> int:
    """Return the CPU threads of a rank: OMP_NUM_THREADS where it is set, else this node's cores shared out."""
    asked = os.environ.get("OMP_NUM_THREADS", "").split(",")[0]
    if asked.isdecimal() and int(asked) > 0:
        return int(asked)
    return max(1, len(os.sched_getaffinity(0)) // local_size)


def is_out_of_memory(error: BaseException) -> bool:
    """Whether `error` says that a device's memory is full, as torch or CUDA's libraries put it."""
    if isinstance(error, torch.OutOfMemoryError | MemoryError):
        return True
    return isinstance(error, RuntimeError) and any(text in str(error) for text in _OUT_OF_MEMORY)


FIRST = 2.0**16
LOWEST = 1.0
HIGHEST = 2.0**24
UPDATES_UNTIL_RAISED = 2000
_logger = logging.getLogger("dist_train.training")


class LossScale:
    """What a loss is multiplied by, and its gradients divided by; the same on all ranks.

    1, always, without `progress`: for numbers that have float32's range. With it, for float16: halved by each overflow,
    doubled after many updates without one, and kept in `progress`, which is saved.
    """

    def __init__(self, progress: Progress | None = None) -> None:
        self._progress = progress
        if progress is not None and progress.loss_scale is None:
            progress.loss_scale, progress.updates_since_overflow = FIRST, 0

    @property
    def value(self) -> float:
        """The factor, a power of two."""
        return self._progress.loss_scale or FIRST if self._progress is not None else 1.0

    def lower(self) -> bool:
        """Halve the factor after an overflow; False where it is the lowest, and the overflow is a divergence."""
        if self._progress is None or self.value <= LOWEST:
            return False
        self._set(self._progress, self.value / 2)
        return True

    def note_update(self) -> None:
        """Double the factor where there has been no overflow for long."""
        if self._progress is None:
            return
        self._progress.updates_since_overflow = (self._progress.updates_since_overflow or 0) + 1
        if self._progress.updates_since_overflow >= UPDATES_UNTIL_RAISED:
            self._set(self._progress, min(HIGHEST, self.value * 2))

    def _set(self, progress: Progress, value: float) -> None:
        progress.loss_scale, progress.updates_since_overflow = value, 0
        _logger.info("the loss scale is %g from step %d on", value, progress.step + 1)
