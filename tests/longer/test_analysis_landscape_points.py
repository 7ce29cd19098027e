"""Points in weight space: lines, directions, planes."""

from __future__ import annotations

import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from dist_train.analysis.landscape_files import Point
from dist_train.analysis.landscape_points import Place, along, axis, interpolation, line_points, plane_points

NONE = torch.zeros(0)


def test_zero_and_one_are_exact_on_the_default_axes() -> None:
    assert {0.0, 1.0} <= set(axis(-0.5, 1.5, 41))
    assert 0.0 in axis(-1.0, 1.0, 41)
    assert 0.0 in axis(-1.0, 1.0, 21)
    assert axis(-1.0, 1.0, 3) == (-1.0, 0.0, 1.0)


def test_points_are_ordered_by_line_and_row() -> None:
    assert line_points((0.0, 1.0), 2) == (Point(0, 0.0), Point(0, 1.0), Point(1, 0.0), Point(1, 1.0))
    assert plane_points((0.0, 1.0), (2.0, 3.0)) == (
        Point(0, 0.0, 2.0),
        Point(0, 1.0, 2.0),
        Point(0, 0.0, 3.0),
        Point(0, 1.0, 3.0),
    )


@settings(deadline=None, max_examples=25)
@given(st.integers(0, 1000))
def test_ends_of_a_line_are_bit_identical_to_the_checkpoints(seed: int) -> None:
    stream = torch.Generator().manual_seed(seed)
    first, second = (Place(torch.randn(50, generator=stream), torch.rand(4, generator=stream)) for _ in range(2))
    walk = interpolation(first, second, torch.tensor([False, False, True, True]))
    for alpha, end in ((0.0, first), (1.0, second)):
        place = walk(Point(0, alpha))
        assert torch.equal(place.weights, end.weights)
        assert torch.equal(place.statistics, end.statistics)
    middle = walk(Point(0, 0.5))
    torch.testing.assert_close(middle.weights, (first.weights + second.weights) / 2)
    torch.testing.assert_close(middle.statistics, (first.statistics + second.statistics) / 2)


def test_extrapolated_variance_is_not_negative() -> None:
    first, second = Place(NONE, torch.tensor([1.0, 1.0])), Place(NONE, torch.tensor([5.0, 5.0]))
    walk = interpolation(first, second, torch.tensor([False, True]))
    assert walk(Point(0, -0.5)).statistics.tolist() == [-1.0, 0.0]


def test_direction_goes_both_ways_and_keeps_the_statistics() -> None:
    origin = Place(torch.tensor([1.0, 2.0]), torch.tensor([3.0]))
    drawn: list[int] = []

    def directions(index: int) -> tuple[torch.Tensor]:
        drawn.append(index)
        return (torch.tensor([1.0, 10.0 * index], dtype=torch.float64),)

    walk = along(origin, directions)
    assert walk(Point(1, -0.5)).weights.tolist() == [0.5, -3.0]
    assert walk(Point(1, 0.5)).weights.tolist() == [1.5, 7.0]
    assert walk(Point(2, 0.0)).weights.tolist() == [1.0, 2.0]
    assert walk(Point(2, 1.0)).statistics.tolist() == [3.0]
    assert drawn == [1, 2], "each direction is drawn once"


def test_plane_adds_two_directions() -> None:
    first, second = torch.tensor([1.0, 0.0]).double(), torch.tensor([0.0, 1.0]).double()
    plane = along(Place(torch.tensor([1.0, 1.0]), NONE), lambda _: (first, second))
    assert plane(Point(0, 0.5, -2.0)).weights.tolist() == [1.5, -1.0]
    assert plane(Point(0, 0.0, 0.0)).weights.tolist() == [1.0, 1.0], "the origin is unchanged"
