from __future__ import annotations

import os
import shutil
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pytest
import torch

from dist_train.config import DataSettings
from dist_train.data.image_folder import FolderListing, check_same_classes, list_split
from dist_train.data.plan import divided
from dist_train.outcome import UsageError
from tests.raising import raises
from tests.unit.image_folders import CLASSES, write_folder, write_image


@pytest.fixture
def root(tmp_path: Path) -> Path:
    return write_folder(tmp_path)


def test_every_image_is_listed_once_with_the_class_of_its_folder(root: Path) -> None:
    listing = list_split(root, "train", 3, seed=0)
    assert listing.classes == CLASSES
    paths = [listing.reference(sample) for sample in range(len(listing))]
    assert sorted(paths) == sorted(map(str, root.glob("train/*/*.png")))
    assert [Path(path).parent.name for path in paths] == [CLASSES[label] for label in listing.labels.tolist()]


def test_the_order_depends_on_the_seed_alone_and_mixes_the_classes(root: Path) -> None:
    first, again, other = (list_split(root, "train", 3, seed).names for seed in (0, 0, 1))
    assert first == again
    assert first != other
    assert set(list_split(root, "train", 3, 0).labels[:9].tolist()) == {0, 1, 2}


def test_the_order_does_not_depend_on_the_file_system_s(root: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    expected = list_split(root, "train", 3, seed=0)
    listed = os.scandir

    @contextmanager
    def backwards(folder: Any) -> Iterator[list[os.DirEntry[str]]]:
        with listed(folder) as entries:
            yield sorted(entries, key=lambda entry: entry.name, reverse=True)

    monkeypatch.setattr(os, "scandir", backwards)
    found = list_split(root, "train", 3, seed=0)
    assert found.names == expected.names
    assert torch.equal(found.labels, expected.labels)


def test_hidden_files_and_files_of_other_kinds_are_left_out(root: Path) -> None:
    (root / "train" / "ant" / "._0000.png").write_bytes(b"what a Mac leaves behind")
    (root / "train" / "ant" / "notes.txt").touch()
    (root / "train" / ".cache").mkdir()
    (root / "train" / "README").touch()
    write_image(root / "train" / "ant" / "UPPER.PNG", 9, 9, seed=0)
    listing = list_split(root, "train", 3, seed=0)
    assert len(listing) == 25
    assert "UPPER.PNG" in listing.names


def test_images_in_folders_below_that_of_their_class_are_listed(root: Path) -> None:
    flat = list_split(root, "train", 3, seed=0)
    write_image(root / "train" / "ant" / "spring" / "late" / "0.png", 9, 9, seed=0)
    (root / "train" / "ant" / "autumn").mkdir()
    nested = list_split(root, "train", 3, seed=0)
    assert set(nested.names) - set(flat.names) == {"spring/late/0.png"}
    assert Path(nested.reference(nested.names.index("spring/late/0.png"))).is_file()


def test_test_images_lie_in_val_or_in_test(tmp_path: Path) -> None:
    write_folder(tmp_path, test_name="test")
    assert list_split(tmp_path, "test", 3, 0).folder == tmp_path / "test"
    write_folder(tmp_path, test_name="val")
    assert list_split(tmp_path, "test", 3, 0).folder == tmp_path / "val"


def test_a_missing_split_is_refused(root: Path) -> None:
    shutil.rmtree(root / "val")
    with raises(UsageError, "image-folder-missing"):
        list_split(root, "test", 3, 0)


def test_another_number_of_classes_is_refused_with_the_right_one(root: Path) -> None:
    with raises(UsageError, "class-count"):
        list_split(root, "train", 4, 0)


def test_images_without_class_folders_are_refused(tmp_path: Path) -> None:
    write_image(tmp_path / "train" / "a.png", 9, 9, seed=0)
    with raises(UsageError, "class-count"):
        list_split(tmp_path, "train", 2, 0)


def test_an_empty_class_is_refused_and_named(root: Path) -> None:
    (root / "train" / "dog").mkdir()
    with raises(UsageError, "class-empty"):
        list_split(root, "train", 4, 0)


def test_splits_that_name_their_classes_differently_are_refused(root: Path) -> None:
    (root / "val" / "cat").rename(root / "val" / "dog")
    with raises(UsageError, "classes-differ"):
        check_same_classes(list_split(root, "train", 3, 0), list_split(root, "test", 3, 0))


def subset(listing: FolderListing, size: int | None, seed: int) -> FolderListing:
    settings = DataSettings(name="imagefolder", classes=3, train_size=size)
    return listing.select(divided(listing.labels, settings, seed)[0])


def test_a_subset_is_balanced_and_a_larger_one_contains_it(root: Path) -> None:
    listing = list_split(root, "train", 3, 0)
    small, large = subset(listing, 9, seed=1), subset(listing, 15, seed=1)
    assert torch.bincount(small.labels).tolist() == [3, 3, 3]
    small_paths = [small.reference(sample) for sample in range(9)]
    assert set(small_paths) <= {large.reference(sample) for sample in range(15)}
    order = [listing.reference(sample) for sample in range(len(listing))]
    assert sorted(small_paths, key=order.index) == small_paths
    assert subset(listing, None, 0).names == listing.names
    with raises(UsageError, "too-few-samples"):
        subset(listing, 25, 0)
