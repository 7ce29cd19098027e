"""Data sets by name."""

from __future__ import annotations

import hashlib
from pathlib import Path
from typing import Literal

import numpy as np
import pytest
import torch

from dist_train.config import DATA_SETS, DataSettings
from dist_train.data.catalog import READERS, find_data, make_synthetic
from dist_train.data.images import BatchRequest, ImageSet, Split
from dist_train.data.loader import open_splits, training_labels
from dist_train.data.published import CIFAR10, CIFAR100
from dist_train.outcome import UsageError
from tests.archives import (
    cifar10_members,
    cifar100_members,
    packed_members,
    write_fashion_mnist,
    write_members,
)
from tests.raising import raises
from tests.unit.image_sets import load_images


def test_every_data_set_that_can_be_configured_has_a_reader() -> None:
    assert READERS.keys() == DATA_SETS.keys()


def test_fashion_mnist_is_loaded_through_the_cache(tmp_path: Path, cache: Path) -> None:
    written = write_fashion_mnist(tmp_path)
    settings = DataSettings(name="fashion-mnist", root=tmp_path)
    for _ in range(2):
        assert np.array_equal(load_images(settings, "train", 0).images.numpy(), written.images)
    assert len(list((cache / "decoded").glob("fashion-mnist-train-v2-*.json"))) == 1


@pytest.mark.parametrize("split", ["train", "test"])
def test_cifar_is_loaded_through_the_cache(tmp_path: Path, cache: Path, split: Split) -> None:
    members, *sets = cifar10_members()
    (tmp_path / CIFAR10.file).write_bytes(packed_members(CIFAR10.folder, members))
    members, *finer_sets = cifar100_members()
    write_members(tmp_path / CIFAR100.folder, members)
    which = ("train", "test").index(split)
    coarse = load_images(DataSettings(name="cifar10", root=tmp_path), split, 0)
    fine = load_images(DataSettings(name="cifar100", root=tmp_path), split, 0)
    assert np.array_equal(coarse.images.numpy(), sets[which].images)
    assert np.array_equal(fine.images.numpy(), finer_sets[which].images)
    assert len(list((cache / "decoded").glob(f"cifar10*-{split}-v2-*.json"))) == 2


@pytest.mark.parametrize("name", ["fashion-mnist", "cifar10", "cifar100"])
def test_messages_name_the_absolute_path_of_a_relative_root(
    name: Literal["fashion-mnist", "cifar10", "cifar100"], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    settings = DataSettings(name=name, root=Path("images"))
    for check in (lambda: find_data(settings), lambda: load_images(settings, "train", 0)):
        with raises(UsageError, "data-missing") as refused:
            check()
        assert str(tmp_path / "images") in str(refused.value)


def test_without_a_root_cifar_is_sought_in_the_cache_folder(cache: Path) -> None:
    members, train, _ = cifar10_members()
    write_members(cache / "datasets" / CIFAR10.folder, members)
    assert np.array_equal(load_images(DataSettings(name="cifar10"), "train", 0).images.numpy(), train.images)


def test_a_source_damaged_after_it_was_cached_is_noticed(tmp_path: Path) -> None:
    write_fashion_mnist(tmp_path)
    settings = DataSettings(name="fashion-mnist", root=tmp_path)
    load_images(settings, "train", 0)
    path = tmp_path / "train-images-idx3-ubyte.gz"
    path.write_bytes(path.read_bytes()[:-20])
    with raises(UsageError, "data-unpackable"):
        load_images(settings, "train", 0)


def test_train_size_takes_a_balanced_part_of_train_and_all_of_test(tmp_path: Path) -> None:
    write_fashion_mnist(tmp_path, "train", count=40)
    write_fashion_mnist(tmp_path, "test", count=30)
    settings = DataSettings(name="fashion-mnist", root=tmp_path, train_size=20)
    splits, other = (open_splits(settings, seed, torch.device("cpu")) for seed in (0, 1))
    whole = BatchRequest(torch.arange(20))
    images, labels = splits.train.read(whole)
    assert torch.bincount(labels).tolist() == [2] * 10
    assert torch.equal(training_labels(settings, 0), labels)
    assert len(splits.test) == 30
    assert not torch.equal(images, other.train.read(whole)[0])


def test_a_train_size_above_what_there_is_is_refused(tmp_path: Path) -> None:
    write_fashion_mnist(tmp_path, "train", count=40)
    write_fashion_mnist(tmp_path, "test", count=30)
    settings = DataSettings(name="fashion-mnist", root=tmp_path, train_size=41)
    for read in (lambda: open_splits(settings, 0, torch.device("cpu")), lambda: training_labels(settings, 0)):
        with raises(UsageError, "too-few-samples"):
            read()


def test_the_synthetic_set_has_the_configured_form_and_leaves_no_file(cache: Path) -> None:
    settings = DataSettings(name="synthetic", synthetic_samples=50, synthetic_shape=(2, 9, 11), synthetic_classes=4)
    train, test = load_images(settings, "train", 0), load_images(settings, "test", 0)
    assert (len(train), len(test), train.shape, train.classes) == (50, 12, (2, 9, 11), 4)
    assert not cache.exists()


@pytest.mark.parametrize("inner", ["", "decoded", "datasets"])
def test_a_cache_that_others_can_write_is_refused(inner: str, cache: Path) -> None:
    write_members(cache / "datasets" / CIFAR10.folder, cifar10_members()[0])
    (cache / "decoded").mkdir()
    settings = DataSettings(name="cifar10")
    load_images(settings, "train", 0)
    (cache / inner).chmod(0o777)
    with raises(UsageError, "folder-foreign"):
        load_images(settings, "train", 0)


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


def labelled(settings: DataSettings, split: Split, seed: int, options: dict[str, int]) -> ImageSet:
    """Return blank images, one of them with another label."""
    return ImageSet(torch.zeros(3, 1, 2, 2, dtype=torch.uint8), torch.tensor([0, 1, options["label"]]), 2)


@pytest.mark.parametrize("label", [2, -1, -100])
def test_labels_of_a_plugins_image_set_count_from_0_below_the_number_of_classes(label: int) -> None:
    name = f"{__name__}:labelled"
    settings = DataSettings(name=name, shape=(1, 2, 2), classes=2, options={"label": label})
    with raises(UsageError, "plugin-data-form"):
        load_images(settings, "train", 0)
    load_images(settings.model_copy(update={"options": {"label": 1}}), "train", 0)
