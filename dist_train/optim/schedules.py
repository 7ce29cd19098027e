"""The learning rate and the noise amplitude as functions of the step."""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any, SupportsFloat

from dist_train.config import NoiseSchedule, ScheduleSettings
from dist_train.config.plugins import Options, call_plugin, failing_clearly, is_plugin
from dist_train.outcome import PluginResultError
from dist_train.rundir.epochs import Epochs


@dataclass(frozen=True)
class LearningRate:
    """The learning rate of each update, in a run of `epochs` epochs."""

    settings: ScheduleSettings
    base: float
    global_size: int
    epochs: int
    calendar: Epochs  # which updates make up an epoch of the schedule

    @property
    def peak(self) -> float:
        """The rate after the warm-up, scaled for the global batch."""
        return self.base * _SCALINGS[self.settings.scaling](self.global_size / self.settings.base_batch)

    def at(self, step: int) -> float:
        """Return the learning rate of update `step`, counted from 0. Raises UsageError for a plug-in's bad factor."""
        epoch = self.calendar.done(step)
        warmup = self.settings.warmup_epochs
        if epoch < warmup:
            return self.base + (self.peak - self.base) * epoch / warmup
        name = self.settings.decay
        if is_plugin(name):
            return self.peak * _plugin_factor(name, self.settings.options, step, _decay_progress(self, epoch))
        return self.peak * _DECAYS[name](self, epoch)


def _decay_progress(rate: LearningRate, epoch: float) -> float:
    """Return the fraction of the time after the warm-up that has passed, in [0, 1]."""
    warmup = rate.settings.warmup_epochs
    return min(1.0, (epoch - warmup) / (rate.epochs - warmup)) if rate.epochs > warmup else 0.0


def _plugin_factor(name: str, options: Options, step: int, *arguments: float) -> float:
    """Return the plug-in's factor for update `step`. Raises UsageError unless it is finite and at least 0."""
    result = call_plugin(name, options, SupportsFloat, *arguments)
    with failing_clearly(name):
        factor = float(result)
    if not 0.0 <= factor < math.inf:
        raise PluginResultError(
            f"{name} returned {factor:g} for update {step + 1}: a factor is a finite number of at least 0"
        )
    return factor


_SCALINGS: Mapping[str, Callable[[float], float]] = {
    "none": lambda ratio: 1.0,
    "linear": lambda ratio: ratio,
    "sqrt": math.sqrt,
}
_DECAYS: Mapping[str, Callable[[LearningRate, float], float]] = {
    "constant": lambda rate, epoch: 1.0,
    "step": lambda rate, epoch: rate.settings.factor ** sum(epoch >= each for each in rate.settings.milestones),
    "cosine": lambda rate, epoch: (1.0 + math.cos(math.pi * _decay_progress(rate, epoch))) / 2.0,
    "exponential": lambda rate, epoch: rate.settings.final_fraction ** _decay_progress(rate, epoch),
    "poly": lambda rate, epoch: float((1.0 - _decay_progress(rate, epoch)) ** rate.settings.power),
}


def noise_factor(schedule: NoiseSchedule, step: int, total_steps: int) -> float:
    """Return c(t), the factor on the noise amplitude, at update `step` of `total_steps`, counted from 0.

    Raises UsageError if a plug-in's factor is not finite and at least 0.
    """
    return float(_FACTORS[schedule.kind](schedule, step, total_steps))


_FACTORS: Mapping[str, Callable[[Any, int, int], float]] = {
    "constant": lambda schedule, step, total: 1.0,
    "linear": lambda schedule, step, total: 1.0 - step / total,
    "cosine": lambda schedule, step, total: (1.0 + math.cos(math.pi * step / total)) / 2.0,
    "exponential": lambda schedule, step, total: schedule.final_fraction ** (step / total),
    "inverse_power": lambda schedule, step, total: (1.0 + step) ** (-schedule.gamma / 2.0),
    "late": lambda schedule, step, total: float(step / total >= schedule.start),
    "rise": lambda schedule, step, total: 1.0 + schedule.rise * (1.0 - math.cos(math.pi * step / total)) / 2.0,
    "plugin": lambda schedule, step, total: _plugin_factor(schedule.function, schedule.options, step, step, total),
    "tanh": lambda schedule, step, total: (math.tanh(schedule.steepness * (step / total - 0.5)) + 1.0) / 2.0,
}
