"""Points shared out over ranks."""

from __future__ import annotations

import sys

import pytest
from hypothesis import given
from hypothesis import strategies as st

from dist_train.cluster.communicator import Alone
from dist_train.cluster.points import deal, join_points
from dist_train.outcome import UsageError
from tests.raising import raises


@given(st.integers(0, 40), st.integers(1, 9))
def test_every_point_is_dealt_out_once_and_evenly(points: int, size: int) -> None:
    shares = [deal(range(points), rank, size) for rank in range(size)]
    assert sorted(point for share in shares for point in share) == list(range(points))
    assert max(map(len, shares)) - min(map(len, shares)) <= 1


def test_alone_no_mpi_is_loaded(monkeypatch: pytest.MonkeyPatch) -> None:
    for name in ("OMPI_COMM_WORLD_SIZE", "SLURM_STEP_ID", "HOROVOD_SIZE"):
        monkeypatch.delenv(name, raising=False)
    monkeypatch.setitem(sys.modules, "mpi4py", None)
    assert isinstance(join_points(), Alone)


def test_gloo_is_refused_with_the_fix(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("OMPI_COMM_WORLD_SIZE", raising=False)
    monkeypatch.setenv("HOROVOD_SIZE", "2")
    monkeypatch.setenv("HOROVOD_RANK", "0")
    with raises(UsageError, "launcher-unsupported"):
        join_points()


def test_a_missing_mpi4py_is_told(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("OMPI_COMM_WORLD_SIZE", "2")
    monkeypatch.setenv("OMPI_COMM_WORLD_RANK", "0")
    monkeypatch.setitem(sys.modules, "mpi4py", None)
    with raises(UsageError, "mpi4py-missing"):
        join_points()
