"""Which points of weight space a landscape shows, and what the weights are there."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Protocol

import torch


@dataclass(frozen=True)
class Point:
    """A place: `alpha` along direction number `direction`, `beta` along a plane's second one (else 0)."""

    direction: int
    alpha: float
    beta: float = 0.0


@dataclass(frozen=True)
class Place:
    """A model's state: trainable weights [n] and running statistics [m] (means and variances), both flat."""

    weights: torch.Tensor
    statistics: torch.Tensor


class Walk(Protocol):
    """From a point to the state there."""

    def at(self, point: Point) -> Place:
        """Return the state at `point`, float32."""


def axis(start: float, stop: float, points: int) -> tuple[float, ...]:
    """Return `points` evenly spaced numbers from `start` to `stop`; 0 and 1 are exact where they are among them."""
    assert points >= 2
    return tuple(round(start + (stop - start) * index / (points - 1), 12) + 0.0 for index in range(points))


def line_points(alphas: tuple[float, ...], directions: int) -> tuple[Point, ...]:
    """Return the points of `directions` lines, one line after the other."""
    return tuple(Point(direction, alpha) for direction in range(directions) for alpha in alphas)


def plane_points(alphas: tuple[float, ...], betas: tuple[float, ...]) -> tuple[Point, ...]:
    """Return the points of a plane, row by row of equal beta."""
    return tuple(Point(0, alpha, beta) for beta in betas for alpha in alphas)


class Interpolation:
    """(1 - alpha) `first` + alpha `second`, running statistics alike; a variance does not fall below 0."""

    def __init__(self, first: Place, second: Place, is_variance: torch.Tensor) -> None:
        """Walk between two states; `is_variance` says which statistics are variances, bool [m]."""
        self._first = Place(first.weights.double(), first.statistics.double())
        self._second = Place(second.weights.double(), second.statistics.double())
        self._is_variance = is_variance

    def at(self, point: Point) -> Place:
        """Return the state at `point`."""
        first, second, alpha = self._first, self._second, point.alpha
        statistics = (1.0 - alpha) * first.statistics + alpha * second.statistics
        statistics = torch.where(self._is_variance, statistics.clamp(min=0.0), statistics)
        return Place(((1.0 - alpha) * first.weights + alpha * second.weights).float(), statistics.float())

    @property
    def distances(self) -> list[float]:
        """The distance that alpha = 1 is from alpha = 0."""
        return [float((self._second.weights - self._first.weights).norm())]


class Directions:
    """`origin` + alpha d, d the direction of the point's number; running statistics stay those of `origin`."""

    def __init__(self, origin: Place, direction: Callable[[int], torch.Tensor]) -> None:
        """Walk from `origin`; `direction` gives the direction of a number, float64 [n]."""
        self._origin = origin
        self._direction = direction
        # Points come line by line: the latest direction is the next one, too.
        self._latest: tuple[int, torch.Tensor] | None = None

    def at(self, point: Point) -> Place:
        """Return the state at `point`."""
        if self._latest is None or self._latest[0] != point.direction:
            self._latest = (point.direction, self._direction(point.direction))
        moved = self._origin.weights.double().add_(self._latest[1], alpha=point.alpha)
        return Place(moved.float(), self._origin.statistics)


class Plane:
    """`origin` + alpha d1 + beta d2; running statistics stay those of `origin`."""

    def __init__(self, origin: Place, first: torch.Tensor, second: torch.Tensor) -> None:
        """Walk from `origin` along two directions, float64 [n]."""
        self._origin = origin
        self._first = first
        self._second = second

    def at(self, point: Point) -> Place:
        """Return the state at `point`."""
        moved = self._origin.weights.double().add_(self._first, alpha=point.alpha)
        return Place(moved.add_(self._second, alpha=point.beta).float(), self._origin.statistics)
