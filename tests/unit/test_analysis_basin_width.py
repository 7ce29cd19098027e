"""Widths of basins."""

from __future__ import annotations

import math

import pytest

from dist_train.analysis.directions import basin_width, describe, ends, summarize

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
