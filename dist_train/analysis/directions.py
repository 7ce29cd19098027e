"""Directions in weight space, and how wide the basin of the loss is along them.

Directions are random and filter-normalized (arXiv 1712.09913), or principal to a trajectory. A width is the interval
of alpha where the training loss stays under a multiple of its minimum, or where it rises by no more than an absolute
amount, on a grid that closes in on the ends.
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
from dist_train.checkpoint.files import Stored, list_checkpoints, read_stored
from dist_train.optim.flat_weights import FlatWeights
from dist_train.outcome import UsageError
from dist_train.reproducible import generator

Normalize = Callable[[torch.Tensor, torch.Tensor], torch.Tensor]
"""(drawn, weights of the same tensor) -> the part of the direction that moves this tensor; both float64."""


def random_direction(
    weights: FlatWeights, normalization: str, exclude: Sequence[str], seed: int, index: int
) -> torch.Tensor:
    """Return direction number `index` of `seed`, float64 [n] on the CPU; 0 where `exclude` names the weights.

    Each tensor has a stream of its own: what is excluded does not change the rest.
    """
    normalize = NORMALIZATIONS[normalization]
    left_out = set(weights.excluded(exclude))
    values = weights.values.detach().cpu()
    direction = torch.zeros(len(values), dtype=torch.float64)
    for segment in weights.segments:
        if segment in left_out:
            continue
        stream = generator(seed, "landscape direction", index, segment.name)
        drawn = torch.empty(segment.shape).normal_(generator=stream).double()
        here = values[segment.start : segment.stop].view(segment.shape).double()
        direction[segment.start : segment.stop] = normalize(drawn, here).flatten()
    return direction


def check_exclusions(weights: FlatWeights, exclude: Sequence[str]) -> None:
    """Raise UsageError where a pattern names no weight, or all of them are excluded."""
    kinds = {"norm", "bias", "weight"}
    for pattern in exclude:
        if pattern not in kinds and not weights.excluded([pattern]):
            names = ", ".join(segment.name for segment in weights.segments)
            raise UsageError(f"--exclude {pattern}: no weight has this name; names are {names}", code="no-such-weight")
    if len(weights.excluded(exclude)) == len(weights.segments):
        raise UsageError("--exclude leaves no weight to move", code="nothing-to-move")


def _by_filter(drawn: torch.Tensor, weights: torch.Tensor) -> torch.Tensor:
    """Give each filter (slice along dimension 0; a tensor of one dimension is one) the norm of the weights' filter."""
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
"""How a drawn direction is scaled. none: as drawn, each component of variance 1."""


_MARGIN = 0.25
"""How far the plane reaches beyond the checkpoints, as a part of their extent."""
_CHUNK = 1 << 20


@dataclass(frozen=True)
class Trajectory:
    """Unit directions, float64 [n] each; each checkpoint's coordinates, relative to the last one, which is at (0, 0).

    `explained` is what part of the squared distances from the last checkpoint each direction accounts for.
    """

    directions: tuple[torch.Tensor, torch.Tensor]
    steps: tuple[int, ...]
    coordinates: tuple[tuple[float, float], ...]
    explained: tuple[float, float]

    @property
    def reaches(self) -> tuple[tuple[float, float], tuple[float, float]]:
        """From where to where a plane must reach along each direction to show all checkpoints."""
        return _reach([first for first, _ in self.coordinates]), _reach([second for _, second in self.coordinates])

    def record(self) -> dict[str, Any]:
        """Return what settings.json says of it."""
        path = [
            {"step": step, "alpha": alpha, "beta": beta}
            for step, (alpha, beta) in zip(self.steps, self.coordinates, strict=True)
        ]
        return {"trajectory": {"explained": list(self.explained), "path": path}}


def run_checkpoints(last: Path) -> list[Stored]:
    """Return the checkpoints of the run of checkpoint `last`, up to it, the earliest first.

    Raises:
        UsageError: there are fewer than three.
    """
    files = list_checkpoints(last.parent)
    ends = [file.step for file in files if file.path.name == last.name]
    paths = [file.path for file in files if ends and file.step <= ends[0]]
    if len(paths) < 3:
        raise UsageError(
            f"{last.parent} holds {len(paths)} checkpoints up to {last.name}: a trajectory needs three or more; "
            f"train with a larger checkpoint.keep",
            code="too-few-checkpoints",
        )
    return [read_stored(path) for path in paths]


def trace(checkpoints: Sequence[Stored], subject: Subject, mask: torch.Tensor) -> Trajectory:
    """Return the way of `checkpoints` to the last of them; weights where `mask` is 0 are left out."""
    last = subject.place.weights
    ways = torch.stack([(place_in(stored, subject).weights - last) * mask for stored in checkpoints])
    return principal_plane(ways, tuple(stored.contents.step for stored in checkpoints))


def principal_plane(ways: torch.Tensor, steps: tuple[int, ...]) -> Trajectory:
    """Return the principal plane of the `ways` [k, n] to the checkpoints of `steps`, not centred: 0 is on the plane.

    Raises:
        UsageError: they do not span a plane.
    """
    products = sum((part.double() @ part.double().T for part in ways.split(_CHUNK, dim=1)), torch.zeros(()).double())
    values, vectors = torch.linalg.eigh(products)
    values, vectors = values.flip(0), vectors.flip(1)
    if not values[1] > 1e-12 * values[0]:
        raise UsageError("the checkpoints lie on a line, or on a point: they span no plane", code="no-plane")
    directions = []
    for index in range(2):
        vector = vectors[:, index]
        # An eigenvector's sign is arbitrary: the first checkpoint lies on the positive side.
        if vector[vector.abs() > 1e-6][0] < 0:
            vector = -vector
        directions.append(vector @ ways.double() / values[index].sqrt())
    coordinates = torch.stack([ways.double() @ direction for direction in directions], dim=1).tolist()
    first, second = (values[:2] / values.sum()).tolist()
    places = tuple((alpha, beta) for alpha, beta in coordinates)
    return Trajectory((directions[0], directions[1]), steps, places, (first, second))


def _reach(values: Sequence[float]) -> tuple[float, float]:
    extent = max(values) - min(values)
    return min(values) - _MARGIN * extent, max(values) + _MARGIN * extent


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
