"""Keskar et al.'s sharpness (arXiv 1609.04836, equation 3 and metric 2.1): how far the loss can rise within a box."""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass
from typing import Protocol

import numpy as np
import torch
from scipy.optimize import Bounds, minimize

from dist_train.analysis.subset_loss import Vector
from dist_train.randomness import generator

_FIRST_STEP = 100.0
"""How far the first step goes along a coordinate of average slope, where 1 is the way to the wall of the box."""


class SmoothLoss(Protocol):
    """A loss that is known by its values and gradients."""

    def point(self) -> Vector:
        """Return where it is to be measured."""

    def value_and_gradient(self, point: Vector) -> tuple[float, Vector]:
        """Return the loss at `point` and its gradient."""


@dataclass(frozen=True)
class Ascent:
    """The box, and how its highest point is looked for.

    `starts` ascents of at most `iterations` each: one from the point itself, the others from within the box, where
    the `seed` says. At a minimum the gradient vanishes, and an ascent from there would stay.
    """

    epsilon: float = 1e-3
    iterations: int = 10
    starts: int = 2
    seed: int = 0


def full_space(loss: SmoothLoss, ascent: Ascent) -> float:
    """Return 100 (max L(x + y) - L(x)) / (1 + L(x)) over |y_i| <= epsilon (|x_i| + 1), every weight for itself."""
    point = loss.point()
    radii = ascent.epsilon * (np.abs(point) + 1.0)

    def within(inside: Vector) -> tuple[float, Vector]:
        value, gradient = loss.value_and_gradient(point + radii * inside)
        return value, radii * gradient

    return _sharpness(within, len(point), ascent)


def subspace(loss: SmoothLoss, ascent: Ascent, dimensions: int) -> float:
    """Return 100 (max L(x + A y) - L(x)) / (1 + L(x)) over |y_i| <= epsilon (|(A+ x)_i| + 1).

    The columns of A [weights, dimensions] are random directions of length 1; A+ is its pseudo-inverse.
    """
    point = loss.point()
    directions = random_directions(len(point), dimensions, ascent.seed)
    radii = ascent.epsilon * (np.abs(coordinates(directions, point)) + 1.0)

    def within(inside: Vector) -> tuple[float, Vector]:
        value, gradient = loss.value_and_gradient(point + _combined(directions, radii * inside))
        return value, radii * _products(directions, gradient)

    return _sharpness(within, dimensions, ascent)


def random_directions(weights: int, dimensions: int, seed: int) -> torch.Tensor:
    """Return random directions of length 1 as rows, float32 [dimensions, weights]: A, transposed.

    Float32, since this is by far the largest array here: the rounding of a direction makes it another one, no worse.
    """
    assert dimensions <= weights
    directions = torch.empty(dimensions, weights)
    for index, direction in enumerate(directions):
        direction.normal_(generator=generator(seed, "random subspace", index))
        direction /= torch.linalg.vector_norm(direction)
    return directions


def coordinates(directions: torch.Tensor, point: Vector) -> Vector:
    """Return A+ x = (A' A)^-1 A' x, float64 [dimensions]: `point` as the subspace sees it."""
    gram = (directions @ directions.T).double().numpy()
    solved: Vector = np.linalg.solve(gram, _products(directions, point))
    return solved


def _products(directions: torch.Tensor, vector: Vector) -> Vector:
    products: Vector = (directions @ torch.from_numpy(vector).float()).double().numpy()
    return products


def _combined(directions: torch.Tensor, amounts: Vector) -> Vector:
    combined: Vector = (torch.from_numpy(amounts).float() @ directions).double().numpy()
    return combined


def _sharpness(within: Callable[[Vector], tuple[float, Vector]], dimensions: int, ascent: Ascent) -> float:
    """Return the measure of a loss over the unit box |z_i| <= 1, which `within` maps to the box in question."""
    middle = np.zeros(dimensions)
    value, _ = within(middle)
    highest = max(_climb(within, start, ascent.iterations) for start in [middle, *_starts(dimensions, ascent)])
    return 100.0 * (highest - value) / (1.0 + value)


def _starts(dimensions: int, ascent: Ascent) -> list[Vector]:
    draws = [
        torch.rand(dimensions, dtype=torch.float64, generator=generator(ascent.seed, "ascent", index))
        for index in range(1, ascent.starts)
    ]
    return [2.0 * draw.numpy() - 1.0 for draw in draws]


def _climb(within: Callable[[Vector], tuple[float, Vector]], start: Vector, iterations: int) -> float:
    """Return the highest value that an ascent from `start` within the unit box meets; infinite where one is NaN.

    L-BFGS-B takes its first step along the gradient as it is, and stops where values or gradients seem small, both
    in absolute numbers. The loss of a network that has learnt its samples is so flat that it would not even begin.
    So the loss is scaled, and only the number of iterations ends the ascent.
    """
    value, gradient = within(start)
    if not math.isfinite(value):
        return math.inf
    steepness = float(np.abs(gradient).mean())
    scale = _FIRST_STEP / steepness if steepness > 0 else 1.0
    highest = value

    def descend(inside: Vector) -> tuple[float, Vector]:
        nonlocal highest
        met, slope = within(inside)
        # max would pass over a NaN: a loss that has left the range of numbers has no highest value.
        highest = max(highest, met) if math.isfinite(met) else math.inf
        return scale * (value - met), -scale * slope

    minimize(
        descend,
        start,
        jac=True,
        method="L-BFGS-B",
        bounds=Bounds(-np.ones_like(start), np.ones_like(start)),
        options={"maxiter": iterations, "ftol": 0.0, "gtol": 0.0},
    )
    return highest
