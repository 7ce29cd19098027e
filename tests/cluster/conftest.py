"""The cluster that these tests share."""

from __future__ import annotations

from collections.abc import Iterator

import pytest

from tests.cluster.cluster import Cluster, what_is_missing
from tests.cluster.runs import large_batch, long_run
from tests.waiting import wait_for


@pytest.fixture(scope="session")
def _booted(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Cluster]:
    missing = what_is_missing()
    if missing:
        pytest.skip(missing)
    cluster = Cluster(tmp_path_factory.mktemp("rig"))
    yield cluster
    cluster.down()


@pytest.fixture
def cluster(_booted: Cluster) -> Iterator[Cluster]:
    """Two nodes; after the test nothing of a job may be left on them."""
    yield _booted
    wait_for(lambda: not _booted.processes(), lambda: f"left behind: {_booted.processes()}")


__all__ = ["cluster", "large_batch", "long_run"]
