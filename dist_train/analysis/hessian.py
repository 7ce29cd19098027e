"""The largest eigenvalues of the loss's Hessian and its trace, from products of the Hessian with vectors alone."""

from __future__ import annotations

import logging
from dataclasses import dataclass
from typing import Protocol

import numpy as np
import torch
from numpy.typing import NDArray
from scipy.sparse.linalg import ArpackNoConvergence, LinearOperator, eigsh

from dist_train.analysis.subset_loss import Vector
from dist_train.randomness import generator

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
    """How the Hessian is felt out: eigenvalues to a relative error of `tolerance`, the trace by `probes` vectors."""

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
