"""Ranks that share points of work."""

from __future__ import annotations

import sys

import pytest

from dist_train.cluster.communicator import Alone
from dist_train.cluster.rendezvous import join_points
from dist_train.outcome import UsageError
from tests.raising import raises


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
