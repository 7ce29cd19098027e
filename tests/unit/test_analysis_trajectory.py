"""The plane of a run's checkpoints."""

from __future__ import annotations

import pytest
import torch

from dist_train.analysis.directions import Trajectory, principal_plane
from dist_train.outcome import UsageError
from tests.raising import raises


def test_what_lies_on_a_plane_is_found_again() -> None:
    stream = torch.Generator().manual_seed(0)
    basis = torch.linalg.qr(torch.randn(200, 2, generator=stream).double()).Q.T
    places = torch.tensor([[9.0, 1.0], [5.0, -2.0], [2.0, -1.0], [0.0, 0.0]], dtype=torch.float64)
    ways = (places @ basis).float()
    first, second, coordinates, explained = principal_plane(ways)
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
        principal_plane(torch.arange(3.0).view(3, 1) * torch.ones(20))


def test_the_plane_reaches_beyond_all_checkpoints() -> None:
    unit = torch.ones(1).double()
    trajectory = Trajectory((unit, unit), (1, 2, 3), ((4.0, -1.0), (2.0, 1.0), (0.0, 0.0)), (0.9, 0.1))
    assert trajectory.reaches == ((-1.0, 5.0), (-1.5, 1.5))
