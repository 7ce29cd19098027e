"""A rank of an elastic launch that claims micro-batches while another is lost; a launcher that restarts lost ranks."""

from __future__ import annotations

import gc
import signal
import subprocess
import sys
import threading
import time
import weakref
from types import SimpleNamespace
from typing import Any
from unittest.mock import Mock

import pytest
import torch.distributed as dist

from dist_train.cluster import elastic_launch
from dist_train.cluster.communicator import Generation, GroupBrokenError
from dist_train.cluster.elastic import DeviceGroup, ElasticCommunicator
from dist_train.cluster.local_launch import blocked_signals, start_rank
from dist_train.cluster.member import Pulse
from dist_train.outcome import FaultError
from tests.raising import raises
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


def test_a_group_that_breaks_while_it_connects_does_not_outlive_its_abort(comm: Any) -> None:
    groups: list[weakref.ref[DeviceGroup]] = []

    def connect() -> None:
        group = DeviceGroup(lambda: None)
        groups.append(weakref.ref(group))
        raise RuntimeError("NCCL communicator was aborted")

    gc.disable()
    try:
        with pytest.raises(GroupBrokenError):
            comm.run_while_whole(connect, "connecting GPUs")
        assert groups[0]() is None
    finally:
        gc.enable()


def test_a_generation_that_breaks_while_it_meets_is_reported(comm: Any) -> None:
    begun: list[Generation] = []
    third = Generation(3, 0, 2, ("", 0), ("node", "node"), ("rank 2 died",), "", ())

    def await_generation(port: int, why: str) -> Generation:
        comm._member.interruption = "rank 1 was lost"
        return third

    comm._member.await_generation = await_generation
    comm._store = SimpleNamespace(port=0)
    comm._group = comm._device_group = None
    with pytest.raises(GroupBrokenError, match="rank 1 was lost"):
        comm.rendezvous("rank 2 died", begun.append)
    assert begun == [third]


def test_a_process_that_the_system_does_not_start_is_a_fault() -> None:
    longer_than_linux_takes = "x" * (1 << 20)
    with blocked_signals() as mask, raises(FaultError, "rank-not-started") as caught:
        start_rank(["true", longer_than_linux_takes], {}, mask)
    assert "Argument list too long" in str(caught.value)


def test_a_restart_that_fails_is_tried_again_and_counts(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(elastic_launch, "_FIRST_PAUSE_SECONDS", 0.0)
    no_memory = iter([False, True, False, False])

    def start(index: int, mask: object) -> subprocess.Popen[bytes]:
        if next(no_memory):
            raise FaultError("Cannot allocate memory", code="rank-not-started")
        return subprocess.Popen([sys.executable, "-c", "raise SystemExit(1)"])

    local: Any = SimpleNamespace(slots=(0,), start=start)
    view = SimpleNamespace(
        stop_requested=False, members=(), joiners=(), holders=(), has_state=True, has_ended=False, code=None
    )
    coordinator = Mock(
        view=view, expelled=[], awaits_others=False, timeout=60.0, poll=time.sleep, first_failure=lambda: None
    )
    with blocked_signals() as mask:
        assert elastic_launch._ElasticRanks(local, mask, coordinator, restarts=3).wait() == 1
    assert next(no_memory, None) is None


def test_a_launcher_s_first_signal_asks_to_stop_though_another_was_asked_before() -> None:
    local: Any = SimpleNamespace(slots=(), start=None)
    ranks = elastic_launch._ElasticRanks(local, set(), Mock(), restarts=0)
    ranks._stop_requested_at = time.monotonic() - 60  # announced by the launcher of another node
    ranks._note_stop_request(signal.SIGTERM)
    assert ranks._deadline is None
    assert ranks._first_signal_at is not None
    ranks._first_signal_at -= 60
    ranks._note_stop_request(signal.SIGTERM)
    assert ranks._deadline is not None
