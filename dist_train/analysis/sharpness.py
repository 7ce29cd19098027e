"""Sharpness of the minimum at a checkpoint, by several measures; each is saved as soon as it is computed."""

from __future__ import annotations

import logging
import math
import time
from collections.abc import Callable, Collection, Sequence
from functools import partial
from pathlib import Path
from tempfile import TemporaryFile

import numpy as np
import scipy
import torch
from numpy.typing import NDArray
from scipy.optimize import Bounds, minimize
from scipy.sparse.linalg import ArpackNoConvergence, LinearOperator, eigsh

from dist_train import __version__
from dist_train.analysis.directions import ends, random_direction
from dist_train.analysis.sharpness_record import (
    MEASURES,
    USUAL,
    HessianResult,
    KeskarResult,
    Measure,
    MeasuredCheckpoint,
    MeasuredData,
    NoiseScaleResult,
    RiseResult,
    SharpnessRecord,
    SharpnessSettings,
    WidthResult,
    merged,
    read_record,
    record_path,
    write_record,
)
from dist_train.analysis.subset_loss import SubsetLoss, Vector, open_stored_subset
from dist_train.checkpoint.files import read_stored
from dist_train.cluster.launch import current_launch
from dist_train.config import NoiseSettings
from dist_train.optim.flat_weights import check_movable
from dist_train.optim.noise_draws import NoiseDraws
from dist_train.outcome import DivergedError, UsageError, writing
from dist_train.reproducible import generator
from dist_train.rundir.paths import RunDirectory

_RESTARTS = 40
_FIRST_STEP = 100.0  # length of the first step along a coordinate of average slope; the box has half-width 1
_logger = logging.getLogger("dist_train.sharpness")
Report = Callable[[str], None]  # called with a progress line for the user


def measure_sharpness(
    target: Path,
    settings: SharpnessSettings,
    measures: Collection[Measure] = USUAL,
    overrides: Sequence[str] = (),
    folder: Path | None = None,
    report: Report = lambda text: None,
) -> tuple[SharpnessRecord, Path]:
    """Take `measures` of the checkpoint `target` (of a run directory: its last); return the record and its path.

    The record lies in `folder`, by default the run's `analysis`. It is written after every measure, and measures that
    it holds are not repeated: its file name is a digest of the checkpoint's bytes, the data and the settings.

    Raises UsageError if the measures cannot be taken, or the record cannot be written. Raises DivergedError if the loss
    or the norms' statistics are not finite.
    """
    if current_launch().size > 1:
        raise UsageError("sharpness is measured by one process: start it without a launcher", code="one-process-only")
    stored = read_stored(target)
    loss, checkpoint, data = open_stored_subset(stored, settings, overrides)
    settings = settings.model_copy(update={"samples": data.samples})
    folder = folder or RunDirectory.of_checkpoint(stored.path.absolute()).analysis
    file = record_path(folder, checkpoint, data, settings)
    existing = read_record(file) if file.exists() else None
    if existing is not None and all(map(existing.has, measures)):
        report(f"measured before: delete {file} to measure again")
        return existing, file
    check_movable(loss.weights, settings.exclude, "--exclude")
    if "keskar" in measures and settings.keskar_dimensions > loss.count:
        raise UsageError(
            f"--keskar-dimensions is {settings.keskar_dimensions}: there are {loss.count} weights, choose at most that",
            code="option-range",
        )
    record = existing or _new_record(loss, checkpoint, data, settings)
    with writing(file, "choose a folder with --output"):  # before measures that take long
        folder.mkdir(parents=True, exist_ok=True)
        TemporaryFile(dir=folder).close()
    for measure in MEASURES:
        if measure in measures and not record.has(measure):
            record = _take(measure, loss, record, report)
            if file.exists():  # another command may have added measures meanwhile
                record = merged(record, read_record(file))
            write_record(file, record)
    return record, file


def _new_record(
    loss: SubsetLoss, checkpoint: MeasuredCheckpoint, data: MeasuredData, settings: SharpnessSettings
) -> SharpnessRecord:
    value = loss.value_at_flat(loss.clean)
    if not math.isfinite(value):
        raise DivergedError(
            f"{checkpoint.path}: the loss is not finite, so there is nothing to measure", code="loss-not-finite"
        )
    return SharpnessRecord(
        checkpoint=checkpoint,
        data=data,
        settings=settings,
        weights=loss.count,
        loss=value,
        accuracy=loss.accuracy(),
        versions={"dist_train": __version__, "torch": torch.__version__, "scipy": scipy.__version__},
    )


def _take(measure: Measure, loss: SubsetLoss, record: SharpnessRecord, report: Report) -> SharpnessRecord:
    """Return `record` with `measure` added."""
    begun, settings = time.monotonic(), record.settings
    found: object
    match measure:
        case "keskar":
            found = KeskarResult(full=full_space(loss, settings), subspace=subspace(loss, settings))
        case "rise":
            rises = zip(settings.amplitudes, *expected_rises(loss, settings), strict=True)
            found = tuple(
                RiseResult(amplitude=amplitude, mean=mean, standard_error=error, draws=settings.draws)
                for amplitude, mean, error in rises
            )
        case "hessian":
            found = spectrum(loss, settings)
        case "width":
            found = basin_widths(loss, settings)
        case "noise-scale":
            found = noise_scale(*loss.batch_gradients())
    seconds = round(time.monotonic() - begun, 1)
    report(f"{measure}: {seconds:g} s")
    return record.model_copy(update={MEASURES[measure]: found, "seconds": {**record.seconds, measure: seconds}})


def expected_rises(loss: SubsetLoss, settings: SharpnessSettings) -> tuple[Vector, Vector]:
    """Return the means of L(w + a u) - L(w), and their standard errors over draws, for each amplitude a.

    All amplitudes use the same draws, so rises differ by the amplitude alone. A draw and its opposite are one sample:
    the slope, whose mean is zero, cancels and does not mask the curvature. On a quadratic loss the absolute scale gives
    a^2 trace(H) / 6.
    """
    noise = NoiseSettings(distribution="uniform", scale=settings.scale, exclude=settings.exclude)
    source = NoiseDraws(noise, loss.weights, settings.seed)
    clean = loss.value_at_flat(loss.clean)
    rises = np.empty((len(settings.amplitudes), settings.draws))
    for draw in range(settings.draws):
        direction = source.draw(loss.clean, 1.0, draw, "expected rise")
        for row, amplitude in enumerate(settings.amplitudes):
            forward, backward = (
                loss.value_at_flat(torch.add(loss.clean, direction, alpha=sign * amplitude)) for sign in (1, -1)
            )
            rises[row, draw] = (forward + backward) / 2 - clean
    return rises.mean(axis=1), rises.std(axis=1, ddof=1) / settings.draws**0.5


def spectrum(loss: SubsetLoss, settings: SharpnessSettings) -> HessianResult:
    """Return the Hessian's largest eigenvalues and its trace; no eigenvalues if only some converged.

    A larger one may be among those that did not. For the trace any eigenvectors will do.
    """
    values, vectors = largest_eigenvalues(loss, settings)
    trace, error = trace_with_error(loss, values, vectors, settings)
    all_converged = len(values) == min(settings.hessian_eigenvalues, loss.count - 1)
    return HessianResult(eigenvalues=values.tolist() if all_converged else (), trace=trace, trace_standard_error=error)


def largest_eigenvalues(loss: SubsetLoss, settings: SharpnessSettings) -> tuple[Vector, NDArray[np.float64]]:
    """Return the Hessian's largest eigenvalues, descending, and their vectors as columns [weights, eigenvalues].

    Computed by SciPy's implicitly restarted Lanczos method (ARPACK). Largest algebraically, not by magnitude: only
    positive curvature counts as sharp. Eigenvalues that do not converge are left out, with a warning. All are 0 with
    vectors of zeros if the Hessian is zero, and NaN if its products are not finite.
    """
    size = loss.count
    operator = LinearOperator(
        (size, size), matvec=lambda vector: loss.hessian_product(vector.ravel()), dtype=np.float64
    )
    start = torch.randn(size, dtype=torch.float64, generator=generator(settings.seed, "lanczos")).numpy()
    wanted, tolerance = min(settings.hessian_eigenvalues, size - 1), settings.hessian_tolerance
    product = loss.hessian_product(start)
    if not product.any() or not np.isfinite(product).all():  # ARPACK fails on these
        return np.full(wanted, 0.0 if not product.any() else math.nan), np.zeros((size, wanted))
    try:
        values, vectors = eigsh(operator, k=wanted, which="LA", v0=start, tol=tolerance, maxiter=_RESTARTS)
    except ArpackNoConvergence as error:
        values, vectors = error.eigenvalues, error.eigenvectors
        _logger.warning(
            "only %d of %d eigenvalues converged (%s), perhaps not the largest, so none is recorded: choose a smaller "
            "--hessian-eigenvalues",
            len(values),
            wanted,
            ", ".join(f"{value:.4g}" for value in values) or "none",
        )
    order = np.argsort(values)[::-1]
    return values[order], vectors[:, order]


def trace_with_error(
    loss: SubsetLoss, values: Vector, vectors: NDArray[np.float64], settings: SharpnessSettings
) -> tuple[float, float]:
    """Return the Hessian's trace and its standard error.

    The few large eigenvalues cause most of a probe's variance, so their part of the trace is the sum of `values`. With
    their eigenvectors V and P = 1 - V V', Hutchinson's probes estimate only the trace of P H P (Hutch++, arXiv
    2010.09649, with V in place of a sketch).
    """
    probes = settings.hessian_probes
    samples = np.empty(probes)
    for index in range(probes):
        signs = torch.randint(0, 2, (loss.count,), generator=generator(settings.seed, "probe", index)).numpy()
        probe = 2.0 * signs - 1.0
        projected = probe - vectors @ (vectors.T @ probe)
        samples[index] = projected @ loss.hessian_product(projected)
    return float(values.sum() + samples.mean()), float(samples.std(ddof=1) / probes**0.5)


def basin_widths(loss: SubsetLoss, settings: SharpnessSettings) -> tuple[WidthResult, ...]:
    """Return the mean basin width along random filter-normalized directions, for each of `settings.width_rises`.

    The width is the distance between the two points on either side where the loss has risen by that amount.
    """
    clean = loss.value_at_flat(loss.clean)
    widths = np.empty((len(settings.width_rises), settings.width_directions))
    is_censored = np.zeros_like(widths, dtype=bool)
    for index in range(settings.width_directions):
        direction = random_direction(loss.weights, "filter", settings.exclude, settings.seed, index).to(loss.clean)
        rises = [partial(_rise_along, loss, clean, sign * direction) for sign in (1, -1)]
        sides = [ends(rise_at, settings.width_rises, settings.width_reach) for rise_at in rises]
        for row, pair in enumerate(zip(*sides, strict=True)):
            is_censored[row, index] = None in pair
            widths[row, index] = sum(settings.width_reach if end is None else end for end in pair)
    return tuple(
        WidthResult(
            rise=rise,
            mean=float(row.mean()),
            standard_error=float(row.std(ddof=1) / len(row) ** 0.5),
            directions=len(row),
            censored=int(censored.sum()),
        )
        for rise, row, censored in zip(settings.width_rises, widths, is_censored, strict=True)
    )


def _rise_along(loss: SubsetLoss, clean: float, direction: torch.Tensor, distance: float) -> float:
    return loss.value_at_flat(torch.add(loss.clean, direction, alpha=distance)) - clean


def noise_scale(gradients: Sequence[Vector], sizes: Sequence[int]) -> NoiseScaleResult:
    """Return the simple noise scale tr(Sigma) / |G|^2 of McCandlish et al. (arXiv 1812.06162), in samples.

    `gradients` are the mean gradients g of batches of `sizes` samples. A batch of n independent samples has E|g|^2 =
    |G|^2 + tr(Sigma)/n, and so has the union of all batches. In the mean of |g|^2 weighted by n, less |g|^2 of the
    union, |G|^2 cancels: this gives an unbiased estimate of tr(Sigma), never negative, and with it one of |G|^2. The
    ratio's standard error is the jackknife over batches. The ratio is None if the estimate of |G|^2 is not positive:
    then the scale exceeds what this many samples can show.

    Raises UsageError if there is only one batch.
    """
    if len(sizes) < 2:
        raise UsageError(
            "--batch-size: the noise scale needs two passes or more, choose at most half of --samples",
            code="option-range",
        )
    counts = np.array(sizes, dtype=np.float64)
    whole = np.average(gradients, axis=0, weights=counts)
    squares = np.array([gradient @ gradient for gradient in gradients])
    along = np.array([gradient @ whole for gradient in gradients])

    def estimate(kept: NDArray[np.bool_]) -> tuple[float, float]:
        samples = counts[kept].sum()
        # |whole|^2 of the kept batches; at most one batch is left out.
        cross = 2 * counts.sum() * (counts * along)[~kept].sum()
        square = (counts.sum() ** 2 * (whole @ whole) - cross + (counts**2 * squares)[~kept].sum()) / samples**2
        # The weighted mean of |g|^2 has expectation |G|^2 + batches tr(Sigma) / samples.
        variance = (np.average(squares[kept], weights=counts[kept]) - square) * samples / (kept.sum() - 1)
        return float(variance), float(square - variance / samples)

    everything = np.ones(len(counts), dtype=bool)
    variance, square = estimate(everything)
    value = variance / square if square > 0 else None
    error = None
    rest = range(len(counts) if len(counts) > 2 else 0)
    spread = [estimate(everything & (np.arange(len(counts)) != index)) for index in rest]
    if value is not None and spread and all(found > 0 for _, found in spread):
        values = np.array([one / other for one, other in spread])
        error = float(np.sqrt((len(counts) - 1) * values.var()))
    return NoiseScaleResult(
        value=value, standard_error=error, variance=variance, squared_gradient=square, batches=len(counts)
    )


def full_space(loss: SubsetLoss, settings: SharpnessSettings) -> float:
    """Return 100 (max L(x + y) - L(x)) / (1 + L(x)) over |y_i| <= epsilon (|x_i| + 1) for each weight i."""
    point = loss.point()
    radii = settings.keskar_epsilon * (np.abs(point) + 1.0)

    def within(inside: Vector) -> tuple[float, Vector]:
        value, gradient = loss.value_and_gradient(point + radii * inside)
        return value, radii * gradient

    return _sharpness(within, len(point), settings)


def subspace(loss: SubsetLoss, settings: SharpnessSettings) -> float:
    """Return 100 (max L(x + A y) - L(x)) / (1 + L(x)) over |y_i| <= epsilon (|(A+ x)_i| + 1).

    The columns of A [weights, dimensions] are random directions of length 1; A+ is its pseudo-inverse.
    """
    point, dimensions = loss.point(), settings.keskar_dimensions
    directions = random_directions(len(point), dimensions, settings.seed)
    radii = settings.keskar_epsilon * (np.abs(coordinates(directions, point)) + 1.0)

    def within(inside: Vector) -> tuple[float, Vector]:
        amounts = torch.from_numpy(radii * inside).float()
        value, gradient = loss.value_and_gradient(point + (amounts @ directions).double().numpy())
        return value, radii * _products(directions, gradient)

    return _sharpness(within, dimensions, settings)


def random_directions(weights: int, dimensions: int, seed: int) -> torch.Tensor:
    """Return random directions of length 1 as rows, float32 [dimensions, weights]: A, transposed.

    Float32 because this is by far the largest array here; a rounded random direction is as good a random direction.
    """
    assert dimensions <= weights
    directions = torch.empty(dimensions, weights)
    for index, direction in enumerate(directions):
        direction.normal_(generator=generator(seed, "random subspace", index))
        direction /= torch.linalg.vector_norm(direction)
    return directions


def coordinates(directions: torch.Tensor, point: Vector) -> Vector:
    """Return A+ x = (A' A)^-1 A' x, float64 [dimensions]: the coordinates of `point` projected on the subspace."""
    gram = (directions @ directions.T).double().numpy()
    solved: Vector = np.linalg.solve(gram, _products(directions, point))
    return solved


def _products(directions: torch.Tensor, vector: Vector) -> Vector:
    products: Vector = (directions @ torch.from_numpy(vector).float()).double().numpy()
    return products


def _sharpness(within: Callable[[Vector], tuple[float, Vector]], dimensions: int, settings: SharpnessSettings) -> float:
    """Return Keskar's measure over the unit box |z_i| <= 1, which `within` maps to the box around the weights.

    The first ascent starts at the centre, where at a minimum the gradient vanishes; the others at random points.
    """
    starts = [np.zeros(dimensions)]
    for index in range(1, settings.keskar_starts):
        draw = torch.rand(dimensions, dtype=torch.float64, generator=generator(settings.seed, "ascent", index))
        starts.append(2.0 * draw.numpy() - 1.0)
    value, _ = within(starts[0])
    highest = max(_climb(within, start, settings.keskar_iterations) for start in starts)
    return 100.0 * (highest - value) / (1.0 + value)


def _climb(within: Callable[[Vector], tuple[float, Vector]], start: Vector, iterations: int) -> float:
    """Return the highest value that an ascent from `start` within the unit box meets; infinite if one is not finite.

    L-BFGS-B's first step has the length of the gradient, and it stops when values or gradients are small in absolute
    terms. A network that has fitted its samples has so flat a loss that the ascent would not start. So the loss is
    scaled, and only the number of iterations ends the ascent.
    """
    value, gradient = within(start)
    if not math.isfinite(value):
        return math.inf
    steepness = float(np.abs(gradient).mean())
    scale = _FIRST_STEP / steepness if steepness > 0 else 1.0
    highest = value

    def objective(inside: Vector) -> tuple[float, Vector]:
        nonlocal highest
        current, slope = within(inside)
        # max() would ignore a NaN.
        highest = max(highest, current) if math.isfinite(current) else math.inf
        return scale * (value - current), -scale * slope

    minimize(
        objective,
        start,
        jac=True,
        method="L-BFGS-B",
        bounds=Bounds(-np.ones_like(start), np.ones_like(start)),
        options={"maxiter": iterations, "ftol": 0.0, "gtol": 0.0},
    )
    return highest
