"""Measurements: the time of each part of a step on every rank, the rank's use of its machine, and profiler traces."""

from __future__ import annotations

import logging
import math
import os
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from itertools import pairwise
from pathlib import Path
from typing import Any, Literal, TypeAlias, get_args

import numpy
import torch
from torch import Tensor
from torch.profiler import ProfilerActivity, profile

from dist_train.cluster.communicator import Communicator
from dist_train.optim.flat_weights import norm
from dist_train.rundir.records import Measurement, RankMeasurement, StepParts

Part = Literal["data_wait", "forward_backward", "perturb_restore", "allreduce_wait", "optimizer", "checkpoint_stall"]
"""A field of `StepParts`."""

Stamp: TypeAlias = float | torch.cuda.Event
"""A moment: of this process's clock, or of a GPU's current stream, which runs behind the process."""


def _seconds(begun: Any, ended: Any) -> float:
    """Return the seconds between two stamps of one kind; waits until a GPU's stream has recorded the later one."""
    if isinstance(begun, float):
        return float(ended - begun)
    ended.synchronize()
    return float(begun.elapsed_time(ended)) / 1000


@dataclass(frozen=True)
class StepTimes:
    """The time stamps of one step, each with the part that begins there; None: outside of all parts."""

    marks: Sequence[tuple[Part | None, Stamp]]

    def seconds_of(self, part: Part) -> float:
        """Return the seconds spent in `part`; on a GPU, waits until the part has ended."""
        spans = (_seconds(begun, ended) for (of, begun), (_, ended) in pairwise(self.marks) if of == part)
        return sum(spans, 0.0)

    def count_of(self, part: Part) -> int:
        """Return how often `part` began, or continued after a nested one: once a micro-batch for `data_wait`."""
        return sum(of == part for of, _ in self.marks)

    def parts(self, stall_seconds: float = 0.0) -> StepParts:
        """Return the seconds of every part, plus `stall_seconds` of a checkpoint's stall.

        On a GPU, causes no wait after the device's next synchronization.
        """
        seconds = {part: self.seconds_of(part) for part in get_args(Part)}
        seconds["checkpoint_stall"] += stall_seconds
        return StepParts(**seconds)


class StepClock:
    """Notes when parts of a step begin and end. The time of a nested part does not count for the outer one."""

    def __init__(self, comm: Communicator, *, on_gpu: bool = False) -> None:
        """Tell `comm` of progress; `on_gpu`: take the time in the GPU's current stream, without waiting for it."""
        self._comm = comm
        self._on_gpu = on_gpu
        self._steps = 0
        self._marks: list[tuple[Part | None, Stamp]] = []
        self._current: Part | None = None

    def start(self) -> None:
        """Begin a step."""
        self._marks = []
        self._current = None
        self._steps += 1

    def times(self) -> StepTimes:
        """Return the time stamps since the step began."""
        return StepTimes(self._marks)

    @contextmanager
    def part(self, part: Part) -> Iterator[None]:
        """Count the block to `part`."""
        outer = self._current
        self._change_to(part)
        try:
            yield
        finally:
            self._change_to(outer)

    def _change_to(self, part: Part | None) -> None:
        self._marks.append((part, self._now()))
        self._current = part
        if self._steps <= 1:
            return  # the first step also allocates, tunes and compiles
        if part in (None, "data_wait", "checkpoint_stall"):
            self._comm.note_rest()  # a delay by a slow file system is not a hang
        else:
            self._comm.note_work()

    def _now(self) -> Stamp:
        if not self._on_gpu:
            return time.perf_counter()
        event = torch.cuda.Event(enable_timing=True)
        event.record()
        return event


_STATM = Path("/proc/self/statm")
_USAGE_SECONDS = 2.0
"""Seconds between two readings: NVML averages over up to a second, and a query takes up to a millisecond."""
_logger = logging.getLogger("dist_train.training")


_HERTZ = 1e6

_QUERIES: Mapping[str, Callable[[Any, Any], float]] = {
    "device_utilization": lambda nvml, gpu: nvml.nvmlDeviceGetUtilizationRates(gpu).gpu / 100,
    "device_used_bytes": lambda nvml, gpu: nvml.nvmlDeviceGetMemoryInfo(gpu).used,
    "device_power_watts": lambda nvml, gpu: nvml.nvmlDeviceGetPowerUsage(gpu) / 1000,
    "device_core_clock_hertz": lambda nvml, gpu: nvml.nvmlDeviceGetClockInfo(gpu, nvml.NVML_CLOCK_SM) * _HERTZ,
    "device_memory_clock_hertz": lambda nvml, gpu: nvml.nvmlDeviceGetClockInfo(gpu, nvml.NVML_CLOCK_MEM) * _HERTZ,
    # the name that old and new drivers know
    "device_throttle_reasons": lambda nvml, gpu: nvml.nvmlDeviceGetCurrentClocksThrottleReasons(gpu),
    "device_corrected_errors": lambda nvml, gpu: nvml.nvmlDeviceGetTotalEccErrors(
        gpu, nvml.NVML_MEMORY_ERROR_TYPE_CORRECTED, nvml.NVML_VOLATILE_ECC
    ),
    "device_uncorrected_errors": lambda nvml, gpu: nvml.nvmlDeviceGetTotalEccErrors(
        gpu, nvml.NVML_MEMORY_ERROR_TYPE_UNCORRECTED, nvml.NVML_VOLATILE_ECC
    ),
}
"""By field of `RankMeasurement`: functions of the module pynvml and its handle of a GPU."""


class GpuReader:
    """Queries NVML about one GPU; a query that fails once is not repeated."""

    def __init__(self, uuid: str) -> None:
        """Find the GPU of this `uuid`, as in `nvidia-smi -L`; without NVML or that GPU, `read` returns nothing."""
        self._queries = dict(_QUERIES)
        try:
            import pynvml

            pynvml.nvmlInit()
            self._nvml, self._gpu = pynvml, pynvml.nvmlDeviceGetHandleByUUID(uuid)
        except Exception as error:  # pynvml may be missing or not match the driver
            self._queries.clear()
            _logger.info("NVML does not know of %s: %s", uuid, " ".join(str(error).split()))

    def read(self) -> dict[str, float]:
        """Return values by field of `RankMeasurement`: shares, bytes, watts, hertz, bits, counts."""
        values = {}
        for field, query in list(self._queries.items()):
            try:
                values[field] = float(query(self._nvml, self._gpu))
            except Exception as error:  # AttributeError: a pynvml without this function
                del self._queries[field]
                _logger.info("NVML does not report the GPU's %s: %s", field.removeprefix("device_"), error)
        return values


class UsageReader:
    """Reads this process's use of memory, and of `device`."""

    def __init__(self, device: torch.device, read_gpu: Callable[[], Mapping[str, float]] = dict) -> None:
        """`read_gpu` returns what NVML knows of the device, by field of `RankMeasurement`."""
        self._device = device
        self._read_gpu = read_gpu
        self._read_at = -math.inf
        self._usage: dict[str, float] = {}

    def read(self) -> Mapping[str, float]:
        """Return values by field of `RankMeasurement`, at most two seconds old; unknown ones are NaN or missing."""
        if time.monotonic() - self._read_at >= _USAGE_SECONDS:
            self._read_at = time.monotonic()
            self._usage = {"resident_bytes": _resident_bytes(), **self._read_gpu()}
            if self._device.type == "cuda":
                self._usage["device_bytes"] = float(torch.cuda.memory_reserved(self._device))
                self._usage["device_peak_bytes"] = float(torch.cuda.max_memory_reserved(self._device))
                total = torch.cuda.get_device_properties(self._device).total_memory
                self._usage["device_total_bytes"] = float(total)
        return self._usage


def usage_reader(device: torch.device) -> UsageReader:
    """Return a reader for `device`, which queries NVML if that is an NVIDIA GPU."""
    if device.type != "cuda" or torch.version.hip:
        return UsageReader(device)
    uuid = getattr(torch.cuda.get_device_properties(device), "uuid", "unknown")
    return UsageReader(device, GpuReader(f"GPU-{uuid}").read)


def _resident_bytes() -> float:
    try:
        pages = int(_STATM.read_bytes().split()[1])
    except (OSError, ValueError, IndexError):
        return math.nan
    return float(pages * os.sysconf("SC_PAGE_SIZE"))


_CHUNK = 1 << 20
"""Weights that are compared at once: the differences then stay in the cache."""


class WeightNorms:
    """The Euclidean norms of `values` [n] and of `values` - `initial`, computed on their device without waiting."""

    def __init__(self, values: Tensor, initial: Tensor) -> None:
        assert values.shape == initial.shape
        self._values = values
        self._initial = initial
        self._norms = torch.zeros(2, pin_memory=values.is_cuda)
        self._copied = torch.cuda.Event() if values.is_cuda else None

    def start(self) -> None:
        """Start to compute the norms of the current values."""
        chunks = zip(self._values.split(_CHUNK), self._initial.split(_CHUNK), strict=True)
        distances = torch.stack([norm(values - initial) for values, initial in chunks])
        norms = torch.stack([norm(self._values), norm(distances)])
        self._norms.copy_(norms, non_blocking=True)
        if self._copied is not None:
            self._copied.record()

    def result(self) -> tuple[float, float]:
        """Return the norm and the distance from the initial weights; waits until the device has computed them."""
        if self._copied is not None:
            self._copied.synchronize()
        norm, distance = self._norms.tolist()
        return norm, distance


class Measuring:
    """Measures the steps of this rank and, where `norms` is set, the weights.

    All ranks must call `start` after the same steps, and `result` before the next `start`.
    """

    def __init__(self, comm: Communicator, usage: UsageReader) -> None:
        self._comm = comm
        self._usage = usage
        self.norms: WeightNorms | None = None
        self._stall_seconds = 0.0
        self._finish: Callable[[], Measurement] | None = None

    def note_stall(self, seconds: float) -> None:
        """Add `seconds` in which a checkpoint delayed training to the next step that is measured."""
        self._stall_seconds += seconds

    def start(self, step: int, seconds: float, times: StepTimes) -> None:
        """Measure `step`, counted from 1, which took `seconds`; does not wait for other ranks."""
        assert self._finish is None, "call result() first"
        waited = times.seconds_of("allreduce_wait")
        mine = RankMeasurement(
            busy_seconds=max(0.0, seconds - waited),
            wait_seconds=waited,
            micro_batches=times.count_of("data_wait"),
            **self._usage.read(),
        )
        # One row for each rank; the sum gathers them.
        rows = numpy.zeros((self._comm.size, len(mine)))
        rows[self._comm.rank] = mine
        slots = torch.from_numpy(rows)
        if self.norms is not None:
            self.norms.start()
        pending = self._comm.allreduce_async(slots, "measurements")
        now, stall_seconds, self._stall_seconds = time.time(), self._stall_seconds, 0.0

        def finish() -> Measurement:
            pending.wait()
            rank, rows = self._comm.rank, slots.tolist()
            norm, distance = self.norms.result() if self.norms is not None else (math.nan, math.nan)
            return Measurement(
                step=step,
                time=now,
                step_seconds=seconds,
                parts=times.parts(stall_seconds),
                weight_norm=norm,
                distance=distance,
                ranks=tuple(RankMeasurement(*row) for row in (rows if rank == 0 else rows[rank : rank + 1])),
            )

        self._finish = finish

    def drop(self) -> None:
        """Drop the measurement that was started, since its group of ranks is broken."""
        self._finish = None

    def result(self) -> Measurement | None:
        """Return the measurement that was started, and only once; None if none was."""
        finish, self._finish = self._finish, None
        return finish() if finish else None


_SKIPPED_UPDATES = 2
"""The first updates of a launch are not profiled: they also allocate, tune and compile."""


class Profiler:
    """Profiles `updates` updates after the first two of a launch, on all ranks; writes Chrome traces into `folder`."""

    def __init__(self, updates: int, folder: Path, comm: Communicator) -> None:
        self._last = _SKIPPED_UPDATES + updates
        self._folder = folder
        self._comm = comm
        self._updates = 0
        self._profile: profile | None = None
        self._first_step = 0

    def after_update(self, step: int) -> None:
        """Start or end the profile if it is time; all ranks do so after the same update."""
        self._updates += 1
        if self._updates == _SKIPPED_UPDATES:
            self._begin(step + 1)
        elif self._updates == self._last:
            self.close()

    def close(self) -> None:
        """End the profile, if it runs, and write its trace."""
        if self._profile is None:
            return
        running, self._profile = self._profile, None
        self._comm.stop_timeline()
        running.stop()
        path = self._folder / f"trace-step-{self._first_step:08d}-rank-{self._comm.rank}.json"
        try:
            running.export_chrome_trace(str(path))
        except (OSError, RuntimeError) as error:
            _logger.error("the profiler's trace %s could not be written: %s", path, error)

    def _begin(self, first_step: int) -> None:
        try:
            self._folder.mkdir(mode=0o700, exist_ok=True)
        except OSError as error:
            _logger.error("profiling is off: cannot create %s: %s", self._folder, error.strerror or error)
            return
        self._first_step = first_step
        activities = [ProfilerActivity.CPU]
        if torch.cuda.is_initialized():
            activities.append(ProfilerActivity.CUDA)
        self._comm.start_timeline(self._folder / f"horovod-step-{first_step:08d}.json")
        self._profile = profile(activities=activities)
        self._profile.start()
