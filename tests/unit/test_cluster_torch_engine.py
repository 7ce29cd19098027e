"""Where the ranks of torch.distributed listen for each other, on nodes simulated by threads; and how they leave."""

from __future__ import annotations

import threading
from concurrent.futures import ThreadPoolExecutor
from unittest.mock import Mock

import pytest
import torch.distributed as dist

from dist_train.cluster import torch_engine
from dist_train.cluster.launch import StoreAddress
from dist_train.cluster.torch_engine import TorchCommunicator

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


def test_ranks_on_nodes_whose_own_name_is_loopback_listen_where_the_others_reach_them(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    expected = ["10.0.0.1", "10.0.0.1", "10.0.0.2", "10.0.0.2"]
    assert addresses(monkeypatch, FIRST, FIRST, SECOND, SECOND) == expected


def test_on_one_node_they_listen_at_loopback(monkeypatch: pytest.MonkeyPatch) -> None:
    assert addresses(monkeypatch, FIRST, FIRST) == ["", ""]


@pytest.mark.parametrize("chosen", [{"own": "10.0.0.1"}, {"interface": "ib0"}])
def test_a_usable_name_and_a_chosen_interface_are_kept(chosen: dict[str, str], monkeypatch: pytest.MonkeyPatch) -> None:
    assert addresses(monkeypatch, FIRST, SECOND, **chosen) == ["", ""]


def test_the_route_to_this_machine_is_within_it() -> None:
    assert torch_engine._route_to(StoreAddress("127.0.0.1", 9)) == ("127.0.0.1", "127.0.0.1")


def test_abort_that_fails_is_reported_unless_the_run_has_failed_already(monkeypatch: pytest.MonkeyPatch) -> None:
    communicator = TorchCommunicator.__new__(TorchCommunicator)
    communicator._device = Mock()
    monkeypatch.setattr(torch_engine, "abort_nccl", Mock(side_effect=RuntimeError("NCCL error")))
    with pytest.raises(RuntimeError, match="NCCL error"):
        communicator.close()
    communicator.close(RuntimeError("the run's own"))
    assert communicator._device is None
