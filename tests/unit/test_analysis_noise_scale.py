"""The gradient noise scale, compared with gradients of known mean and covariance."""

from __future__ import annotations

import math

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from dist_train.analysis.sharpness import noise_scale
from dist_train.analysis.sharpness_record import NoiseScaleResult


def test_estimate_for_known_gradients_is_unbiased() -> None:
    random = np.random.default_rng(0)
    mean, deviations = random.normal(size=50), np.linspace(1, 6, 50)
    sizes = [8] * 30 + [20]
    found = [
        noise_scale([mean + deviations * random.normal(size=50) / math.sqrt(n) for n in sizes], sizes)
        for _ in range(200)
    ]
    variance, square = float((deviations**2).sum()), float(mean @ mean)
    for values, expected in (
        ([each.variance for each in found if each.variance is not None], variance),
        ([each.squared_gradient for each in found if each.squared_gradient is not None], square),
    ):
        assert len(values) == 200
        assert abs(np.mean(values) - expected) < 4 * np.std(values) / math.sqrt(len(values))
    scales = [each.value for each in found if each.value is not None]
    errors = [each.standard_error for each in found if each.standard_error is not None]
    assert np.mean(scales) == pytest.approx(variance / square, rel=0.1)
    assert np.std(scales) == pytest.approx(np.mean(errors), rel=0.3)


def test_standard_error_is_the_jackknife_over_batches() -> None:
    random, sizes = np.random.default_rng(0), [8, 8, 20, 5]
    gradients = [np.ones(50) + random.normal(size=50) / math.sqrt(size) for size in sizes]
    rest = [[other for other in range(4) if other != each] for each in range(4)]
    values = [noise_scale([gradients[i] for i in each], [sizes[i] for i in each]).value for each in rest]
    spread = np.var([value for value in values if value is not None])
    assert noise_scale(gradients, sizes).standard_error == pytest.approx(math.sqrt(3 * spread))


def test_zero_gradient_has_no_noise_scale() -> None:
    gradient = np.array([1.0, 2.0])
    found = noise_scale([gradient, -gradient], [4, 4])
    assert (found.value, found.standard_error) == (None, None)


def test_gradients_that_are_not_finite_have_no_noise_scale() -> None:
    found = noise_scale([np.array([1.0, math.nan]), np.array([1.0, 2.0])], [4, 4])
    assert (found.value, found.variance, found.squared_gradient) == (None, None, None)
    assert NoiseScaleResult.model_validate_json(found.model_dump_json()) == found


@given(
    sizes=st.lists(st.integers(1, 500), min_size=2, max_size=9),
    spread=st.floats(0, 100),
    seed=st.integers(0, 2**32 - 1),
)
def test_variance_is_the_spread_of_the_batches_around_their_mean(sizes: list[int], spread: float, seed: int) -> None:
    random = np.random.default_rng(seed)
    gradients = [1 + spread * random.normal(size=6) / math.sqrt(size) for size in sizes]
    mean = np.average(gradients, axis=0, weights=sizes)
    distances = [float((gradient - mean) @ (gradient - mean)) for gradient in gradients]
    expected = np.dot(sizes, distances) / (len(sizes) - 1)
    found = noise_scale(gradients, sizes)
    assert found.variance == pytest.approx(expected, rel=1e-9, abs=1e-9 * sum(sizes))
    assert found.squared_gradient == pytest.approx(mean @ mean - expected / sum(sizes), rel=1e-9, abs=1e-8)


def test_a_larger_last_batch_costs_no_precision() -> None:
    random, deviations = np.random.default_rng(0), np.array([15.0, *[15 / 19] * 19]) ** 0.5
    mean = np.eye(20)[0]

    def scales(sizes: list[int]) -> list[float]:
        draws = ([mean + deviations * random.normal(size=20) / math.sqrt(n) for n in sizes] for _ in range(300))
        every = [noise_scale(gradients, sizes).variance for gradients in draws]
        found = [each for each in every if each is not None]
        assert abs(np.mean(found) - 30) < 4 * np.std(found) / math.sqrt(300)
        return found

    uneven, even = scales([256, 256, 488]), scales([333, 333, 334])
    assert min(uneven) > 0
    assert np.std(uneven) == pytest.approx(np.std(even), rel=0.25)
