"""Directions in weight space, and the width of the loss basin along them.

Directions are random and filter-normalized (arXiv 1712.09913), or the principal directions of a trajectory. A width is
the interval of alpha where the training loss stays below a multiple of its minimum (`basin_width`), or where it rises
by at most an absolute amount (`ends`).
"""

from __future__ import annotations

import math
import statistics
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, dataclass
from functools import cache
from itertools import product
from pathlib import Path
from typing import Any

import torch
from scipy.optimize import brentq

from dist_train.analysis.landscape_points import Subject, place_in
from dist_train.checkpoint.files import Stored, list_checkpoints
from dist_train.monitoring.wording import plural
from dist_train.optim.flat_weights import FlatWeights
from dist_train.outcome import UsageError
from dist_train.reproducible import generator

Normalize = Callable[[torch.Tensor, torch.Tensor], torch.Tensor]
"""(drawn tensor, weights of that tensor) -> the direction's part for that tensor; all float64."""


def random_direction(
    weights: FlatWeights, normalization: str, exclude: Sequence[str], seed: int, index: int
) -> torch.Tensor:
    """Return direction number `index` of `seed`, float64 [n] on the CPU; 0 for the weights that `exclude` names.

    Each tensor has its own random stream, so excluding one does not change the others.
    """
    normalize = NORMALIZATIONS[normalization]
    excluded = set(weights.excluded(exclude))
    values = weights.values.detach().cpu()
    direction = torch.zeros(len(values), dtype=torch.float64)
    for segment in weights.segments:
        if segment in excluded:
            continue
        stream = generator(seed, "landscape direction", index, segment.name)
        drawn = torch.empty(segment.shape).normal_(generator=stream).double()
        current = values[segment.start : segment.stop].view(segment.shape).double()
        direction[segment.start : segment.stop] = normalize(drawn, current).flatten()
    return direction


def _by_filter(drawn: torch.Tensor, weights: torch.Tensor) -> torch.Tensor:
    """Scale each filter (slice along dimension 0; a 1-D tensor is one filter) to the norm of the weights' filter."""
    if drawn.dim() < 2:
        return _by_layer(drawn, weights)
    lengths: torch.Tensor = weights.flatten(1).norm(dim=1) / drawn.flatten(1).norm(dim=1)
    return lengths.view(-1, *(1,) * (drawn.dim() - 1)) * drawn


def _by_layer(drawn: torch.Tensor, weights: torch.Tensor) -> torch.Tensor:
    length: torch.Tensor = weights.norm() / drawn.norm()
    return length * drawn


NORMALIZATIONS: Mapping[str, Normalize] = {
    "filter": _by_filter,
    "layer": _by_layer,
    "none": lambda drawn, weights: drawn,
}
"""How a drawn direction is scaled. none: not at all, each component has variance 1."""


_MARGIN = 0.25  # how far the plane extends beyond the checkpoints, as a fraction of their extent


@dataclass(frozen=True)
class Trajectory:
    """Two unit directions, float64 [n], and each checkpoint's coordinates relative to the last one, at (0, 0).

    `explained` is the fraction of the squared distances from the last checkpoint that each direction accounts for.
    """

    directions: tuple[torch.Tensor, torch.Tensor]
    steps: tuple[int, ...]
    coordinates: tuple[tuple[float, float], ...]
    explained: tuple[float, float]

    @property
    def reaches(self) -> tuple[tuple[float, float], tuple[float, float]]:
        """The range along each direction that shows all checkpoints, with a margin."""
        alphas, betas = zip(*self.coordinates, strict=True)
        return _with_margin(alphas), _with_margin(betas)

    def record(self) -> dict[str, Any]:
        """Return the fields that settings.json records."""
        path = [
            {"step": step, "alpha": alpha, "beta": beta}
            for step, (alpha, beta) in zip(self.steps, self.coordinates, strict=True)
        ]
        return {"trajectory": {"explained": list(self.explained), "path": path}}


def run_checkpoints(last: Path) -> list[Path]:
    """Return the run's checkpoints up to `last`, earliest first. Raises UsageError if there are fewer than three."""
    files = list_checkpoints(last.parent)
    ends = [file.step for file in files if file.path.name == last.name]
    paths = [file.path for file in files if ends and file.step <= ends[0]]
    if len(paths) < 3:
        raise UsageError(
            f"{last.parent} holds {plural(len(paths), 'checkpoint')} up to {last.name}: a trajectory needs three "
            f"or more; train with a larger checkpoint.keep",
            code="too-few-checkpoints",
        )
    return paths


def trace(checkpoints: Sequence[Stored], subject: Subject, mask: torch.Tensor) -> Trajectory:
    """Return the trajectory of `checkpoints` towards the last one; weights where `mask` is 0 are ignored."""
    last = subject.place.weights
    displacements = torch.stack([(place_in(stored, subject).weights - last) * mask for stored in checkpoints])
    return principal_plane(displacements, tuple(stored.contents.step for stored in checkpoints))


def principal_plane(displacements: torch.Tensor, steps: tuple[int, ...]) -> Trajectory:
    """Return the principal plane of `displacements` [k, n], one for each of `steps`; not centred, so it contains 0.

    Raises UsageError if they do not span a plane, or are not finite.
    """
    if not displacements.isfinite().all():
        raise UsageError(
            "a checkpoint's weights are not finite, so there is no plane: name an earlier checkpoint", code="no-plane"
        )
    displacements = displacements.double()
    values, vectors = torch.linalg.eigh(displacements @ displacements.T)
    values, vectors = values.flip(0), vectors.flip(1)
    if not values[1] > 1e-12 * values[0]:
        raise UsageError(
            "the checkpoints lie on a line or coincide, so they span no plane: choose another run", code="no-plane"
        )
    directions = []
    for index in range(2):
        vector = vectors[:, index]
        # An eigenvector's sign is arbitrary: choose the one that puts the first checkpoint on the positive side.
        if vector[vector.abs() > 1e-6][0] < 0:
            vector = -vector
        directions.append(vector @ displacements / values[index].sqrt())
    projections = torch.stack([displacements @ direction for direction in directions], dim=1).tolist()
    first, second = (values[:2] / values.sum()).tolist()
    coordinates = tuple((alpha, beta) for alpha, beta in projections)
    return Trajectory((directions[0], directions[1]), steps, coordinates, (first, second))


def _with_margin(values: Sequence[float]) -> tuple[float, float]:
    extent = max(values) - min(values)
    return min(values) - _MARGIN * extent, max(values) + _MARGIN * extent


FACTORS = (2.0, 10.0)


@dataclass(frozen=True)
class Width:
    """The interval [left, right] around a minimum. An open end is the line's last point: the basin extends beyond it.

    `points` counts the line's points in the interval, the minimum included. If it is 1, both ends are interpolated
    from points outside, and the width is unresolved.
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
        """right - left; a lower bound if an end is open."""
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
    """Return the width of the basin around the lowest minimum at the indices `among` (default: all); None without one.

    No neighbour of a minimum is lower: a slope that leads down, out of `among`, belongs to another basin. Ends are
    interpolated linearly between points. A loss that is not finite counts as above the limit.
    """
    candidates = [index for index in (range(len(losses)) if among is None else among) if _is_minimum(losses, index)]
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


def _is_minimum(losses: Sequence[float], index: int) -> bool:
    neighbours = losses[max(0, index - 1) : index + 2]
    return math.isfinite(losses[index]) and not any(loss < losses[index] for loss in neighbours)


def _end(alphas: Sequence[float], losses: Sequence[float], start: int, step: int, limit: float) -> tuple[float, bool]:
    """Walk from `start` in steps of `step`; return where the loss exceeds `limit`, and whether it never does."""
    inside = start
    while 0 <= (outside := inside + step) < len(losses):
        if not losses[outside] <= limit:
            if not math.isfinite(losses[outside]):
                return alphas[inside], False
            part = (limit - losses[inside]) / (losses[outside] - losses[inside])
            return alphas[inside] + part * (alphas[outside] - alphas[inside]), False
        inside = outside
    return alphas[inside], True


_FIRST_FRACTION, _GROWTH, _TOLERANCE, _HUGE = 1 / 64, 2.0**0.5, 1e-3, 1e30


def ends(rise_at: Callable[[float], float], rises: Sequence[float], reach: float) -> list[float | None]:
    """Return the distance from 0 where `rise_at` first exceeds each of `rises`, to 0.1 %; None: not within `reach`.

    `rise_at` is evaluated at reach / 64 and each time 1.4 times as far, and the crossing is refined by Brent's method:
    a barrier between two of these distances is missed. A rise that is not finite counts as above every amount.
    """

    @cache
    def rise(distance: float) -> float:
        value = rise_at(distance) if distance > 0 else 0.0
        return value if math.isfinite(value) else _HUGE

    found: dict[float, float | None] = {}
    inside, outside = 0.0, reach * _FIRST_FRACTION
    for amount in sorted(rises):
        while rise(outside) <= amount and outside < reach:
            inside, outside = outside, min(reach, outside * _GROWTH)
        found[amount] = None
        if rise(outside) > amount:
            found[amount] = brentq(lambda at: rise(at) - amount, inside, outside, xtol=1e-12, rtol=_TOLERANCE)  # noqa: B023
    return [found[amount] for amount in rises]


def summarize(widths: Sequence[Width]) -> dict[str, Any]:
    """Return the widths by basin and factor, as settings.json records them: statistics, and each direction's width."""
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
    """Return one line for the user, without the direction's number."""
    ends = {(True, True): "both ends open", (True, False): "left end open", (False, True): "right end open"}
    note = ends.get((width.is_open_left, width.is_open_right))
    least = "at least " if note else ""
    if not note and width.points < 2:
        note = "unresolved: it contains no other point of the line"
    return (
        f"basin of {width.basin}: loss under {width.factor:g} x {width.minimum_loss:.4g} "
        f"(at alpha {width.minimum_alpha:g}) from {width.left:.4g} to {width.right:.4g}: "
        f"width {least}{width.width:.4g}{f' ({note})' if note else ''}"
    )
