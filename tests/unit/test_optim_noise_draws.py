"""The noise is what it says: range, mean, variance, distribution and norms of a million values, and independence."""

from __future__ import annotations

import math
from collections.abc import Callable
from functools import cache
from typing import Any, Literal

import numpy
import pytest
import torch
from torch import Tensor, nn

from dist_train.config import NoiseSettings
from dist_train.models.norms import GroupedBatchNorm
from dist_train.optim.flat_weights import FlatWeights
from dist_train.optim.noise import build_noise
from dist_train.optim.noise_draws import NoiseDraws
from tests.unit.weights_in_force import in_force, perturbed

pytestmark = pytest.mark.usefixtures("one_thread")

COUNT = 10**6
FILTERS = 1000
AMPLITUDE = 0.5
STEP, STEPS = 37, 100

Distribution = Literal["uniform", "normal"]
Scale = Literal["absolute", "weight", "filter", "filter_norm"]
DISTRIBUTIONS: tuple[Distribution, ...] = ("uniform", "normal")
SCALES: tuple[Scale, ...] = ("absolute", "weight", "filter", "filter_norm")
CDF: dict[str, Callable[[Tensor], Tensor]] = {
    "uniform": lambda x: (x + 1) / 2,
    "normal": lambda x: torch.special.ndtr(x * math.sqrt(3)),
}
VARIANCE_OF_SQUARE = {"uniform": 1 / 5 - 1 / 9, "normal": 2 / 9}


class _Network(nn.Module):
    """A million weights in a thousand filters of different lengths, beside weights that are left out."""

    def __init__(self) -> None:
        super().__init__()
        source = torch.Generator().manual_seed(1)
        sizes = torch.logspace(-2, 1, FILTERS)[:, None]
        self.first = nn.Parameter(torch.ones(3, 5))
        self.norm = GroupedBatchNorm(7)
        self.wide = nn.Parameter(torch.empty(FILTERS, COUNT // FILTERS).normal_(generator=source) * sizes)
        self.bias = nn.Parameter(torch.empty(21).normal_(generator=source))


EXCLUDE = ("norm", "first")


@cache
def weights() -> FlatWeights:
    return FlatWeights(_Network())


def settings(distribution: Distribution = "uniform", scale: Scale = "absolute", **changes: Any) -> NoiseSettings:
    return NoiseSettings(
        method="smoothout",
        amplitude=AMPLITUDE,
        distribution=distribution,
        scale=scale,
        **{"exclude": EXCLUDE, **changes},
    )


@cache
def draw(distribution: Distribution, scale: Scale, step: int = STEP, index: int | str | None = None) -> Tensor:
    """Return the noise at amplitude 1, [n], in float64."""
    indices = [] if index is None else [index]
    return (
        NoiseDraws(settings(distribution, scale), weights(), seed=3)
        .draw(weights().values, 1.0, step, *indices)
        .double()
    )


def part(name: str, values: Tensor) -> Tensor:
    return weights().named(values)[name]


def units(distribution: Distribution, scale: Scale) -> Tensor:
    """Return the million u of a draw, the scale taken out of it."""
    noise = part("wide", draw(distribution, scale))
    if scale == "weight":
        noise = noise / part("wide", weights().values).double().abs()
    if scale == "filter_norm":
        noise = noise / part("wide", weights().values).double().norm(dim=1, keepdim=True)
    return noise.flatten()


def kolmogorov_smirnov(ordered: Tensor, cdf: Callable[[Tensor], Tensor]) -> float:
    """Return the largest distance between the empirical distribution of `ordered` [n], which rises, and `cdf`."""
    expected = cdf(ordered)
    steps = torch.arange(len(ordered) + 1, dtype=torch.float64) / len(ordered)
    return float(torch.maximum(expected - steps[:-1], steps[1:] - expected).max())


@cache
def ordered(distribution: Distribution, scale: Scale) -> Tensor:
    return torch.from_numpy(numpy.sort(units(distribution, scale).float().numpy())).double()


LEVEL = math.sqrt(-math.log(0.001 / 2) / 2 / COUNT)
"""The Kolmogorov-Smirnov distance that one true sample in a thousand exceeds."""


@pytest.mark.parametrize("distribution", DISTRIBUTIONS)
@pytest.mark.parametrize("scale", ["absolute", "weight", "filter_norm"])
def test_range_mean_variance_and_distribution_are_those_of_the_formula(
    scale: Scale, distribution: Distribution
) -> None:
    u = units(distribution, scale)
    assert abs(u.mean()) < 4 * math.sqrt(1 / 3 / COUNT)
    assert abs(u.var() - 1 / 3) < 4 * math.sqrt(VARIANCE_OF_SQUARE[distribution] / COUNT)
    assert kolmogorov_smirnov(ordered(distribution, scale), CDF[distribution]) < LEVEL
    if distribution == "uniform":
        assert 1 - 1e-4 < u.abs().max() <= 1 + 1e-6
        assert u.min() < -1 + 1e-4
        assert u.max() > 1 - 1e-4
    else:
        assert u.abs().max() * math.sqrt(3) == pytest.approx(math.sqrt(2 * math.log(COUNT)), abs=1.0)


def test_the_test_of_the_distribution_sees_a_hundredth_and_tells_the_distributions_apart() -> None:
    u = ordered("uniform", "absolute")
    assert kolmogorov_smirnov(u * 0.99, CDF["uniform"]) > LEVEL
    assert kolmogorov_smirnov(u + 0.01, CDF["uniform"]) > LEVEL
    assert kolmogorov_smirnov(u, CDF["normal"]) > 20 * LEVEL


@pytest.mark.parametrize("distribution", DISTRIBUTIONS)
def test_each_weight_s_noise_is_the_draw_times_the_weight_s_size_whatever_its_sign(distribution: Distribution) -> None:
    expected = draw(distribution, "absolute") * weights().values.double().abs()
    torch.testing.assert_close(draw(distribution, "weight"), expected, rtol=1e-5, atol=0)


@pytest.mark.parametrize("distribution", DISTRIBUTIONS)
def test_each_filter_s_noise_has_the_filter_s_norm_and_the_draw_s_direction(distribution: Distribution) -> None:
    for name, filters in (("wide", FILTERS), ("bias", 1)):
        noise = part(name, draw(distribution, "filter")).reshape(filters, -1)
        weight = part(name, weights().values).double().reshape(filters, -1)
        u = part(name, draw(distribution, "absolute")).reshape(filters, -1)
        torch.testing.assert_close(noise.norm(dim=1), weight.norm(dim=1), rtol=1e-5, atol=0)
        expected = u * (weight.norm(dim=1) / u.norm(dim=1))[:, None]
        torch.testing.assert_close(noise, expected, rtol=1e-5, atol=0)
        # so its mean is 0 and its variance that of the filter's mean square
        ratios = noise / weight.square().mean(dim=1, keepdim=True).sqrt()
        assert abs(ratios.mean()) < 4 / math.sqrt(noise.numel())
        assert ratios.square().mean() == pytest.approx(1.0, rel=1e-5)


@pytest.mark.parametrize("distribution", DISTRIBUTIONS)
@pytest.mark.parametrize("scale", SCALES)
def test_a_step_s_noise_is_the_draw_times_amplitude_and_schedule(scale: Scale, distribution: Distribution) -> None:
    flat, factor = weights(), (1 + math.cos(math.pi * STEP / STEPS)) / 2
    given = settings(distribution, scale, schedule={"kind": "cosine"})
    noise = build_noise(given, flat, seed=3, total_steps=STEPS, rank=0)
    assert noise.amplitude(STEP) == pytest.approx(AMPLITUDE * factor)
    with perturbed(noise, STEP):
        moved = in_force(flat) - flat.values
    expected = draw(distribution, scale).float() * (AMPLITUDE * factor)
    torch.testing.assert_close(moved, expected, rtol=0, atol=2e-6 * float(flat.values.abs().max()))
    assert moved.square().sum() == pytest.approx(float(expected.square().sum()), rel=1e-4)


@pytest.mark.parametrize("distribution", DISTRIBUTIONS)
@pytest.mark.parametrize("scale", SCALES)
def test_excluded_weights_and_padding_get_exactly_nothing(scale: Scale, distribution: Distribution) -> None:
    noise = draw(distribution, scale)
    drawn = torch.zeros(len(noise), dtype=torch.bool)
    for segment in weights().segments:
        if segment.name in ("wide", "bias"):
            drawn[segment.start : segment.stop] = True
    assert noise[drawn].count_nonzero() > 0.999 * COUNT
    assert noise[~drawn].count_nonzero() == 0
    assert len(noise[~drawn]) > 29


@pytest.mark.parametrize("distribution", DISTRIBUTIONS)
def test_draws_of_steps_micro_batches_ranks_and_seeds_are_independent(distribution: Distribution) -> None:
    draws = [
        draw(distribution, "absolute", *indices)
        for indices in ((STEP,), (STEP + 1,), (STEP + 2,), (STEP, 0), (STEP, 1), (STEP, "rank"))
    ]
    draws.append(NoiseDraws(settings(distribution), weights(), seed=4).draw(weights().values, 1.0, STEP).double())
    values = torch.stack([part("wide", noise).flatten() for noise in draws]).float()
    limit = 4 / math.sqrt(COUNT)
    for signal in (values, values.square()):
        assert (torch.corrcoef(signal) - torch.eye(len(draws))).abs().max() < limit
    shifted = torch.stack([values[0].roll(lag) for lag in (0, 1, 2, 16, COUNT // FILTERS)])
    assert (torch.corrcoef(shifted)[0, 1:]).abs().max() < limit


def test_a_filter_of_zeros_gets_no_noise() -> None:
    flat = FlatWeights(nn.ParameterList([torch.zeros(4, 5)]))
    noise = NoiseDraws(settings(scale="filter", exclude=()), flat, seed=0).draw(flat.values, 1.0, 0)
    assert noise.count_nonzero() == 0
