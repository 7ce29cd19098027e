"""How wide a basin is: the interval of alpha where the training loss stays under a multiple of its minimum.

Or where it rises by no more than an absolute amount, on a grid that closes in on the ends.
"""

from __future__ import annotations

import math
import statistics
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass
from functools import cache
from itertools import product
from typing import Any

from scipy.optimize import brentq

FACTORS = (2.0, 10.0)


@dataclass(frozen=True)
class Width:
    """The interval [left, right] around a minimum; an open end is the last point of the line: it lies further out.

    `points` of the line lie in it, the minimum among them: with that alone both ends are guessed from points outside.
    """

    direction: int
    basin: str
    factor: float
    minimum_alpha: float
    minimum_loss: float
    left: float
    right: float
    is_open_left: bool
    is_open_right: bool
    points: int

    @property
    def width(self) -> float:
        """right - left: at least so much, where an end is open."""
        return self.right - self.left


def basin_width(
    alphas: Sequence[float],
    losses: Sequence[float],
    factor: float,
    *,
    direction: int = 0,
    basin: str = "A",
    among: Sequence[int] | None = None,
) -> Width | None:
    """Return the width of the basin of the least of `losses`, looked for at the places `among` (else everywhere).

    Ends are interpolated linearly between points. A loss that is not finite is above everything. None: no loss
    is finite.
    """
    candidates = [index for index in (range(len(losses)) if among is None else among) if math.isfinite(losses[index])]
    if not candidates:
        return None
    lowest = min(candidates, key=lambda index: losses[index])
    limit = factor * losses[lowest]
    left, is_open_left = _end(alphas, losses, lowest, -1, limit)
    right, is_open_right = _end(alphas, losses, lowest, 1, limit)
    points = sum(left <= alpha <= right for alpha in alphas)
    return Width(
        direction, basin, factor, alphas[lowest], losses[lowest], left, right, is_open_left, is_open_right, points
    )


def _end(alphas: Sequence[float], losses: Sequence[float], start: int, step: int, limit: float) -> tuple[float, bool]:
    """Return where the loss rises above `limit`, from `start` on in steps of `step`; and whether it does not."""
    inside = start
    while 0 <= (outside := inside + step) < len(losses):
        if not losses[outside] <= limit:
            if not math.isfinite(losses[outside]):
                return alphas[inside], False
            part = (limit - losses[inside]) / (losses[outside] - losses[inside])
            return alphas[inside] + part * (alphas[outside] - alphas[inside]), False
        inside = outside
    return alphas[inside], True


_FIRST, _RATIO, _TOLERANCE, _HUGE = 1 / 64, 2.0**0.5, 1e-3, 1e30


def ends(rise_at: Callable[[float], float], rises: Sequence[float], reach: float) -> list[float | None]:
    """Return how far from 0 `rise_at` first exceeds each of `rises`, to a thousandth; None: not within `reach`.

    Seen at reach / 64 and each time 1.4 times as far, then between two of these: a narrower barrier is missed. A rise
    that is not finite is above everything.
    """

    @cache
    def rise(distance: float) -> float:
        value = rise_at(distance) if distance > 0 else 0.0
        return value if math.isfinite(value) else _HUGE

    found: list[float | None] = []
    inside, outside = 0.0, reach * _FIRST
    for amount in sorted(rises):
        while rise(outside) <= amount and outside < reach:
            inside, outside = outside, min(reach, outside * _RATIO)
        if rise(outside) <= amount:
            found.append(None)
        else:
            found.append(float(brentq(lambda at: rise(at) - amount, inside, outside, xtol=1e-12, rtol=_TOLERANCE)))  # noqa: B023
    return [dict(zip(sorted(rises), found, strict=True))[amount] for amount in rises]


def summarize(widths: Sequence[Width]) -> dict[str, Any]:
    """Return what settings.json records: by basin and factor the mean, deviation, open ones, and each direction's."""
    summary: dict[str, Any] = {basin: {} for basin in sorted({width.basin for width in widths})}
    for basin, factor in product(summary, FACTORS):
        chosen = [width for width in widths if width.basin == basin and width.factor == factor]
        values = [width.width for width in chosen]
        summary[basin][f"{factor:g}"] = {
            "mean": statistics.fmean(values),
            "standard_deviation": statistics.stdev(values) if len(values) > 1 else None,
            "open": sum(width.is_open_left or width.is_open_right for width in chosen),
            "directions": [{**asdict(width), "width": width.width} for width in chosen],
        }
    return summary


def describe(width: Width) -> str:
    """Return one line for the user."""
    ends = {(True, True): "both ends open", (True, False): "left end open", (False, True): "right end open"}
    note = ends.get((width.is_open_left, width.is_open_right))
    least = "at least " if note else ""
    if not note and width.points < 2:
        note = "unresolved: no other point of the line lies in it"
    return (
        f"direction {width.direction}, basin of {width.basin}: loss under {width.factor:g} x {width.minimum_loss:.4g} "
        f"(at alpha {width.minimum_alpha:g}) from {width.left:.4g} to {width.right:.4g}: "
        f"width {least}{width.width:.4g}{f' ({note})' if note else ''}"
    )
