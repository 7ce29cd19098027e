"""How micro-batches are dealt out by the ranks' measured times."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping, Sequence
from functools import partial
from itertools import chain, islice, pairwise
from pathlib import Path
from random import Random
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from dist_train.cluster.communicator import Communicator, Counters, SingleProcess
from dist_train.data.images import BatchRequest
from dist_train.data.plan import BatchPlan, MicroBatch
from dist_train.launching import assembly
from dist_train.outcome import PeerFailedError
from dist_train.training.dealing import (
    Dealing,
    DynamicDealing,
    MeasuredDealing,
    build_dealing,
    deal,
    deal_if_faster,
    smooth,
    with_probes,
)
from dist_train.training.measuring import StepTimes
from dist_train.training.step import GlobalBatch
from tests.unit.simulated_ranks import SimulatedRanks, on_ranks, results
from tests.unit.small_trainers import build_trainer, small_config, state_bits

TIMES = st.lists(st.integers(1, 10**7), min_size=1, max_size=12)
MAYBE_TIMES = st.lists(st.integers(0, 10**7), min_size=1, max_size=12)
COUNTS = st.integers(0, 200)


def slowest(counts: tuple[int, ...], times: list[int]) -> int:
    return max(count * time for count, time in zip(counts, times, strict=True))


@settings(deadline=None, max_examples=100)
@given(MAYBE_TIMES, COUNTS)
def test_every_micro_batch_is_dealt_once(times: list[int], count: int) -> None:
    counts = deal(times, count)
    assert len(counts) == len(times)
    assert sum(counts) == count
    assert min(counts) >= 0


@settings(deadline=None, max_examples=100)
@given(TIMES, COUNTS)
def test_no_other_shares_are_done_earlier(times: list[int], count: int) -> None:
    end = slowest(deal(times, count), times)
    # All that is done before that moment, by ranks that none makes wait, is less than there is to do.
    assert end == 0 or sum((end - 1) // time for time in times) < count


@settings(deadline=None, max_examples=100)
@given(TIMES, COUNTS)
def test_a_slower_rank_never_has_more_and_equal_ones_differ_by_one_at_most(times: list[int], count: int) -> None:
    held = sorted(zip(times, deal(times, count), strict=True))
    for (fast, many), (slow, few) in pairwise(held):
        assert few <= many + (fast == slow)


@pytest.mark.parametrize(
    ("times", "count", "counts"),
    [
        ((0, 0, 0), 5, (2, 2, 1)),
        ((100, 300), 64, (48, 16)),
        ((100, 0), 64, (32, 32)),
        ((100, 900), 8, (8, 0)),
        ((200, 100, 0), 2, (0, 1, 1)),
    ],
)
def test_shares_are_those_of_the_times(times: tuple[int, ...], count: int, counts: tuple[int, ...]) -> None:
    assert deal(times, count) == counts


def test_shares_stay_where_little_is_to_be_gained() -> None:
    assert deal_if_faster((16, 16), (100, 110)) == (16, 16)
    assert deal_if_faster((16, 16), (100, 130)) == (18, 14)


@settings(deadline=None, max_examples=100)
@given(TIMES, COUNTS)
def test_shares_settle(times: list[int], count: int) -> None:
    counts = deal_if_faster(deal([0] * len(times), count), times)
    assert deal_if_faster(counts, times) == counts


@given(st.integers(0, 10**9), st.integers(0, 10**9))
def test_an_average_lies_between_and_one_slow_step_moves_it_little(average: int, measured: int) -> None:
    after = smooth(average, measured)
    if average and measured:
        assert min(average, measured) <= after <= max(average, measured)
        assert 4 * after <= 5 * average
    else:
        assert after == max(average, measured)


@settings(deadline=None, max_examples=100)
@given(st.lists(COUNTS, min_size=1, max_size=12))
def test_a_try_leaves_nobody_idle_where_there_is_enough(counts: list[int]) -> None:
    probed = with_probes(counts)
    assert sum(probed) == sum(counts)
    assert min(probed) >= (sum(counts) >= len(counts))
    assert all(count or before == 0 for count, before in zip(probed, counts, strict=True))


PLAN = BatchPlan(100, 8)
NEXT = BatchRequest(torch.tensor([77]))


def took(seconds: float) -> StepTimes:
    return StepTimes([("forward_backward", 0.0), (None, seconds)])


def play(steps: int, milliseconds: Callable[[int], Sequence[int]]) -> tuple[list[list[int]], list[int]]:
    """Return how many micro-batches each rank has in each step, where one takes so long, and when shares change."""
    size = len(milliseconds(0))
    ranks = [MeasuredDealing(PLAN, rank, size) for rank in range(size)]
    held, changes = [], []
    for step in range(steps):
        shares = [rank.share(step) for rank in ranks]
        assert tuple(chain.from_iterable(shares)) == PLAN.micro_batches
        coming = [rank.share(step + 1) for rank in ranks]
        told = [rank.pace for rank in ranks]
        samples = [sum(each.size for each in share) for share in shares]
        times = [took(count * of / 8000) for count, of in zip(samples, milliseconds(step), strict=True)]
        noted = [rank.note(step, each, told) for rank, each in zip(ranks, times, strict=True)]
        assert coming == [rank.share(step + 1) for rank in ranks], "its samples are being read"
        assert len(set(noted)) == 1, "all ranks agree"
        held.append([len(share) for share in shares])
        if noted[0] is not None:
            changes.append(step)
    return held, changes


def test_shares_follow_what_was_measured_once_it_was_told_and_samples_were_read() -> None:
    held, changes = play(12, lambda step: (100, 300))
    assert held == [[7, 6]] * 4 + [[10, 3]] * 8, "measured in step 1, told in 2, read from 3 on"
    assert changes == [2]


def test_a_rank_that_becomes_slow_loses_its_share_and_has_it_back_when_it_is_over() -> None:
    held, changes = play(60, lambda step: (100, 300 if 20 <= step < 40 else 100))
    assert held[:20] == [[7, 6]] * 20
    assert held[39] == [10, 3]
    assert sorted(held[-1]) == [6, 7]
    assert len(changes) < 10


def test_a_rank_that_has_none_is_measured_again_now_and_then_and_comes_back() -> None:
    held, _ = play(140, lambda step: (100, 10_000))
    assert [step for step, counts in enumerate(held) if counts[1]] == [0, 1, 2, 3, 64, 128]
    held, _ = play(140, lambda step: (100, 10_000 if step < 70 else 100))
    assert sorted(held[-1]) == [6, 7]


def test_a_rank_tells_the_time_of_a_whole_micro_batch() -> None:
    dealing = MeasuredDealing(PLAN, 1, 2)
    assert dealing.pace == 0
    dealing.note(0, took(9.0), [0, 0])
    assert dealing.pace == 0, "the first update is no measure"
    dealing.note(1, took(1.0), [0, 0])
    assert sum(each.size for each in dealing.share(1)) == 44
    assert dealing.pace == round(1e6 * 8 / 44)


def test_even_shares_never_change() -> None:
    even = results(2, lambda comm: build_dealing(small_config(), BatchPlan(26, 6), comm))[1]
    share = even.share(0)
    assert even.note(0, took(1.0), [100, 900]) is None
    assert even.share(1) == share == BatchPlan(26, 6).share(1, 2)
    assert even.pace == 0


def global_batch(plan: BatchPlan, dealing: DynamicDealing, step: int = 0) -> GlobalBatch:
    share, claim = dealing.share(step), dealing.claim_in(step)
    return GlobalBatch(step, 0, torch.arange(plan.global_size), share, claim, lambda: [NEXT])


@settings(deadline=None, max_examples=100)
@given(
    global_size=st.integers(1, 200),
    micro_size=st.integers(1, 20),
    size=st.integers(1, 6),
    steps=st.integers(1, 3),
    random=st.randoms(use_true_random=False),
)
def test_whoever_is_ready_every_micro_batch_is_claimed_once(
    global_size: int, micro_size: int, size: int, steps: int, random: Random
) -> None:
    plan, counters = BatchPlan(global_size, micro_size), Counters()
    ranks = [DynamicDealing(plan, rank, size, counters) for rank in range(size)]
    larger = BatchPlan(global_size, 2 * micro_size)
    for step in range(steps):
        first_try = global_batch(larger, DynamicDealing(larger, 0, size, counters), step)
        list(islice(first_try.iterate(lambda requests: None), 3))  # then memory runs out
        batches = [global_batch(plan, each, step) for each in ranks]
        for _ in range(2):  # a gradient that is computed again
            held: list[list[tuple[MicroBatch, bool]]] = [[] for _ in ranks]
            at_work = {rank: batch.iterate(lambda requests: None) for rank, batch in enumerate(batches)}
            while at_work:
                rank = random.choice(sorted(at_work))
                if (following := next(at_work[rank], None)) is None:
                    del at_work[rank]
                else:
                    held[rank].append(following)
            assert sorted(each.index for mine in held for each, _ in mine) == list(range(len(plan.micro_batches)))
            assert all([is_last for _, is_last in mine] == [False] * (len(mine) - 1) + [True] for mine in held if mine)


def test_a_rank_that_is_three_times_slower_computes_a_quarter() -> None:
    plan, counters = BatchPlan(64, 1), Counters()
    times, ends, counts = (100, 300), [0, 0], [0, 0]
    ranks = [
        global_batch(plan, DynamicDealing(plan, rank, 2, counters)).iterate(lambda requests: None) for rank in (0, 1)
    ]
    at_work = {0, 1}
    while at_work:
        rank = min(at_work, key=ends.__getitem__)
        if next(ranks[rank], None) is None:
            at_work.remove(rank)
        else:
            ends[rank] += times[rank]
            counts[rank] += 1
    assert counts == [47, 17]
    assert abs(ends[0] - ends[1]) <= 2 * max(times), "the one that is computed and the one claimed before it"


def test_samples_are_read_as_soon_as_they_are_claimed() -> None:
    plan = BatchPlan(12, 2)
    batch = global_batch(plan, DynamicDealing(plan, 0, 1, Counters()))
    told: list[list[list[int]]] = []

    def prefetch(requests: Iterable[BatchRequest]) -> None:
        told.append([request.indices.tolist() for request in requests])

    turns = batch.iterate(prefetch)
    assert [micro_batch.index for micro_batch, _ in (next(turns), next(turns))] == [0, 1]
    assert told == [], "of the first half, all is known"
    next(turns)
    assert told == [[[4, 5], [6, 7]]], "the one that comes now, and the one after it"
    list(turns)
    assert told[-2:] == [[[8, 9], [10, 11]], [[10, 11], [77]]], "at last what the next update begins with"


@pytest.mark.parametrize("reduction", ["exact", "exact32"])
def test_claimed_micro_batches_change_no_bit(tmp_path: Path, reduction: str) -> None:
    def train(comm: Communicator, folder: str, dealing: str) -> dict[str, bytes]:
        config = small_config(batch={"micro_size": 3, "dealing": dealing}, comm={"reduction": reduction})
        trainer = build_trainer(config, tmp_path / folder, comm)
        trainer.run()
        return state_bits(trainer.network)

    alone = train(SingleProcess(), "alone", "even")
    assert train(SingleProcess(), "one", "dynamic") == alone
    for size in (2, 3):
        assert results(size, lambda comm: train(comm, f"{comm.size}", "dynamic")) == [alone] * size


def test_the_counters_of_past_updates_are_deleted() -> None:
    class Noting(Counters):
        def __init__(self) -> None:
            super().__init__()
            self.used: set[str] = set()

        def fetch_and_add(self, name: str) -> int:
            self.used.add(name)
            return super().fetch_and_add(name)

        def delete(self, name: str) -> None:
            self.used.remove(name)
            super().delete(name)

    counters = Noting()
    ranks = [DynamicDealing(PLAN, rank, 3, counters) for rank in range(3)]
    for step in range(3):
        for rank in ranks:
            list(global_batch(PLAN, rank, step).iterate(lambda requests: None))
    assert not counters.used


@pytest.mark.parametrize(
    ("expected", "size", "sections"),
    [
        (DynamicDealing, 2, {}),
        (Dealing, 3, {}),
        (Dealing, 1, {}),
        (Dealing, 2, {"run": {"device": "cuda"}}),
        (Dealing, 2, {"model": {"norm": "sync"}}),
        (Dealing, 2, {"comm": {"reduction": "float"}}),
        (Dealing, 2, {"noise": {"method": "smoothout", "sharing": "rank"}}),
        (Dealing, 2, {"batch": {"dealing": "even"}}),
    ],
)
def test_ranks_claim_where_that_changes_no_bit_and_they_wait_little(
    expected: type[Dealing], size: int, sections: Mapping[str, Mapping[str, Any]]
) -> None:
    config = small_config(**{"run": {"device": "cpu"}, **sections})

    def deal(comm: SimulatedRanks, has_counters: bool = True, nodes: int = 1) -> type[Dealing]:
        comm.has_counters, comm.local_size = has_counters, comm.size // nodes
        return type(build_dealing(config, BatchPlan(160, 5), comm))

    assert results(size, deal) == [expected] * size
    assert results(size, partial(deal, has_counters=False)) == [Dealing] * size
    assert results(2, partial(deal, nodes=2)) == [Dealing] * 2


def test_a_process_does_not_know_when_its_gpu_is_ready(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(assembly, "assign_devices", lambda *_: torch.device("cuda"))
    ended = on_ranks(2, partial(build_trainer, small_config(batch={"dealing": "dynamic"}), tmp_path))
    assert [getattr(each, "code", "") for each in ended] == ["dealing-device", PeerFailedError.code]
