"""What NVML says of a GPU: memory in use by all processes, power, clocks, why they are low, and memory errors."""

from __future__ import annotations

import logging
from collections.abc import Callable, Mapping
from typing import Any

_logger = logging.getLogger("dist_train.training")

_HERTZ = 1e6

_QUESTIONS: Mapping[str, Callable[[Any, Any], float]] = {
    "device_used_bytes": lambda nvml, gpu: nvml.nvmlDeviceGetMemoryInfo(gpu).used,
    "device_power_watts": lambda nvml, gpu: nvml.nvmlDeviceGetPowerUsage(gpu) / 1000,
    "device_core_clock_hertz": lambda nvml, gpu: nvml.nvmlDeviceGetClockInfo(gpu, nvml.NVML_CLOCK_SM) * _HERTZ,
    "device_memory_clock_hertz": lambda nvml, gpu: nvml.nvmlDeviceGetClockInfo(gpu, nvml.NVML_CLOCK_MEM) * _HERTZ,
    # the name that drivers of all ages know
    "device_throttle_reasons": lambda nvml, gpu: nvml.nvmlDeviceGetCurrentClocksThrottleReasons(gpu),
    "device_corrected_errors": lambda nvml, gpu: nvml.nvmlDeviceGetTotalEccErrors(
        gpu, nvml.NVML_MEMORY_ERROR_TYPE_CORRECTED, nvml.NVML_VOLATILE_ECC
    ),
    "device_uncorrected_errors": lambda nvml, gpu: nvml.nvmlDeviceGetTotalEccErrors(
        gpu, nvml.NVML_MEMORY_ERROR_TYPE_UNCORRECTED, nvml.NVML_VOLATILE_ECC
    ),
}
"""By the field of `RankMeasurement` that the answer goes into: of the module pynvml and its handle of a GPU."""


class GpuReader:
    """Asks NVML about one GPU; what it does not answer once is not asked again."""

    def __init__(self, uuid: str) -> None:
        """Look for the GPU of this `uuid`, as `nvidia-smi -L` shows it; without NVML or the GPU nothing is known."""
        self._questions = dict(_QUESTIONS)
        try:
            import pynvml

            pynvml.nvmlInit()
            self._nvml, self._gpu = pynvml, pynvml.nvmlDeviceGetHandleByUUID(uuid)
        except Exception as error:  # of the import, or of a library that the driver and pynvml see differently
            self._questions.clear()
            _logger.info("NVML does not know of %s: %s", uuid, " ".join(str(error).split()))

    def read(self) -> dict[str, float]:
        """Return the answers by field of `RankMeasurement`: bytes, watts, hertz, bits, counts."""
        answers = {}
        for field, ask in list(self._questions.items()):
            try:
                answers[field] = float(ask(self._nvml, self._gpu))
            except self._nvml.NVMLError as error:
                del self._questions[field]
                _logger.info("NVML does not tell the GPU's %s: %s", field.removeprefix("device_"), error)
        return answers
