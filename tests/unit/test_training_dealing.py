"""How micro-batches are dealt out by the ranks' measured times."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from itertools import chain, pairwise

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from dist_train.data.plan import BatchPlan
from dist_train.training.dealing import MeasuredDealing, build_dealing, deal, deal_if_faster, smooth, with_probes
from dist_train.training.measuring import HostTimer, StepTimes
from tests.unit.small_trainers import small_config

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
def test_the_last_is_done_within_one_micro_batch_of_work_that_could_be_cut_anywhere(
    times: list[int], count: int
) -> None:
    ideal = count / sum(1 / time for time in times)
    assert ideal * (1 - 1e-9) <= slowest(deal(times, count), times) <= ideal + max(times)


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


def took(seconds: float) -> StepTimes:
    return StepTimes(HostTimer(), [("forward_backward", 0.0), (None, seconds)])


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
    even = build_dealing(small_config(), BatchPlan(26, 6), 1, 2)
    share = even.share(0)
    assert even.note(0, took(1.0), [100, 900]) is None
    assert even.share(1) == share == BatchPlan(26, 6).share(1, 2)
    assert even.pace == 0
