"""What a group of workers can say to each other, whatever carries it."""

from __future__ import annotations

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from dist_train.cluster.alone import Alone
from dist_train.cluster.workers import PeerFailedError, broadcast_str, gather, run_on_all_ranks
from dist_train.outcome import UsageError
from tests.unit.simulated_workers import SimulatedWorkers, on_workers, results

SIZES = [1, 2, 3, 5]


@pytest.mark.parametrize("size", SIZES)
def test_every_worker_learns_every_value_in_the_order_of_the_ranks(size: int) -> None:
    gathered = results(size, lambda workers: gather(workers, [workers.rank, -(2**63), 2**63 - 1], "test"))
    assert gathered == [[[rank, -(2**63), 2**63 - 1] for rank in range(size)]] * size


@settings(deadline=None, max_examples=25)
@given(st.text(max_size=30), st.sampled_from(SIZES))
def test_worker_0_s_text_reaches_all(text: str, size: int) -> None:
    def share(workers: SimulatedWorkers) -> str:
        return broadcast_str(workers, "not used" if workers.rank else text, "test")

    assert results(size, share) == [text] * size


@pytest.mark.parametrize("size", SIZES)
def test_what_succeeds_everywhere_gives_each_worker_its_own_result(size: int) -> None:
    squares = results(size, lambda workers: run_on_all_ranks(workers, lambda: workers.rank**2, "square"))
    assert squares == [rank**2 for rank in range(size)]


@pytest.mark.parametrize("failing", [[0], [2], [1, 3], [0, 1, 2, 3]])
def test_what_fails_somewhere_fails_everywhere_and_is_told_once(failing: list[int]) -> None:
    def act(workers: SimulatedWorkers) -> None:
        def action() -> None:
            if workers.rank in failing:
                raise FileNotFoundError(f"on {workers.rank}")

        run_on_all_ranks(workers, action, "open the data")

    ended = on_workers(4, act)
    for rank, error in enumerate(ended):
        if rank == failing[0]:
            assert isinstance(error, FileNotFoundError)
            assert str(error) == f"on {rank}"
        else:
            assert isinstance(error, PeerFailedError)
            assert isinstance(error, UsageError)
            assert f"worker {', '.join(map(str, failing))} could not open the data" in str(error)


def test_alone_a_sum_is_the_value_itself_and_an_error_its_own() -> None:
    values = torch.tensor([1, 2, 3])
    workers = Alone()
    for start in (workers.allreduce_async, workers.adasum_async):
        start(values, "test").wait()
    workers.broadcast(values, "test")
    workers.barrier()
    workers.close()
    assert values.tolist() == [1, 2, 3]

    def fail() -> None:
        raise KeyError("own")

    with pytest.raises(KeyError, match="own"):
        run_on_all_ranks(workers, fail, "act")
