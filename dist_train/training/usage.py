"""What a rank takes of its machine: memory, and its device's memory and time. Reading never fails a run."""

from __future__ import annotations

import logging
import math
import os
import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import torch

_STATM = Path("/proc/self/statm")
_PACE_SECONDS = 1.0
"""NVML averages over about as long, and takes a millisecond to answer; memory changes no faster."""
_logger = logging.getLogger("dist_train.training")


@dataclass(frozen=True)
class Usage:
    """Bytes, and the share of the last second in which the device was at work; NaN where it is not known."""

    resident_bytes: float
    device_bytes: float
    device_peak_bytes: float
    device_utilization: float


class UsageReader:
    """Reads this process's usage, and that of `device`."""

    def __init__(
        self, device: torch.device, ask_utilization: Callable[[torch.device], float] = torch.cuda.utilization
    ) -> None:
        """`ask_utilization` gives percent, and raises where nothing can answer: it is then not asked again."""
        self._device = device
        self._is_cuda = device.type == "cuda"
        self._ask = ask_utilization
        self._answers = self._is_cuda
        self._read_at = -math.inf
        self._usage = Usage(math.nan, math.nan, math.nan, math.nan)

    def read(self) -> Usage:
        """Return the usage, at most a second old."""
        if time.monotonic() - self._read_at >= _PACE_SECONDS:
            self._read_at = time.monotonic()
            self._usage = self._read()
        return self._usage

    def _read(self) -> Usage:
        held = peak = math.nan
        if self._is_cuda:
            held = float(torch.cuda.memory_reserved(self._device))
            peak = float(torch.cuda.max_memory_reserved(self._device))
        return Usage(_resident_bytes(), held, peak, self._utilization())

    def _utilization(self) -> float:
        if not self._answers:
            return math.nan
        try:
            return self._ask(self._device) / 100
        except Exception as error:  # NVML's errors have no base in common with torch's
            self._answers = False
            _logger.info("the device's utilization is not known: %s", " ".join(str(error).split()))
            return math.nan


def _resident_bytes() -> float:
    try:
        pages = int(_STATM.read_bytes().split()[1])
    except (OSError, ValueError, IndexError):
        return math.nan
    return float(pages * os.sysconf("SC_PAGE_SIZE"))
