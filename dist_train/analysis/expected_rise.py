"""How far the loss rises, on average, under uniform noise on the weights: what SmoothOut smooths, made a measure."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import torch

from dist_train.analysis.subset_loss import SubsetLoss
from dist_train.config import NoiseSettings
from dist_train.optim.noise_draws import NoiseDraws


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
