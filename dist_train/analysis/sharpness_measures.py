"""Measures of sharpness: the rise under uniform noise, the Hessian's eigenvalues and trace, Keskar et al.'s."""

from __future__ import annotations

import logging
import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Protocol

import numpy as np
import torch
from numpy.typing import NDArray
from scipy.optimize import Bounds, minimize
from scipy.sparse.linalg import ArpackNoConvergence, LinearOperator, eigsh

from dist_train.analysis.subset_loss import SubsetLoss, Vector
from dist_train.config import NoiseSettings
from dist_train.optim.noise_draws import NoiseDraws
from dist_train.randomness import generator


@dataclass(frozen=True)
class Rise:
    """Mean of L(w + a u) - L(w) over `draws` draws of u and their opposites, and its standard error over draws."""

    amplitude: float
    mean: float
    standard_error: float
    draws: int


def expected_rises(
    loss: SubsetLoss, noise: NoiseSettings, amplitudes: Sequence[float], *, draws: int, seed: int
) -> tuple[Rise, ...]:
    """Return the expected rise at each of `amplitudes`, whatever amplitude `noise` has.

    Every amplitude sees the same draws, so that rises differ by the amplitude alone; and a draw and its opposite are
    one sample, so that a slope, whose mean is nought, does not drown the curvature. On a quadratic loss the absolute
    scale gives a^2 trace(H) / 6.
    """
    assert draws >= 2, "a standard error needs two draws"
    source = NoiseDraws(noise, loss.weights, seed)
    clean = loss.value_at_flat(loss.clean)
    rises = np.empty((len(amplitudes), draws))
    for draw in range(draws):
        direction = source.draw(loss.clean, 1.0, draw, "expected rise")
        for row, amplitude in enumerate(amplitudes):
            there, opposite = (
                loss.value_at_flat(torch.add(loss.clean, direction, alpha=sign * amplitude)) for sign in (1, -1)
            )
            rises[row, draw] = (there + opposite) / 2 - clean
    errors = rises.std(axis=1, ddof=1) / draws**0.5
    return tuple(
        Rise(amplitude, float(mean), float(error), draws)
        for amplitude, mean, error in zip(amplitudes, rises.mean(axis=1), errors, strict=True)
    )


_RESTARTS = 40
_logger = logging.getLogger("dist_train.sharpness")


class Curved(Protocol):
    """A loss that is known by its Hessian's products."""

    @property
    def count(self) -> int:
        """Number of weights."""

    def hessian_product(self, direction: Vector) -> Vector:
        """Return the Hessian times `direction`."""


@dataclass(frozen=True)
class Probing:
    """How the Hessian is probed: eigenvalues to a relative error of `tolerance`, the trace by `probes` vectors."""

    eigenvalues: int = 5
    tolerance: float = 1e-3
    probes: int = 16
    seed: int = 0


@dataclass(frozen=True)
class Spectrum:
    """The largest eigenvalues, largest first, and the trace with its standard error over probes."""

    eigenvalues: tuple[float, ...]
    trace: float
    trace_standard_error: float


def spectrum(loss: Curved, probing: Probing) -> Spectrum:
    """Return what `probing` asks for; fewer eigenvalues where some do not converge, which is logged."""
    values, vectors = largest_eigenvalues(loss, probing)
    trace, error = trace_with_error(loss, values, vectors, probing)
    return Spectrum(tuple(values.tolist()), trace, error)


def largest_eigenvalues(loss: Curved, probing: Probing) -> tuple[Vector, NDArray[np.float64]]:
    """Return the largest eigenvalues, largest first, and their vectors as columns [weights, eigenvalues].

    By SciPy's implicitly restarted Lanczos (ARPACK). Largest by sign: a step up is what counts as sharp.
    """
    size = loss.count
    operator = LinearOperator(
        (size, size), matvec=lambda vector: loss.hessian_product(vector.ravel()), dtype=np.float64
    )
    start = torch.randn(size, dtype=torch.float64, generator=generator(probing.seed, "lanczos")).numpy()
    wanted = min(probing.eigenvalues, size - 1)
    try:
        values, vectors = eigsh(operator, k=wanted, which="LA", v0=start, tol=probing.tolerance, maxiter=_RESTARTS)
    except ArpackNoConvergence as error:
        values, vectors = error.eigenvalues, error.eigenvectors
        _logger.warning("%d of %d eigenvalues have converged; ask for fewer", len(values), wanted)
    order = np.argsort(values)[::-1]
    return values[order], vectors[:, order]


def trace_with_error(
    loss: Curved, values: Vector, vectors: NDArray[np.float64], probing: Probing
) -> tuple[float, float]:
    """Return the trace and its standard error: exact within `vectors`, by Hutchinson's probes beside them.

    The few large eigenvalues carry most of a probe's variance. With their vectors V and P = 1 - V V', the trace is
    the sum of `values` and the trace of P H P (Hutch++, arXiv 2010.09649, with V in place of a sketch).
    """
    assert probing.probes >= 2, "a standard error needs two probes"
    rests = np.empty(probing.probes)
    for index in range(probing.probes):
        signs = torch.randint(0, 2, (loss.count,), generator=generator(probing.seed, "probe", index)).numpy()
        probe = 2.0 * signs - 1.0
        beside = probe - vectors @ (vectors.T @ probe)
        rests[index] = beside @ loss.hessian_product(beside)
    return float(values.sum() + rests.mean()), float(rests.std(ddof=1) / probing.probes**0.5)


_FIRST_STEP = 100.0
"""Length of the first step along a coordinate of average slope, in half widths of the box."""


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
    """Return 100 (max L(x + y) - L(x)) / (1 + L(x)) over |y_i| <= epsilon (|x_i| + 1) for each weight i."""
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
