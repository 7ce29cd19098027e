"""Promise 1: the batch is global, whatever the number of ranks."""

from __future__ import annotations

from itertools import chain

from hypothesis import given, settings
from hypothesis import strategies as st

from dist_train.data.plan import BatchPlan, MicroBatch
from dist_train.outcome import UsageError
from tests.raising import raises

PLANS = st.builds(BatchPlan, st.integers(1, 2000), st.integers(1, 2500))
RANKS = st.integers(1, 70)


@settings(deadline=None, max_examples=100)
@given(PLANS, RANKS)
def test_promise_1_every_sample_of_the_global_batch_is_computed_exactly_once(plan: BatchPlan, size: int) -> None:
    held = chain.from_iterable(plan.share(rank, size) for rank in range(size))
    samples = sorted(chain.from_iterable(range(part.start, part.stop) for part in held))
    assert samples == list(range(plan.global_size))


@settings(deadline=None, max_examples=100)
@given(PLANS, RANKS)
def test_promise_1_nobody_holds_more_than_one_micro_batch_above_another(plan: BatchPlan, size: int) -> None:
    loads = [len(plan.share(rank, size)) for rank in range(size)]
    assert max(loads) - min(loads) <= 1


@settings(deadline=None, max_examples=100)
@given(PLANS, RANKS)
def test_promise_1_the_cut_does_not_depend_on_the_number_of_ranks(plan: BatchPlan, size: int) -> None:
    held = chain.from_iterable(plan.share(rank, size) for rank in range(size))
    assert tuple(sorted(held, key=lambda part: part.index)) == plan.micro_batches


@settings(deadline=None, max_examples=100)
@given(PLANS)
def test_micro_batches_are_cut_in_order_and_only_the_last_is_shorter(plan: BatchPlan) -> None:
    parts = plan.micro_batches
    assert [part.index for part in parts] == list(range(len(parts)))
    assert [part.start for part in parts[1:]] == [part.stop for part in parts[:-1]]
    assert all(part.size == plan.micro_size for part in parts[:-1])
    assert 1 <= parts[-1].size <= plan.micro_size


def test_a_share_is_dealt_round_robin() -> None:
    plan = BatchPlan(global_size=10, micro_size=3)
    assert plan.share(0, 3) == (MicroBatch(0, 0, 3), MicroBatch(3, 9, 10))
    assert plan.share(2, 3) == (MicroBatch(2, 6, 9),)


def test_more_ranks_than_micro_batches_leaves_some_without_work() -> None:
    assert [len(BatchPlan(8, 4).share(rank, 5)) for rank in range(5)] == [1, 1, 0, 0, 0]


def test_what_is_left_of_an_epoch_after_its_last_whole_batch_is_left_out() -> None:
    assert BatchPlan(8192, 256).steps_per_epoch(60000) == 7
    assert BatchPlan(60000, 256).steps_per_epoch(60000) == 1


def test_promise_1_fewer_samples_than_one_batch_are_refused_with_both_numbers_and_the_fix() -> None:
    with raises(UsageError, "too-few-samples"):
        BatchPlan(128, 32).steps_per_epoch(100)


@settings(deadline=None, max_examples=100)
@given(PLANS, st.integers(1, 9))
def test_slices_cut_every_micro_batch_evenly_over_all_ranks_in_order(plan: BatchPlan, size: int) -> None:
    if plan.micro_batches[-1].size < size:
        with raises(UsageError, "micro-batch-too-small"):
            plan.slices(0, size)
        return
    slices = [plan.slices(rank, size) for rank in range(size)]
    for whole, parts in zip(plan.micro_batches, zip(*slices, strict=True), strict=True):
        assert [part.index for part in parts] == [whole.index] * size
        assert [place for part in parts for place in range(part.start, part.stop)] == [*range(whole.start, whole.stop)]
        assert max(part.size for part in parts) - min(part.size for part in parts) <= 1
