"""Directions in weight space, and widths along them."""

from __future__ import annotations

import math

import pytest
import torch
from torch import nn

from dist_train.analysis.directions import (
    Trajectory,
    basin_width,
    describe,
    ends,
    principal_plane,
    random_direction,
    summarize,
)
from dist_train.models.norms import GroupedBatchNorm
from dist_train.optim.flat_weights import FlatWeights, check_movable
from dist_train.outcome import UsageError
from tests.raising import raises

DEFAULT = ("norm", "bias")


@pytest.fixture
def weights() -> FlatWeights:
    stream = torch.Generator().manual_seed(0)
    model = nn.Sequential(nn.Conv2d(3, 5, 3), GroupedBatchNorm(5), nn.Flatten(), nn.Linear(5, 4))
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.copy_(torch.randn(parameter.shape, generator=stream))
    return FlatWeights(model)


def parts(weights: FlatWeights, flat: torch.Tensor) -> dict[str, torch.Tensor]:
    return {name: view.double() for name, view in weights.named(flat).items()}


def test_every_filter_has_the_norm_of_the_weights_filter(weights: FlatWeights) -> None:
    drawn = parts(weights, random_direction(weights, "filter", (), 0, 0))
    for name, part in parts(weights, weights.values).items():
        filters = part.flatten(1) if part.dim() > 1 else part.view(1, -1)
        moved = drawn[name].flatten(1) if part.dim() > 1 else drawn[name].view(1, -1)
        torch.testing.assert_close(moved.norm(dim=1), filters.norm(dim=1), rtol=1e-12, atol=0)
        assert not torch.allclose(moved, filters)


def test_every_layer_has_the_norm_of_the_weights_layer_and_its_filters_have_not(weights: FlatWeights) -> None:
    drawn = parts(weights, random_direction(weights, "layer", (), 0, 0))
    here = parts(weights, weights.values)
    for name, part in here.items():
        torch.testing.assert_close(drawn[name].norm(), part.norm(), rtol=1e-12, atol=0)
    filters = drawn["0.weight"].flatten(1).norm(dim=1)
    assert not torch.allclose(filters, here["0.weight"].flatten(1).norm(dim=1), rtol=1e-3)


def test_without_normalization_components_have_variance_one(weights: FlatWeights) -> None:
    drawn = parts(weights, random_direction(weights, "none", (), 0, 0))
    assert drawn["0.weight"].std() == pytest.approx(1, abs=0.2)


@pytest.mark.parametrize("normalization", ["filter", "layer", "none"])
def test_what_is_excluded_stays_and_does_not_change_the_rest(weights: FlatWeights, normalization: str) -> None:
    everything = parts(weights, random_direction(weights, normalization, (), 3, 1))
    some = parts(weights, random_direction(weights, normalization, DEFAULT, 3, 1))
    for name, part in some.items():
        if name in ("0.weight", "3.weight"):
            assert torch.equal(part, everything[name])
        else:
            assert not part.any(), name
            assert everything[name].any(), name


def test_padding_is_not_moved(weights: FlatWeights) -> None:
    direction = random_direction(weights, "filter", (), 0, 0)
    for segment in weights.segments:
        direction[segment.start : segment.stop] = 0
    assert not direction.any()


def test_a_direction_depends_on_seed_and_number_alone(weights: FlatWeights) -> None:
    def drawn(seed: int, index: int) -> torch.Tensor:
        return random_direction(weights, "filter", DEFAULT, seed, index)

    torch.manual_seed(1)
    first = drawn(0, 0)
    torch.manual_seed(2)
    assert torch.equal(first, drawn(0, 0))
    assert not torch.equal(first, drawn(0, 1))
    assert not torch.equal(first, drawn(1, 0))


def test_exclusions_must_leave_a_weight(weights: FlatWeights) -> None:
    check_movable(weights, ["norm", "bias", "3.*"], "--exclude")
    with raises(UsageError, "nothing-to-move"):
        check_movable(weights, ["*"], "--exclude")


def test_what_lies_on_a_plane_is_found_again() -> None:
    stream = torch.Generator().manual_seed(0)
    basis = torch.linalg.qr(torch.randn(200, 2, generator=stream).double()).Q.T
    places = torch.tensor([[9.0, 1.0], [5.0, -2.0], [2.0, -1.0], [0.0, 0.0]], dtype=torch.float64)
    ways = (places @ basis).float()
    found = principal_plane(ways, (1, 2, 3, 4))
    (first, second), coordinates, explained = found.directions, found.coordinates, found.explained
    assert first @ first == pytest.approx(1)
    assert second @ second == pytest.approx(1)
    assert first @ second == pytest.approx(0, abs=1e-6)
    assert sum(explained) == pytest.approx(1)
    assert explained[0] > explained[1]
    rebuilt = torch.stack([alpha * first + beta * second for alpha, beta in coordinates])
    torch.testing.assert_close(rebuilt.float(), ways, rtol=1e-4, atol=1e-5)
    assert coordinates[-1] == (0.0, 0.0)
    assert coordinates[0][0] > 0


def test_a_straight_way_spans_no_plane() -> None:
    with raises(UsageError, "no-plane"):
        principal_plane(torch.arange(3.0).view(3, 1) * torch.ones(20), (1, 2, 3))


@pytest.mark.parametrize("weight", [math.nan, math.inf])
def test_weights_that_are_not_finite_span_no_plane(weight: float) -> None:
    displacements = torch.eye(3, 20)
    displacements[1, 5] = weight
    with raises(UsageError, "no-plane"):
        principal_plane(displacements, (1, 2, 3))


def test_the_plane_reaches_beyond_all_checkpoints() -> None:
    unit = torch.ones(1).double()
    trajectory = Trajectory((unit, unit), (1, 2, 3), ((4.0, -1.0), (2.0, 1.0), (0.0, 0.0)), (0.9, 0.1))
    assert trajectory.reaches == ((-1.0, 5.0), (-1.5, 1.5))


ALPHAS = [-2.0, -1.0, 0.0, 1.0, 2.0]


def test_ends_are_interpolated_between_points() -> None:
    width = basin_width(ALPHAS, [9.0, 4.0, 1.0, 3.0, 9.0], 2.0)
    assert width is not None
    assert width.left == pytest.approx(-1 / 3)
    assert width.right == pytest.approx(0.5)
    assert width.width == pytest.approx(5 / 6)
    assert (width.minimum_alpha, width.minimum_loss) == (0.0, 1.0)
    assert not width.is_open_left
    assert not width.is_open_right


@pytest.mark.parametrize("factor", [2.0, 10.0])
def test_of_a_parabola_it_is_the_closed_form(factor: float) -> None:
    alphas = [index / 1000 - 1 for index in range(2001)]
    width = basin_width(alphas, [0.01 + alpha * alpha for alpha in alphas], factor)
    assert width is not None
    assert width.width == pytest.approx(2 * math.sqrt(0.01 * (factor - 1)), rel=1e-4)


def test_an_end_beyond_the_line_is_open() -> None:
    width = basin_width(ALPHAS, [1.5, 1.2, 1.0, 3.0, 9.0], 2.0)
    assert width is not None
    assert (width.left, width.is_open_left, width.is_open_right) == (-2.0, True, False)
    assert "width at least 2.5 (left end open)" in describe(width)


@pytest.mark.parametrize(("losses", "points"), [([9.0, 4.0, 1.0, 4.0, 9.0], 1), ([9.0, 4.0, 1.0, 1.5, 9.0], 2)])
def test_a_basin_without_a_second_point_is_unresolved(losses: list[float], points: int) -> None:
    width = basin_width(ALPHAS, losses, 2.0)
    assert width is not None
    assert width.points == points
    assert ("unresolved" in describe(width)) == (points == 1)


def test_what_lies_beyond_a_ridge_does_not_count() -> None:
    width = basin_width(ALPHAS, [1.0, 9.0, 0.9, 9.0, 1.0], 2.0)
    assert width is not None
    assert -1 < width.left < 0 < width.right < 1


@pytest.mark.parametrize("loss", [math.nan, math.inf])
def test_a_loss_that_is_not_finite_is_a_wall(loss: float) -> None:
    width = basin_width(ALPHAS, [loss, 1.5, 1.0, loss, 9.0], 2.0)
    assert width is not None
    assert (width.left, width.right) == (-1.0, 0.0)
    assert not width.is_open_left
    assert not width.is_open_right


def test_a_line_without_a_finite_loss_has_none() -> None:
    assert basin_width(ALPHAS, [math.nan] * 5, 2.0) is None


def test_the_minimum_is_looked_for_in_its_basin() -> None:
    width = basin_width(ALPHAS, [0.5, 3.0, 1.0, 3.0, 9.0], 2.0, among=[2, 3, 4])
    assert width is not None
    assert width.minimum_alpha == 0.0


LINE = [index / 20 - 0.5 for index in range(41)]
HALVES = [at for at, alpha in enumerate(LINE) if alpha < 0.5], [at for at, alpha in enumerate(LINE) if alpha > 0.5]


def test_a_slope_towards_the_other_checkpoint_is_no_basin() -> None:
    losses = [0.1 + (alpha - 1) ** 2 for alpha in LINE]
    assert basin_width(LINE, losses, 2.0, among=HALVES[0]) is None
    width = basin_width(LINE, losses, 2.0, among=HALVES[1])
    assert width is not None
    assert width.minimum_alpha == 1.0
    assert width.width == pytest.approx(2 * math.sqrt(0.1), rel=0.02)


def test_a_narrow_basin_is_not_taken_for_the_flank_of_a_wide_and_deeper_one() -> None:
    losses = [min(0.4 + 100 * alpha**2, 0.01 + 4 * (alpha - 1) ** 4) for alpha in LINE]
    assert losses[HALVES[0][-1]] < losses[LINE.index(0.0)]
    widths = [basin_width(LINE, losses, 2.0, among=half) for half in HALVES]
    assert [width and width.minimum_alpha for width in widths] == [0.0, 1.0]
    assert widths[0] is not None
    assert widths[0].width == pytest.approx(2 * math.sqrt(0.004), rel=0.1)


def test_a_summary_has_mean_deviation_and_each_direction() -> None:
    widths = [
        width
        for direction, losses in enumerate([[9.0, 4.0, 1.0, 4.0, 9.0], [9.0, 3.0, 1.0, 3.0, 9.0]])
        for factor in (2.0, 10.0)
        if (width := basin_width(ALPHAS, losses, factor, direction=direction))
    ]
    summary = summarize(widths)["A"]
    assert summary["2"]["mean"] == pytest.approx((2 / 3 + 1) / 2)
    assert summary["2"]["standard_deviation"] == pytest.approx((1 - 2 / 3) / math.sqrt(2))
    assert summary["2"]["open"] == 0
    assert summary["10"]["open"] == 2
    assert [entry["direction"] for entry in summary["2"]["directions"]] == [0, 1]


@pytest.mark.parametrize("curvature", [1e-1, 3.0, 1e4, 1e9])
@pytest.mark.parametrize("power", [2, 4])
def test_the_ends_at_absolute_rises_are_those_of_known_minima(curvature: float, power: int) -> None:
    rises, reach = (0.5, 0.05, 1.0), 20.0
    found = ends(lambda distance: curvature * distance**power / power, rises, reach)
    for rise, end in zip(rises, found, strict=True):
        assert end == pytest.approx((rise * power / curvature) ** (1 / power), rel=2e-3)


def test_an_end_beyond_the_reach_is_none_and_a_cliff_and_a_barrier_are_ends() -> None:
    assert ends(lambda distance: distance / 8, (0.1, 0.5), 2.0) == [pytest.approx(0.8, rel=2e-3), None]
    assert ends(lambda distance: math.nan if distance > 0.3 else 0.0, (0.1,), 2.0) == [pytest.approx(0.3, rel=2e-3)]
    # It falls again behind the barrier: the first crossing counts.
    barrier = ends(lambda distance: math.sin(math.pi * distance), (0.5,), 2.0)
    assert barrier == [pytest.approx(1 / 6, rel=2e-3)]
