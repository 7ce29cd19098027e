"""A rank of an elastic launch that claims micro-batches while another one is lost."""

from __future__ import annotations

import threading
from types import SimpleNamespace
from typing import Any

import pytest
import torch.distributed as dist

from dist_train.cluster.communicator import GroupBrokenError
from dist_train.cluster.elastic import ElasticCommunicator
from dist_train.cluster.member import Pulse
from tests.waiting import PATIENCE


@pytest.fixture
def comm() -> Any:
    """A rank without the connections to the others."""
    comm: Any = object.__new__(ElasticCommunicator)
    comm.generation = 1
    comm._group_store = dist.HashStore()
    comm._member = SimpleNamespace(interruption="", pulse=Pulse(10.0, 1.0))
    return comm


def test_a_rank_claims_no_more_once_another_is_lost(comm: Any) -> None:
    counters = comm.open_counters()
    assert [counters.fetch_and_add("claims") for _ in range(3)] == [0, 1, 2]
    comm._member.interruption = "rank 1 was lost"
    with pytest.raises(GroupBrokenError, match="rank 1 was lost"):
        counters.fetch_and_add("claims")


def test_a_rank_does_not_wait_for_a_lost_one_that_serves_the_counters(comm: Any) -> None:
    is_over = threading.Event()

    def hang() -> None:
        comm._member.interruption = "rank 0 was lost"
        is_over.wait(PATIENCE)

    with pytest.raises(GroupBrokenError, match="rank 0 was lost"):
        comm.run_while_whole(hang, "claims")
    is_over.set()
