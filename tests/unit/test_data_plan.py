"""Promise 1: the batch is global, whatever the number of ranks; and which samples it is made of."""

from __future__ import annotations

from itertools import chain, pairwise

import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from dist_train.config import DataSettings, parse_config
from dist_train.data.plan import (
    BatchPlan,
    MicroBatch,
    balanced_choice,
    batch_indices,
    divided,
    epoch_order,
    stratified_choice,
)
from dist_train.launching.preflight import check_batches
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


@given(PLANS, st.data())
def test_promise_1_dealt_by_any_counts_each_rank_in_turn_gets_the_next(plan: BatchPlan, data: st.DataObject) -> None:
    total = len(plan.micro_batches)
    cuts = sorted(data.draw(st.lists(st.integers(0, total), max_size=8)))
    counts = [stop - start for start, stop in pairwise([0, *cuts, total])]
    assert tuple(chain.from_iterable(plan.dealt(counts, rank) for rank in range(len(counts)))) == plan.micro_batches


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


@settings(deadline=None, max_examples=50)
@given(st.integers(1, 3000), st.integers(0, 2**31), st.integers(0, 1000))
def test_an_epoch_visits_every_sample_once(samples: int, seed: int, epoch: int) -> None:
    order = epoch_order(samples, seed, epoch)
    assert order.dtype == torch.int64
    assert torch.equal(order.sort().values, torch.arange(samples))


def test_promise_2_the_order_depends_on_seed_and_epoch_alone() -> None:
    first = epoch_order(1000, seed=3, epoch=7)
    torch.manual_seed(99)
    state = torch.get_rng_state()
    epoch_order(1000, seed=3, epoch=6)
    assert torch.equal(epoch_order(1000, seed=3, epoch=7), first)
    assert torch.equal(torch.get_rng_state(), state)
    assert not torch.equal(epoch_order(1000, seed=3, epoch=8), first)
    assert not torch.equal(epoch_order(1000, seed=4, epoch=7), first)


def test_batches_follow_each_other_in_the_order() -> None:
    order = epoch_order(100, 0, 0)
    batches = [batch_indices(order, step, 30) for step in range(3)]
    assert torch.equal(torch.cat(batches), order[:90])


def test_each_epoch_leaves_out_another_part() -> None:
    left_out = {tuple(epoch_order(100, 0, epoch)[90:].tolist()) for epoch in range(5)}
    assert len(left_out) == 5


@settings(deadline=None, max_examples=60)
@given(st.lists(st.integers(0, 6), min_size=1, max_size=300), st.data(), st.integers(0, 99))
def test_a_subset_takes_as_many_of_each_class_as_there_are(labels: list[int], data: st.DataObject, seed: int) -> None:
    size = data.draw(st.integers(1, len(labels)))
    known = torch.tensor(labels)
    chosen = balanced_choice(known, size, 7, seed)
    assert len(chosen) == size
    assert chosen.tolist() == sorted(set(chosen.tolist()))
    taken = torch.bincount(known[chosen], minlength=7)
    left = torch.bincount(known, minlength=7) - taken
    assert int(taken.max()) - int(taken[left > 0].min() if (left > 0).any() else taken.max()) <= 1


def test_promise_2_the_subset_depends_on_the_seed_alone_and_grows_by_adding() -> None:
    labels = torch.arange(500) % 10
    small, large = (balanced_choice(labels, size, 10, seed=5).tolist() for size in (100, 333))
    torch.manual_seed(1)
    assert balanced_choice(labels, 100, 10, seed=5).tolist() == small
    assert balanced_choice(labels, 100, 10, seed=6).tolist() != small
    assert set(small) < set(large)


@settings(deadline=None, max_examples=60)
@given(st.lists(st.integers(0, 6), min_size=2, max_size=300), st.data(), st.integers(0, 99))
def test_what_is_held_out_has_the_shares_of_the_classes(labels: list[int], data: st.DataObject, seed: int) -> None:
    size = data.draw(st.integers(1, len(labels) - 1))
    known = torch.tensor(labels)
    chosen = stratified_choice(known, size, 7, seed)
    assert chosen.tolist() == sorted(set(chosen.tolist()))
    assert len(chosen) == size
    held_out = DataSettings(name="synthetic", synthetic_classes=7, validation_size=size)
    kept, _ = divided(known, held_out, seed)
    assert sorted([*chosen.tolist(), *kept.tolist()]) == list(range(len(labels)))
    present = known.unique()
    taken, whole = torch.bincount(known[chosen], minlength=7)[present], torch.bincount(known, minlength=7)[present]
    # One share of every class, rounded to whole samples, by Webster's method of apportionment.
    assert float(((taken - 0.5) / whole).max()) <= float(((taken + 0.5) / whole).min()) + 1e-6
    assert torch.equal(stratified_choice(known, size, 7, seed), chosen)


def test_promise_5_a_resumed_run_has_the_subsets_of_the_version_that_began_it() -> None:
    labels = torch.arange(40) % 4
    assert stratified_choice(labels, 8, 4, seed=0).tolist() == [3, 4, 5, 6, 12, 30, 31, 37]
    assert balanced_choice(labels, 8, 4, seed=0).tolist() == [9, 12, 17, 19, 22, 26, 28, 35]


def test_no_sample_is_left_by_a_validation_split_as_large_as_the_training_set() -> None:
    with raises(UsageError, "too-few-samples"):
        stratified_choice(torch.tensor([0, 1, 0]), 3, 2, 0)
    data = {"name": "synthetic", "synthetic_samples": 1024, "validation_size": 5000}
    with raises(UsageError, "too-few-samples") as refused:
        check_batches(parse_config({"data": data}, source="test"))
    assert "data.validation_size is 5000, but there are 1024" in str(refused.value)


def test_more_than_there_is_is_refused_with_both_numbers() -> None:
    labels = torch.tensor([0, 1, 0])
    assert balanced_choice(labels, 3, 2, 0).tolist() == [0, 1, 2]
    with raises(UsageError, "too-few-samples"):
        balanced_choice(labels, 4, 2, 0)
