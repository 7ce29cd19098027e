"""Fixtures of the cluster tests: the cluster and their undisturbed runs."""

from __future__ import annotations

from collections.abc import Iterator

import pytest

from tests.cluster.cluster import Cluster, booted_cluster
from tests.cluster.runs import large_batch, long_run
from tests.waiting import wait_for


@pytest.fixture(scope="session")
def _booted(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Cluster]:
    with booted_cluster(tmp_path_factory.mktemp("rig")) as cluster:
        yield cluster


@pytest.fixture
def cluster(_booted: Cluster) -> Iterator[Cluster]:
    """Two nodes; a test fails that leaves processes of its jobs on them."""
    yield _booted
    wait_for(lambda: not _booted.processes(), lambda: f"left behind: {_booted.processes()}")


__all__ = ["cluster", "large_batch", "long_run"]
