from __future__ import annotations

import hashlib

import torch

from dist_train.data.catalog import make_synthetic

SHAPE = (3, 16, 12)


def test_the_set_is_a_pure_function_of_the_seed() -> None:
    first = make_synthetic(SHAPE, 5, 300, "train", seed=1)
    torch.manual_seed(7)
    again = make_synthetic(SHAPE, 5, 300, "train", seed=1)
    other = make_synthetic(SHAPE, 5, 300, "train", seed=2)
    assert torch.equal(first.images, again.images)
    assert torch.equal(first.labels, again.labels)
    assert not torch.equal(first.images, other.images)
    assert first.shape == SHAPE


def test_the_bytes_of_a_seed_never_change() -> None:
    made = make_synthetic((1, 8, 8), 3, 64, "test", seed=0)
    digest = hashlib.sha256(made.images.numpy().tobytes() + made.labels.numpy().tobytes()).hexdigest()
    assert digest == "d49ac106c8b2f62088fb71f4aa7544a1fd3abd7a3cc65a4eb089ab53a0d94d26"


def test_classes_are_as_equal_as_can_be_and_splits_differ() -> None:
    train = make_synthetic(SHAPE, 7, 100, "train", seed=0)
    test = make_synthetic(SHAPE, 7, 100, "test", seed=0)
    counts = torch.bincount(train.labels, minlength=7)
    assert int(counts.max() - counts.min()) <= 1
    assert not torch.equal(train.images, test.images)


def test_what_is_learnt_from_train_holds_on_test() -> None:
    train = make_synthetic(SHAPE, 10, 1000, "train", seed=0)
    test = make_synthetic(SHAPE, 10, 200, "test", seed=0)
    centres = torch.stack([train.images[train.labels == label].float().mean(0) for label in range(10)])
    nearest = torch.cdist(test.images.float().flatten(1), centres.flatten(1)).argmin(1)
    assert (nearest == test.labels).float().mean() > 0.95
