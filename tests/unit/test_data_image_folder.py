from __future__ import annotations

import os
import shutil
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from dist_train.data.images import Listing
from dist_train.outcome import UsageError
from tests.raising import raises
from tests.unit.image_folders import CLASSES, listed, write_folder, write_image


@pytest.fixture
def root(tmp_path: Path) -> Path:
    return write_folder(tmp_path)


def paths_of(listing: Listing) -> list[str]:
    return [listing.reference(sample) for sample in range(len(listing))]


def labels_of(listing: Listing) -> Tensor:
    assert listing.labels is not None
    return listing.labels


def test_every_image_is_listed_once_with_the_class_of_its_folder(root: Path) -> None:
    listing = listed(root, "train", 3, seed=0)
    paths = paths_of(listing)
    assert sorted(paths) == sorted(map(str, root.glob("train/*/*.png")))
    assert [Path(path).parent.name for path in paths] == [CLASSES[label] for label in labels_of(listing).tolist()]


def test_a_folder_is_no_image_whatever_its_name(root: Path) -> None:
    write_image(root / "train" / "ant" / "from camera.JPG" / "1.png", 20, 20, seed=1)
    (root / "train" / "ant" / "link.png").symlink_to("0001.png")
    paths = paths_of(listed(root, "train", 3, seed=0))
    assert sorted(paths) == sorted(map(str, root.glob("train/**/*.png")))


def test_the_order_depends_on_the_seed_alone_and_mixes_the_classes(root: Path) -> None:
    first, again, other = (paths_of(listed(root, "train", 3, seed)) for seed in (0, 0, 1))
    assert first == again
    assert first != other
    assert set(labels_of(listed(root, "train", 3, 0))[:9].tolist()) == {0, 1, 2}


def test_the_order_does_not_depend_on_the_file_system_s(root: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    expected = listed(root, "train", 3, seed=0)
    scandir = os.scandir

    @contextmanager
    def backwards(folder: Any) -> Iterator[list[os.DirEntry[str]]]:
        with scandir(folder) as entries:
            yield sorted(entries, key=lambda entry: entry.name, reverse=True)

    monkeypatch.setattr(os, "scandir", backwards)
    found = listed(root, "train", 3, seed=0)
    assert paths_of(found) == paths_of(expected)
    assert torch.equal(labels_of(found), labels_of(expected))


def test_hidden_files_and_files_of_other_kinds_are_left_out(root: Path) -> None:
    (root / "train" / "ant" / "._0000.png").write_bytes(b"what a Mac leaves behind")
    (root / "train" / "ant" / "notes.txt").touch()
    (root / "train" / ".cache").mkdir()
    (root / "train" / "README").touch()
    write_image(root / "train" / "ant" / "UPPER.PNG", 9, 9, seed=0)
    listing = listed(root, "train", 3, seed=0)
    assert len(listing) == 25
    assert str(root / "train" / "ant" / "UPPER.PNG") in paths_of(listing)


def test_images_in_folders_below_that_of_their_class_are_listed(root: Path) -> None:
    flat = listed(root, "train", 3, seed=0)
    write_image(root / "train" / "ant" / "spring" / "late" / "0.png", 9, 9, seed=0)
    (root / "train" / "ant" / "autumn").mkdir()
    nested = listed(root, "train", 3, seed=0)
    assert set(paths_of(nested)) - set(paths_of(flat)) == {f"{root}/train/ant/spring/late/0.png"}


def test_test_images_lie_in_val_or_in_test(tmp_path: Path) -> None:
    write_folder(tmp_path, test_name="test")
    assert Path(listed(tmp_path, "test", 3, 0).reference(0)).is_relative_to(tmp_path / "test")
    write_folder(tmp_path, test_name="val")
    assert Path(listed(tmp_path, "test", 3, 0).reference(0)).is_relative_to(tmp_path / "val")


def test_a_missing_split_is_refused(root: Path) -> None:
    shutil.rmtree(root / "val")
    with raises(UsageError, "image-folder-missing"):
        listed(root, "test", 3, 0)


def test_another_number_of_classes_is_refused_with_the_right_one(root: Path) -> None:
    with raises(UsageError, "class-count"):
        listed(root, "train", 4, 0)


def test_images_without_class_folders_are_refused(tmp_path: Path) -> None:
    write_image(tmp_path / "train" / "a.png", 9, 9, seed=0)
    with raises(UsageError, "class-count"):
        listed(tmp_path, "train", 2, 0)


def test_an_empty_class_is_refused_and_named(root: Path) -> None:
    (root / "train" / "dog").mkdir()
    with raises(UsageError, "class-empty"):
        listed(root, "train", 4, 0)


@pytest.mark.parametrize("change", ["renamed", "missing", "added"])
def test_splits_with_different_classes_are_refused_whatever_their_numbers(change: str, root: Path) -> None:
    if change == "added":
        (root / "val" / "dog").mkdir()
    else:
        (root / "val" / "cat").rename(root / "val" / ("dog" if change == "renamed" else ".cat"))
    with raises(UsageError, "classes-differ"):
        listed(root, "test", 3, 0)
