from __future__ import annotations

import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from dist_train.data.images import ImageSet
from dist_train.data.plan import balanced_subset, others, stratified_choice
from dist_train.outcome import UsageError
from tests.raising import raises


def numbered(labels: list[int], classes: int) -> ImageSet:
    """Images whose pixels spell their position."""
    position = torch.arange(len(labels))
    pixels = torch.stack((position // 256, position % 256), 1).to(torch.uint8)
    return ImageSet(pixels.view(-1, 1, 1, 2), torch.tensor(labels, dtype=torch.int64), classes)


def positions(images: ImageSet) -> list[int]:
    high, low = images.images.view(-1, 2).long().unbind(1)
    return (high * 256 + low).tolist()


@settings(deadline=None, max_examples=60)
@given(st.lists(st.integers(0, 6), min_size=1, max_size=300), st.data(), st.integers(0, 99))
def test_a_subset_takes_as_many_of_each_class_as_there_are(labels: list[int], data: st.DataObject, seed: int) -> None:
    size = data.draw(st.integers(1, len(labels)))
    whole = numbered(labels, 7)
    subset = balanced_subset(whole, size, seed)
    chosen = positions(subset)
    assert len(chosen) == size
    assert chosen == sorted(set(chosen))
    assert subset.labels.tolist() == [labels[position] for position in chosen]
    taken = torch.bincount(subset.labels, minlength=7)
    left = torch.bincount(whole.labels, minlength=7) - taken
    assert int(taken.max()) - int(taken[left > 0].min() if (left > 0).any() else taken.max()) <= 1


def test_promise_2_the_subset_depends_on_the_seed_alone_and_grows_by_adding() -> None:
    whole = numbered([n % 10 for n in range(500)], 10)
    small, large = (positions(balanced_subset(whole, size, seed=5)) for size in (100, 333))
    torch.manual_seed(1)
    assert positions(balanced_subset(whole, 100, seed=5)) == small
    assert positions(balanced_subset(whole, 100, seed=6)) != small
    assert set(small) < set(large)


@settings(deadline=None, max_examples=60)
@given(st.lists(st.integers(0, 6), min_size=2, max_size=300), st.data(), st.integers(0, 99))
def test_what_is_held_out_has_the_shares_of_the_classes(labels: list[int], data: st.DataObject, seed: int) -> None:
    size = data.draw(st.integers(1, len(labels) - 1))
    known = torch.tensor(labels)
    chosen = stratified_choice(known, size, 7, seed)
    assert chosen.tolist() == sorted(set(chosen.tolist()))
    assert len(chosen) == size
    assert sorted([*chosen.tolist(), *others(chosen, len(labels)).tolist()]) == list(range(len(labels)))
    taken, whole = torch.bincount(known[chosen], minlength=7), torch.bincount(known, minlength=7)
    assert float((taken - whole * size / len(labels)).abs().max()) <= 1 + 1e-6
    assert torch.equal(stratified_choice(known, size, 7, seed), chosen)


def test_no_sample_is_left_by_a_validation_split_as_large_as_the_training_set() -> None:
    with raises(UsageError, "too-few-samples"):
        stratified_choice(torch.tensor([0, 1, 0]), 3, 2, 0)


def test_more_than_there_is_is_refused_with_both_numbers() -> None:
    whole = numbered([0, 1, 0], 2)
    assert balanced_subset(whole, 3, 0) is whole
    with raises(UsageError, "too-few-samples"):
        balanced_subset(whole, 4, 0)
