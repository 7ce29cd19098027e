"""How the amplitude of the noise changes over a run: c(t) for update t of T."""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping
from types import MappingProxyType
from typing import Any

from dist_train.config import NoiseSchedule


def noise_factor(schedule: NoiseSchedule, step: int, total_steps: int) -> float:
    """Return c(t) at update `step`, counted from 0, of `total_steps`."""
    return _FACTORS[schedule.kind](schedule, step, total_steps)


def _constant(schedule: Any, step: int, total_steps: int) -> float:
    return 1.0


def _cosine(schedule: Any, step: int, total_steps: int) -> float:
    return (1.0 + math.cos(math.pi * step / total_steps)) / 2.0


def _linear(schedule: Any, step: int, total_steps: int) -> float:
    return 1.0 - step / total_steps


def _exponential(schedule: Any, step: int, total_steps: int) -> float:
    return float(schedule.final_fraction ** (step / total_steps))


def _inverse_power(schedule: Any, step: int, total_steps: int) -> float:
    return float((1.0 + step) ** (-schedule.gamma / 2.0))


def _tanh(schedule: Any, step: int, total_steps: int) -> float:
    return (math.tanh(schedule.steepness * (step / total_steps - 0.5)) + 1.0) / 2.0


_FACTORS: Mapping[str, Callable[[Any, int, int], float]] = MappingProxyType(
    {
        "constant": _constant,
        "linear": _linear,
        "cosine": _cosine,
        "exponential": _exponential,
        "inverse_power": _inverse_power,
        "tanh": _tanh,
    }
)
