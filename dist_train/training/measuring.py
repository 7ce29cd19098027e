"""How long the parts of a step take on every rank, what the rank uses of its machine, and profiles of a few steps."""

from __future__ import annotations

import logging
import math
import os
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, replace
from itertools import pairwise
from pathlib import Path
from typing import Any, Literal, get_args

import torch
from torch import Tensor
from torch.profiler import ProfilerActivity, profile, record_function

from dist_train.cluster.communicator import Communicator
from dist_train.rundir.records import Measurement, RankMeasurement, StepParts

Part = Literal["data_wait", "forward_backward", "perturb_restore", "allreduce_wait", "optimizer", "checkpoint_stall"]
"""A field of `StepParts`."""

Phase = Literal["perturb", "forward-backward", "restore", "allreduce", "update"]
"""What the profiler calls a part of the training step."""

_PART_OF: Mapping[Phase, Part] = {
    "perturb": "perturb_restore",
    "forward-backward": "forward_backward",
    "restore": "perturb_restore",
    "allreduce": "allreduce_wait",
    "update": "optimizer",
}


class HostTimer:
    """Takes moments without waiting for anything; of this process: right where the processor itself computes."""

    def now(self) -> Any:
        """Return this moment."""
        return time.perf_counter()

    def seconds(self, begun: Any, ended: Any) -> float:
        """Return the seconds between two moments, the later of which has come."""
        return float(ended - begun)


class DeviceTimer(HostTimer):
    """Moments of the current stream of a GPU, which is behind the process that fills it."""

    def now(self) -> torch.cuda.Event:
        """Return the moment in which the stream has done what it was given so far."""
        event = torch.cuda.Event(enable_timing=True)
        event.record()
        return event

    def seconds(self, begun: torch.cuda.Event, ended: torch.cuda.Event) -> float:
        """Return the seconds between two moments; wait for the later one where the stream is not there yet."""
        ended.synchronize()
        return float(begun.elapsed_time(ended)) / 1000


@dataclass(frozen=True)
class StepTimes:
    """The moments of one step, and the part that began with each; None: what is not part of anything."""

    timer: HostTimer
    marks: Sequence[tuple[Part | None, Any]]

    def seconds_of(self, part: Part) -> float:
        """Return the seconds of `part` alone, as soon as that is over."""
        spans = (self.timer.seconds(begun, ended) for (of, begun), (_, ended) in pairwise(self.marks) if of == part)
        return sum(spans, 0.0)

    def parts(self) -> StepParts:
        """Return the seconds of every part; on a device ask after its next synchronization, to wait for nothing."""
        return StepParts(**{part: self.seconds_of(part) for part in get_args(Part)})


class StepClock:
    """Notes when parts of a step begin and end. A part within another is taken out of that one's time."""

    def __init__(self, timer: HostTimer, on_turn: Callable[[Part | None], None] = lambda part: None) -> None:
        """`on_turn` is called when a part begins; with None when none does, but for the first step of all."""
        self._timer = timer
        self._on_turn = on_turn
        self._steps = 0
        self._marks: list[tuple[Part | None, Any]] = []
        self._current: Part | None = None

    def start(self) -> None:
        """Begin a step."""
        self._marks = []
        self._current = None
        self._steps += 1

    def times(self) -> StepTimes:
        """Return what was noted since the step began."""
        return StepTimes(self._timer, self._marks)

    @contextmanager
    def part(self, part: Part) -> Iterator[None]:
        """Count the block to `part`."""
        outer = self._current
        self._turn_to(part)
        try:
            yield
        finally:
            self._turn_to(outer)

    @contextmanager
    def phase(self, phase: Phase) -> Iterator[None]:
        """Count the block to the part that `phase` is, and name it in the profiler's trace."""
        with record_function(phase), self.part(_PART_OF[phase]):
            yield

    def _turn_to(self, part: Part | None) -> None:
        self._marks.append((part, self._timer.now()))
        self._current = part
        if self._steps > 1:  # the first one also allocates, tunes and compiles
            self._on_turn(part)


def build_step_clock(device: torch.device, on_turn: Callable[[Part | None], None] = lambda part: None) -> StepClock:
    """Return a clock for steps on `device`."""
    return StepClock(DeviceTimer() if device.type == "cuda" else HostTimer(), on_turn)


def note_progress(comm: Communicator, part: Part | None) -> None:
    """Tell `comm` that this rank begins `part` of a step: of what a file system may hold up, no length is a hang."""
    if part in (None, "data_wait", "checkpoint_stall"):
        comm.note_rest()
    else:
        comm.note_work()


_STATM = Path("/proc/self/statm")
_PACE_SECONDS = 2.0
"""NVML averages over a second or less, and takes up to a millisecond for each answer; memory changes no faster."""
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


class UsageReader:
    """Reads this process's usage, and that of `device`."""

    def __init__(
        self,
        device: torch.device,
        ask_utilization: Callable[[torch.device], float] = torch.cuda.utilization,
        ask_gpu: Callable[[], Mapping[str, float]] = dict,
    ) -> None:
        """`ask_utilization` gives percent, and raises where nothing can answer: it is then not asked again.

        `ask_gpu` gives what is known of the device beside, by field of `RankMeasurement`.
        """
        self._device = device
        self._ask = ask_utilization
        self._ask_gpu = ask_gpu
        self._answers = device.type == "cuda"
        self._read_at = -math.inf
        self._usage: Mapping[str, float] = {}

    def read(self) -> Mapping[str, float]:
        """Return the usage by field of `RankMeasurement`, at most two seconds old; NaN, or no value, if unknown."""
        if time.monotonic() - self._read_at >= _PACE_SECONDS:
            self._read_at = time.monotonic()
            held = peak = math.nan
            if self._device.type == "cuda":
                held = float(torch.cuda.memory_reserved(self._device))
                peak = float(torch.cuda.max_memory_reserved(self._device))
            self._usage = {
                "resident_bytes": _resident_bytes(),
                "device_bytes": held,
                "device_peak_bytes": peak,
                "device_utilization": self._utilization(),
                **self._ask_gpu(),
            }
        return self._usage

    def _utilization(self) -> float:
        if not self._answers:
            return math.nan
        try:
            return self._ask(self._device) / 100
        except Exception as error:  # NVML's errors have no base in common with torch's
            self._answers = False
            _logger.info("the device's utilization is not known: %s", " ".join(str(error).split()))
            return math.nan


def read_usage_of(device: torch.device) -> UsageReader:
    """Return the reader of `device`, with what NVML knows of it where it is a GPU of NVIDIA's."""
    if device.type != "cuda" or torch.version.hip:
        return UsageReader(device)
    uuid = getattr(torch.cuda.get_device_properties(device), "uuid", "unknown")
    return UsageReader(device, ask_gpu=GpuReader(f"GPU-{uuid}").read)


def _resident_bytes() -> float:
    try:
        pages = int(_STATM.read_bytes().split()[1])
    except (OSError, ValueError, IndexError):
        return math.nan
    return float(pages * os.sysconf("SC_PAGE_SIZE"))


_PIECE = 1 << 20
"""Weights that are compared at once: a difference that stays in the cache costs no pass through memory."""


class WeightNorms:
    """The Euclidean norms of `values` [n] and of `values` - `initial`, computed on their device without waiting."""

    def __init__(self, values: Tensor, initial: Tensor) -> None:
        assert values.shape == initial.shape
        self._values = values
        self._initial = initial
        self._norms = torch.zeros(2, pin_memory=values.is_cuda)
        self._copied = torch.cuda.Event() if values.is_cuda else None

    def start(self) -> None:
        """Take the norms of the values as they are now."""
        pieces = zip(self._values.split(_PIECE), self._initial.split(_PIECE), strict=True)
        distances = torch.stack([torch.linalg.vector_norm(values - initial) for values, initial in pieces])
        norms = torch.stack([torch.linalg.vector_norm(self._values), torch.linalg.vector_norm(distances)])
        self._norms.copy_(norms, non_blocking=True)
        if self._copied is not None:
            self._copied.record()

    def result(self) -> tuple[float, float]:
        """Return the norm and the distance; waits only where the device has not come to them yet."""
        if self._copied is not None:
            self._copied.synchronize()
        norm, distance = self._norms.tolist()
        return norm, distance


class Measuring:
    """Measures the steps of this rank; where it has `norms`, the weights' too.

    All ranks must call `start` after the same steps, and `result` between two of them.
    """

    def __init__(self, comm: Communicator, usage: UsageReader, norms: WeightNorms | None) -> None:
        self._comm = comm
        self._usage = usage
        self.norms = norms
        self._stall_seconds = 0.0
        self._finish: Callable[[], Measurement] | None = None

    def note_stall(self, seconds: float) -> None:
        """Count `seconds` in which a checkpoint held up the training to the next step that is measured."""
        self._stall_seconds += seconds

    def start(self, step: int, seconds: float, times: StepTimes) -> None:
        """Measure `step`, counted from 1, just made in `seconds`; waits for nobody."""
        assert self._finish is None, "the result of the one before comes first"
        waited = times.seconds_of("allreduce_wait")
        mine = RankMeasurement(busy_seconds=max(0.0, seconds - waited), wait_seconds=waited, **self._usage.read())
        # A row for each rank, which the sum fills.
        slots = torch.zeros(self._comm.size, len(mine), dtype=torch.float64)
        slots[self._comm.rank] = torch.tensor(mine, dtype=torch.float64)
        if self.norms is not None:
            self.norms.start()
        pending = self._comm.allreduce_async(slots, "measurements")
        now, stall_seconds, self._stall_seconds = time.time(), self._stall_seconds, 0.0

        def finish() -> Measurement:
            pending.wait()
            rank, rows = self._comm.rank, slots.tolist()
            parts = times.parts()
            norm, distance = self.norms.result() if self.norms is not None else (math.nan, math.nan)
            return Measurement(
                step=step,
                time=now,
                step_seconds=seconds,
                parts=replace(parts, checkpoint_stall=parts.checkpoint_stall + stall_seconds),
                weight_norm=norm,
                distance=distance,
                ranks=tuple(RankMeasurement(*row) for row in (rows if rank == 0 else rows[rank : rank + 1])),
            )

        self._finish = finish

    def drop(self) -> None:
        """Forget what was started: its group of ranks is no more."""
        self._finish = None

    def result(self) -> Measurement | None:
        """Return what was started, once; None where nothing was."""
        finish, self._finish = self._finish, None
        return finish() if finish else None


_FIRST_UPDATES = 2
"""Updates of a launch that are not profiled: they also allocate, tune and compile."""


class Profiler:
    """Profiles `updates` updates after the first two of a launch, on all ranks; writes Chrome traces into `folder`."""

    def __init__(self, updates: int, folder: Path, comm: Communicator) -> None:
        self._last = _FIRST_UPDATES + updates
        self._folder = folder
        self._comm = comm
        self._made = 0
        self._profile: profile | None = None
        self._first_step = 0

    def after_update(self, step: int) -> None:
        """Begin, or end, when it is time; all ranks after the same update."""
        self._made += 1
        if self._made == _FIRST_UPDATES:
            self._begin(step + 1)
        elif self._made == self._last:
            self.close()

    def close(self) -> None:
        """Write what has been seen so far."""
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
            _logger.error("nothing is profiled, %s cannot be made: %s", self._folder, error.strerror or error)
            return
        self._first_step = first_step
        activities = [ProfilerActivity.CPU]
        if torch.cuda.is_initialized():
            activities.append(ProfilerActivity.CUDA)
        self._comm.start_timeline(self._folder / f"horovod-step-{first_step:08d}.json")
        self._profile = profile(activities=activities)
        self._profile.start()
