"""What a group of ranks can say to each other, whatever carries it."""

from __future__ import annotations

import threading
from collections.abc import Callable

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from dist_train.cluster.communicator import (
    Communicator,
    Pending,
    SingleProcess,
    broadcast_str,
    gather,
    gather_str,
    run_long_on_all_ranks,
    run_on_all_ranks,
)
from dist_train.outcome import ExitCode, PeerFailedError, UsageError, exit_code_of
from tests.unit.simulated_ranks import SimulatedRanks, on_ranks, results
from tests.waiting import wait_for

SIZES = [1, 2, 3, 5]


@pytest.mark.parametrize("size", SIZES)
def test_every_rank_learns_every_value_in_the_order_of_the_ranks(size: int) -> None:
    gathered = results(size, lambda comm: gather(comm, [comm.rank, -(2**63), 2**63 - 1], "test"))
    assert gathered == [[[rank, -(2**63), 2**63 - 1] for rank in range(size)]] * size


@settings(deadline=None, max_examples=25)
@given(st.lists(st.text(st.characters(exclude_characters="\0", codec="utf-8"), max_size=30), min_size=1, max_size=4))
def test_every_rank_learns_every_text_in_the_order_of_the_ranks(texts: list[str]) -> None:
    gathered = results(len(texts), lambda comm: gather_str(comm, texts[comm.rank], "test"))
    assert gathered == [tuple(texts)] * len(texts)


@settings(deadline=None, max_examples=25)
@given(st.text(max_size=30), st.sampled_from(SIZES))
def test_rank_0_s_text_reaches_all(text: str, size: int) -> None:
    def share(comm: SimulatedRanks) -> str:
        return broadcast_str(comm, "not used" if comm.rank else text, "test")

    assert results(size, share) == [text] * size


@pytest.mark.parametrize("run", [run_on_all_ranks, run_long_on_all_ranks])
@pytest.mark.parametrize("size", SIZES)
def test_what_succeeds_everywhere_gives_each_rank_its_own_result(size: int, run: Callable[..., int]) -> None:
    squares = results(size, lambda comm: run(comm, lambda: comm.rank**2, "square"))
    assert squares == [rank**2 for rank in range(size)]


@pytest.mark.parametrize("run", [run_on_all_ranks, run_long_on_all_ranks])
@pytest.mark.parametrize("failing", [[0], [2], [1, 3], [0, 1, 2, 3]])
def test_what_fails_somewhere_fails_everywhere_and_is_told_once(run: Callable[..., None], failing: list[int]) -> None:
    def act(comm: SimulatedRanks) -> None:
        def action() -> None:
            if comm.rank == failing[0]:
                raise FileNotFoundError(f"on {comm.rank}")
            if comm.rank in failing:
                raise UsageError("of another exit code")

        run(comm, lambda: None, "begin")
        assert not comm.last_action_failed
        try:
            run(comm, action, "open the data")
        finally:
            assert comm.last_action_failed

    ended = on_ranks(4, act)
    for rank, error in enumerate(ended):
        if rank == failing[0]:
            assert isinstance(error, FileNotFoundError)
            assert str(error) == f"on {rank}"
        else:
            assert isinstance(error, PeerFailedError)
            assert exit_code_of(error) == ExitCode.FAULT, "that of the first that failed"
            assert all(str(rank) in str(error) for rank in failing)


def test_no_wait_lasts_as_long_as_a_long_action_which_stays_in_its_thread() -> None:
    comms: dict[int, SimulatedRanks] = {}

    def work(comm: SimulatedRanks) -> bool:
        comms[comm.rank] = comm
        caller = threading.current_thread()

        def action() -> bool:
            if comm.rank == 1:
                wait_for(lambda: 0 in comms and comms[0].names.count("load: done") >= 3, "rank 0 to look again")
            return threading.current_thread() is caller

        return run_long_on_all_ranks(comm, action, "load")

    assert results(2, work) == [True, True]


class Doubled(SingleProcess):
    """A rank whose only fellow says what it says."""

    size = 2

    def allreduce_async(self, tensor: torch.Tensor, name: str) -> Pending:
        tensor[1] = tensor[0]
        return super().allreduce_async(tensor, name)


def test_a_long_action_that_is_interrupted_ends() -> None:
    def interrupt() -> None:
        raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        run_long_on_all_ranks(Doubled(), interrupt, "load")


def test_a_rank_that_joins_does_not_wait_for_those_that_it_has_not_met() -> None:
    comm = Communicator()
    comm.rank, comm.size, comm.is_joining = 1, 2, True
    assert run_long_on_all_ranks(comm, lambda: "loaded", "load") == "loaded"


def test_alone_a_sum_is_the_value_itself_and_an_error_its_own() -> None:
    values = torch.tensor([1, 2, 3])
    comm = SingleProcess()
    for start in (comm.allreduce_async, comm.adasum_async):
        start(values, "test").wait()
    comm.broadcast(values, "test")
    comm.barrier()
    comm.close()
    assert values.tolist() == [1, 2, 3]

    def fail() -> None:
        raise KeyError("own")

    with pytest.raises(KeyError, match="own"):
        run_on_all_ranks(comm, fail, "act")
