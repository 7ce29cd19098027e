"""Axes: their range, their ticks, and where a value lies on them."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass

_LOG_RANGE = 25.0
_MOST_LINEAR = 12.0


@dataclass(frozen=True)
class Axis:
    """A linear or logarithmic axis from `low` to `high`; `write` gives a tick as text."""

    title: str
    low: float
    high: float
    write: Callable[[float], str]
    is_logarithmic: bool = False

    def share(self, value: float) -> float:
        """Return where `value` lies, 0 at the low end and 1 at the high one; beyond them for values outside."""
        if self.is_logarithmic:
            floor = self.low / 1e3
            return (math.log(max(value, floor)) - math.log(self.low)) / (math.log(self.high) - math.log(self.low))
        return (value - self.low) / (self.high - self.low)

    def ticks(self, most: int = 6) -> tuple[float, ...]:
        """Return round values on the axis, at most about `most`."""
        return _log_ticks(self.low, self.high, most) if self.is_logarithmic else _even_ticks(self.low, self.high, most)


def linear_axis(title: str, values: Iterable[float], write: Callable[[float], str], *, margin: float = 0.05) -> Axis:
    """Return an axis that holds all finite `values`, with a margin of this share at both ends."""
    low, high = _ends(values)
    room = (high - low) * margin
    return Axis(title, low - room, high + room, write)


def loss_axis(title: str, values: Sequence[float], write: Callable[[float], str]) -> Axis:
    """Return an axis from 0, or a logarithmic one where a linear one would hide the small values."""
    positive = [value for value in values if math.isfinite(value) and value > 0]
    if not positive:
        return Axis(title, 0.0, 1.0, write)
    if max(positive) / min(positive) > _LOG_RANGE:
        # a few values near 0 must not take the whole height
        low = max(min(positive), max(positive) / 1e5)
        return Axis(title, low / 1.3, max(positive) * 1.3, write, is_logarithmic=True)
    return Axis(title, 0.0, max(positive) * 1.06, write)


def height_axis(title: str, values: Iterable[float], write: Callable[[float], str]) -> Axis:
    """Return an axis from 0 as in the paper; a logarithmic one where the loss grows beyond all measure."""
    finite = [value for value in values if math.isfinite(value)]
    if max(finite, default=0.0) > _MOST_LINEAR:
        return loss_axis(title, finite, write)
    return Axis(title, 0.0, max(finite, default=0.0) * 1.03 or 1.0, write)


def span_axis(title: str, values: Iterable[float], write: Callable[[float], str]) -> Axis:
    """Return an axis for what is walked along: it begins and ends with the values."""
    low, high = _ends(values)
    return Axis(title, low, high, write)


def plain(value: float) -> str:
    """Return a tick without superfluous digits."""
    return f"{value:,.10g}" if abs(value) >= 1000 else f"{value:.6g}".replace("-", "\u2212")


def percent_tick(value: float) -> str:
    """Return a share in [0, 1] as a percentage."""
    return f"{value * 100:.6g}"


def _ends(values: Iterable[float]) -> tuple[float, float]:
    finite = [value for value in values if math.isfinite(value)]
    low, high = (min(finite), max(finite)) if finite else (0.0, 1.0)
    if high - low < 1e-9 * max(1.0, abs(high)):
        room = abs(high) * 0.05 or 0.5
        return low - room, high + room
    return low, high


def _even_ticks(low: float, high: float, most: int) -> tuple[float, ...]:
    rough = (high - low) / most
    power = 10.0 ** math.floor(math.log10(rough))
    step = next(factor * power for factor in (1, 2, 5, 10) if factor * power >= rough * 0.999)
    first, last = math.ceil(low / step - 1e-9), math.floor(high / step + 1e-9)
    return tuple(round(index * step, 12) for index in range(first, last + 1))


def _log_ticks(low: float, high: float, most: int) -> tuple[float, ...]:
    powers = range(math.floor(math.log10(low)), math.ceil(math.log10(high)) + 1)
    for factors in ((1, 2, 5), (1, 3), (1,)):
        ticks = [factor * 10.0**power for power in powers for factor in factors]
        inside = tuple(tick for tick in ticks if low <= tick <= high)
        if len(inside) <= most + 1:
            return inside
    return inside[:: math.ceil(len(inside) / most)]
