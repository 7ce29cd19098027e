"""How a step went on every rank: told in one small sum, which travels while the next step is made."""

from __future__ import annotations

import math
import time
from dataclasses import astuple, dataclass, fields, replace
from typing import Protocol

import torch

from dist_train.cluster.communicator import Communicator, Pending
from dist_train.config.sections import MetricsSettings
from dist_train.monitoring.records import Measurement, RankMeasurement
from dist_train.training.step_clock import StepTimes
from dist_train.training.usage import UsageReader
from dist_train.training.weight_norms import WeightNorms

_FIELDS = len(fields(RankMeasurement))


def is_measured(settings: MetricsSettings) -> bool:
    """Whether anyone looks at measurements; settings alone decide, so that all ranks do alike."""
    return settings.enabled or settings.tensorboard


class Measuring(Protocol):
    """Measures steps. All ranks must call `start` after the same steps, and `result` between two of them."""

    def note_stall(self, seconds: float) -> None:
        """Count `seconds` in which a checkpoint held up the training to the next step that is measured."""

    def start(self, step: int, seconds: float, times: StepTimes) -> None:
        """Measure `step`, counted from 1, just made in `seconds`; waits for nobody."""

    def result(self) -> Measurement | None:
        """Return what was started, once; None where nothing was."""


class NoMeasuring:
    """Nobody looks: nothing is measured."""

    def note_stall(self, seconds: float) -> None:
        """Do nothing."""

    def start(self, step: int, seconds: float, times: StepTimes) -> None:
        """Do nothing."""

    def result(self) -> Measurement | None:
        """Return None."""
        return None


@dataclass(frozen=True)
class _Started:
    """A measurement under way."""

    step: int
    time: float
    seconds: float
    stall_seconds: float
    times: StepTimes
    slots: torch.Tensor
    """Float64 [ranks, fields]: a row for each rank, which the sum fills."""
    sum: Pending


class RankMeasuring:
    """Measures the steps of one of `ranks`; where it has `norms`, the weights' too."""

    def __init__(self, comm: Communicator, usage: UsageReader, norms: WeightNorms | None) -> None:
        self._comm = comm
        self._usage = usage
        self._norms = norms
        self._stall_seconds = 0.0
        self._started: _Started | None = None

    def note_stall(self, seconds: float) -> None:
        """Count `seconds` in which a checkpoint held up the training to the next step that is measured."""
        self._stall_seconds += seconds

    def start(self, step: int, seconds: float, times: StepTimes) -> None:
        """Measure `step`, counted from 1, just made in `seconds`; waits for nobody."""
        assert self._started is None, "the result of the one before comes first"
        waited, usage = times.seconds_of("allreduce_wait"), self._usage.read()
        mine = RankMeasurement(
            busy_seconds=max(0.0, seconds - waited),
            wait_seconds=waited,
            resident_bytes=usage.resident_bytes,
            device_bytes=usage.device_bytes,
            device_peak_bytes=usage.device_peak_bytes,
            device_utilization=usage.device_utilization,
        )
        slots = torch.zeros(self._comm.size, _FIELDS, dtype=torch.float64)
        slots[self._comm.rank] = torch.tensor(astuple(mine), dtype=torch.float64)
        if self._norms is not None:
            self._norms.start()
        pending = self._comm.allreduce_async(slots, "measurements")
        self._started = _Started(step, time.time(), seconds, self._stall_seconds, times, slots, pending)
        self._stall_seconds = 0.0

    def result(self) -> Measurement | None:
        """Return what was started, once; None where nothing was."""
        started, self._started = self._started, None
        if started is None:
            return None
        started.sum.wait()
        rows = started.slots.tolist()
        parts = started.times.parts()
        norm, distance = self._norms.result() if self._norms is not None else (math.nan, math.nan)
        rank = self._comm.rank
        return Measurement(
            step=started.step,
            time=started.time,
            step_seconds=started.seconds,
            parts=replace(parts, checkpoint_stall=parts.checkpoint_stall + started.stall_seconds),
            weight_norm=norm,
            distance=distance,
            ranks=tuple(RankMeasurement(*row) for row in (rows if rank == 0 else rows[rank : rank + 1])),
        )
