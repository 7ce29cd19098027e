"""Where the ranks of torch.distributed listen for each other, on nodes simulated by threads."""

from __future__ import annotations

import os
import socket
import threading
import time
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from datetime import timedelta
from unittest.mock import Mock

import pytest
import torch
import torch.distributed as dist
from torch._subclasses import FakeTensorMode

from dist_train.cluster import torch_engine
from dist_train.cluster.communicator import Communicator, RankLostError, naming_lost_ranks
from dist_train.cluster.elastic import _ABORT_SHARE, abortable_nccl
from dist_train.cluster.launch import Launch, StoreAddress
from dist_train.cluster.torch_engine import TorchCommunicator, nccl_options, open_counters_at_rank_0
from dist_train.outcome import FaultError, PeerFailedError, UsageError
from tests.raising import raises
from tests.services.servers import free_port
from tests.unit.simulated_ranks import on_ranks, results
from tests.waiting import PATIENCE

FIRST, SECOND = ("127.0.1.1", "127.0.1.1"), ("10.0.0.2", "10.0.0.1")  # the route to the store on the first node


def addresses(
    monkeypatch: pytest.MonkeyPatch, *routes: tuple[str, str], own: str = "127.0.1.1", interface: str = ""
) -> list[str]:
    """Return where the ranks listen, given their routes to the store; empty: where their own name says."""
    here = threading.local()
    store = dist.HashStore()
    monkeypatch.setenv("GLOO_SOCKET_IFNAME", interface)
    monkeypatch.setattr(torch_engine, "_route_to", lambda _: here.route)
    monkeypatch.setattr(torch_engine, "_own_address", lambda: own)

    def address(route: tuple[str, str]) -> str:
        here.route = route
        return torch_engine._address_for_others(store, StoreAddress("node1", 1), len(routes))

    with ThreadPoolExecutor(len(routes)) as pool:
        return list(pool.map(address, routes))


@pytest.mark.parametrize("own", ["127.0.1.1", "169.254.7.1", "fe80::1", "fe80::1%eth0"])
def test_ranks_on_nodes_whose_own_name_others_may_not_reach_listen_where_they_do(
    own: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    expected = ["10.0.0.1", "10.0.0.1", "10.0.0.2", "10.0.0.2"]
    assert addresses(monkeypatch, FIRST, FIRST, SECOND, SECOND, own=own) == expected


def test_on_one_node_they_listen_at_loopback(monkeypatch: pytest.MonkeyPatch) -> None:
    assert addresses(monkeypatch, FIRST, FIRST) == ["", ""]


@pytest.mark.parametrize("chosen", [{"own": "10.0.0.1"}, {"interface": "ib0"}])
def test_a_usable_name_and_a_chosen_interface_are_kept(chosen: dict[str, str], monkeypatch: pytest.MonkeyPatch) -> None:
    assert addresses(monkeypatch, FIRST, SECOND, **chosen) == ["", ""]


def test_an_interface_that_a_node_lacks_is_no_lost_rank(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("GLOO_SOCKET_IFNAME", "no-such-interface")
    launch = Launch("env://", 2, 0, StoreAddress("localhost", free_port(), serves=True))
    with raises(UsageError, "ranks-cannot-meet") as caught:
        TorchCommunicator(launch, timeout=5.0, device_type="cpu")
    assert "no-such-interface" in str(caught.value)


def test_an_interface_that_is_down_is_a_fault_of_the_node() -> None:
    with raises(FaultError, "ranks-cannot-meet"), naming_lost_ranks():
        raise RuntimeError("[enforce fail at device.cc:214] . Unable to find address for: lo")


def test_the_route_to_this_machine_is_within_it() -> None:
    assert torch_engine._route_to(StoreAddress("127.0.0.1", 9)) == ("127.0.0.1", "127.0.0.1")


@pytest.mark.parametrize(("launcher", "error"), [("srun", FaultError), ("env://", UsageError)])
def test_a_port_in_use_is_a_fault_where_the_next_start_has_another(
    launcher: str, error: type[FaultError | UsageError]
) -> None:
    with socket.create_server(("::", 0), family=socket.AF_INET6, dualstack_ipv6=True) as other:
        place = StoreAddress("127.0.0.1", other.getsockname()[1], serves=True)
        with raises(error, "ranks-cannot-meet"):
            torch_engine._open_store(Launch(launcher, 2, 0, place), place)


def test_ranks_of_an_engine_without_a_store_count_together_at_rank_0(monkeypatch: pytest.MonkeyPatch) -> None:
    # The first address of rank 0 leads nowhere from the other ranks.
    monkeypatch.setattr(torch_engine, "own_addresses", lambda: ["192.0.2.1", "127.0.0.1"])
    monkeypatch.setattr(torch_engine, "_ANSWER_SECONDS", 2.0)

    def count(comm: Communicator) -> list[int]:
        counters = open_counters_at_rank_0(comm)
        values = [counters.fetch_and_add("turns") for _ in range(20)]
        comm.barrier()
        if comm.rank == 0:
            counters.delete("turns")
        comm.barrier()
        values.append(counters.fetch_and_add("turns"))
        comm.barrier()  # until then rank 0 serves the counters
        return values

    counted = results(3, count)
    assert sorted(value for values in counted for value in values[:-1]) == list(range(60))
    assert sorted(values[-1] for values in counted) == [0, 1, 2]


def test_a_rank_that_cannot_connect_to_rank_0_says_so(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch_engine, "own_addresses", lambda: [])
    ended = on_ranks(2, open_counters_at_rank_0)
    assert [type(each) for each in ended] == [PeerFailedError, UsageError]
    assert getattr(ended[1], "code", "") == "ranks-cannot-meet"


@pytest.fixture
def on_gpus(monkeypatch: pytest.MonkeyPatch) -> tuple[TorchCommunicator, Mock]:
    """A rank, and the work of its group of GPUs."""
    comm, work = object.__new__(TorchCommunicator), Mock()
    monkeypatch.setattr(comm, "_device", Mock(allreduce=Mock(return_value=work)), raising=False)
    monkeypatch.setattr(comm, "_longest_wait", 0.05, raising=False)
    return comm, work


def test_the_host_waits_for_a_sum_on_gpus_only_before_it_reads_it(on_gpus: tuple[TorchCommunicator, Mock]) -> None:
    comm, work = on_gpus
    comm._longest_wait = PATIENCE
    with FakeTensorMode():
        pending = comm.allreduce_async(torch.zeros(1, device="cuda"), "tally")
    pending.wait()
    work.is_completed.assert_not_called()
    work.is_completed.side_effect = [False, False, True]
    pending.wait_on_host()
    assert (work.is_completed.call_count, work.wait.call_count) == (3, 2)


def test_a_sum_on_gpus_that_does_not_end_ends_the_rank(on_gpus: tuple[TorchCommunicator, Mock]) -> None:
    comm, work = on_gpus
    group = comm._device
    assert isinstance(group, Mock)
    with FakeTensorMode():
        pending = comm.allreduce_async(torch.zeros(1, device="cuda"), "tally")
    work.is_completed.return_value = False
    with raises(RankLostError, "rank-lost") as caught:
        pending.wait_on_host()
    assert "suspension" in str(caught.value)  # of which no rank is lost
    assert "tally: not done within 0.05 s" in str(caught.value)
    work.wait.assert_not_called()
    # Otherwise the stream, which waits for the sums of gradients, and a checkpoint's copies after them, would hang.
    group.abort.assert_called_once()
    comm.close(caught.value)
    group.abort.assert_called_once()
    work.is_completed.side_effect = RuntimeError("CUDA error: an illegal memory access was encountered")
    with raises(FaultError, "gpu-failed"):
        pending.wait_on_host()


@pytest.mark.parametrize("error", [None, RankLostError("a rank is gone")])
def test_an_abort_of_nccl_that_hangs_does_not_keep_a_rank_that_ends(
    error: RankLostError | None,
    on_gpus: tuple[TorchCommunicator, Mock],
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    comm, _ = on_gpus
    released, closing = threading.Event(), threading.current_thread()

    def abort() -> None:
        assert threading.current_thread() is not closing, "it would wait without end"
        released.wait(PATIENCE)

    monkeypatch.setattr(comm, "_device", Mock(abort=abort), raising=False)
    monkeypatch.setattr(torch_engine, "CLOSE_SECONDS", 0.05)
    comm.close(error)
    released.set()
    assert "NCCL does not let go" in capsys.readouterr().err


def test_an_abort_of_nccl_that_fails_does_not_fail_a_run_that_has_finished(
    on_gpus: tuple[TorchCommunicator, Mock], monkeypatch: pytest.MonkeyPatch
) -> None:
    comm, _ = on_gpus
    group = Mock(abort=Mock(side_effect=RuntimeError("NCCL error: unhandled system error")))
    monkeypatch.setattr(comm, "_device", group, raising=False)
    comm.close()
    comm.close()
    group.abort.assert_called_once()


def test_a_rank_that_has_finished_ends_after_the_threads_of_its_group(
    on_gpus: tuple[TorchCommunicator, Mock], monkeypatch: pytest.MonkeyPatch
) -> None:
    comm, _ = on_gpus
    is_gone = threading.Event()

    class Group:
        def abort(self) -> None:
            pass

        def __del__(self) -> None:
            time.sleep(0.2)
            is_gone.set()

    monkeypatch.setattr(torch_engine, "CLOSE_SECONDS", PATIENCE)
    monkeypatch.setattr(comm, "_host", None, raising=False)
    comm._device = Group()  # type: ignore[assignment]  # not by monkeypatch, which would keep it
    comm.close()
    assert is_gone.is_set()


@pytest.mark.parametrize(
    "make", [nccl_options, lambda timeout: abortable_nccl(dist.HashStore(), 0, 1, timeout.total_seconds())]
)
def test_torch_neither_ends_a_rank_whose_nccl_operation_is_late_nor_overrides_the_user(
    make: Callable[[timedelta], object], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(dist, "ProcessGroupNCCL", Mock(), raising=False)
    environment = {"TORCH_NCCL_DUMP_ON_TIMEOUT": "1"}
    monkeypatch.setattr(os, "environ", environment)
    make(timedelta(seconds=60))
    assert environment["TORCH_NCCL_ASYNC_ERROR_HANDLING"] == "0"
    assert environment["TORCH_NCCL_ENABLE_MONITORING"] == "0"
    assert environment["TORCH_NCCL_RETHROW_CUDA_ERRORS"] == "0"
    assert environment["TORCH_NCCL_DUMP_ON_TIMEOUT"] == "1"


@pytest.mark.parametrize(("given", "kept"), [("1", "0"), ("3", "3")])
def test_what_torchrun_sets_is_not_the_user_s_choice(given: str, kept: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(dist, "ProcessGroupNCCL", Mock(), raising=False)
    environment = {"TORCHELASTIC_RUN_ID": "none", "TORCH_NCCL_ASYNC_ERROR_HANDLING": given}
    monkeypatch.setattr(os, "environ", environment)
    nccl_options(timedelta(seconds=60))
    assert environment["TORCH_NCCL_ASYNC_ERROR_HANDLING"] == kept


@pytest.mark.parametrize("timeout", [5.0, 60.0, 300.0])
def test_an_abort_may_wait_for_what_connects(timeout: float, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(dist, "ProcessGroupNCCL", Mock(), raising=False)
    environment: dict[str, str] = {}
    monkeypatch.setattr(os, "environ", environment)
    abortable_nccl(dist.HashStore(), 0, 1, timeout)
    # Torch gives up once this many whole seconds are over.
    assert int(environment["TORCH_NCCL_NONBLOCKING_TIMEOUT"]) + 1 < timeout * _ABORT_SHARE


@pytest.mark.parametrize("dumps", ["0", "1"])
def test_torch_waits_for_dumps_of_traces_only_if_there_are_any(dumps: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(dist, "ProcessGroupNCCL", Mock(), raising=False)
    environment = {"TORCH_NCCL_DUMP_ON_TIMEOUT": dumps}
    monkeypatch.setattr(os, "environ", environment)
    nccl_options(timedelta(seconds=60))
    assert environment.get("TORCH_NCCL_WAIT_TIMEOUT_DUMP_MILSEC") == ("0" if dumps == "0" else None)
