"""Where the time of a step goes: which part of it is under way, read on the host or on the device's own stream."""

from __future__ import annotations

import time
from collections import defaultdict
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from itertools import pairwise
from types import MappingProxyType
from typing import Any, Literal, Protocol, TypeVar

import torch
from torch.profiler import record_function

from dist_train.monitoring.records import StepParts

Part = Literal["data_wait", "forward_backward", "perturb_restore", "allreduce_wait", "optimizer", "checkpoint_stall"]
"""A field of `StepParts`."""

Phase = Literal["perturb", "forward-backward", "restore", "allreduce", "update"]
"""What the profiler calls a part of the training step."""

_PART_OF: Mapping[Phase, Part] = MappingProxyType(
    {
        "perturb": "perturb_restore",
        "forward-backward": "forward_backward",
        "restore": "perturb_restore",
        "allreduce": "allreduce_wait",
        "update": "optimizer",
    }
)

Moment = TypeVar("Moment")


class Timer(Protocol[Moment]):
    """Takes moments, without waiting for anything, and tells how far apart they were."""

    def now(self) -> Moment:
        """Return this moment."""

    def seconds(self, begun: Moment, ended: Moment) -> float:
        """Return the seconds between two moments, the later of which has come."""


class HostTimer:
    """Moments of this process: right where the processor itself computes."""

    def now(self) -> float:
        """Return this moment."""
        return time.perf_counter()

    def seconds(self, begun: float, ended: float) -> float:
        """Return the seconds between two moments."""
        return ended - begun


class DeviceTimer:
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

    timer: Timer[Any]
    marks: Sequence[tuple[Part | None, Any]]

    def seconds_of(self, part: Part) -> float:
        """Return the seconds of `part` alone, as soon as that is over."""
        return sum(self.timer.seconds(begun, ended) for (of, begun), (_, ended) in pairwise(self.marks) if of == part)

    def parts(self) -> StepParts:
        """Return the seconds of every part; on a device ask after its next synchronization, to wait for nothing."""
        seconds: defaultdict[Part, float] = defaultdict(float)
        for (part, begun), (_, ended) in pairwise(self.marks):
            if part is not None:
                seconds[part] += self.timer.seconds(begun, ended)
        return StepParts(
            data_wait=seconds["data_wait"],
            forward_backward=seconds["forward_backward"],
            perturb_restore=seconds["perturb_restore"],
            allreduce_wait=seconds["allreduce_wait"],
            optimizer=seconds["optimizer"],
            checkpoint_stall=seconds["checkpoint_stall"],
        )


class StepClock:
    """Notes when parts of a step begin and end. A part within another is taken out of that one's time."""

    def __init__(self, timer: Timer[Any]) -> None:
        self._timer = timer
        self._marks: list[tuple[Part | None, Any]] = []
        self._current: Part | None = None

    def start(self) -> None:
        """Begin a step."""
        self._marks = []
        self._current = None

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


def build_step_clock(device: torch.device) -> StepClock:
    """Return a clock for steps on `device`."""
    return StepClock(DeviceTimer() if device.type == "cuda" else HostTimer())
