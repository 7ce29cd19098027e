"""Data sets with many samples, or larger than the memory."""

from __future__ import annotations

import hashlib
import io
import os
import resource
import tracemalloc
import zipfile
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from dist_train.config import DataSettings
from dist_train.data.images import BatchRequest, ImageSet
from dist_train.data.loader import open_splits
from dist_train.outcome import UsageError
from tests.raising import raises
from tests.unit import drawing_data

CPU = torch.device("cpu")
MANY = 2**24 + 4  # float32 rounds the number of the last sample up to this


class Numbers:
    """A Dataset of black images, which no sample beyond its length has, without a byte of memory."""

    def __init__(self, count: int) -> None:
        self.count = count

    def __len__(self) -> int:
        return self.count

    def __getitem__(self, index: int) -> tuple[torch.Tensor, int]:
        if not 0 <= index < self.count:
            raise IndexError(index)
        return torch.zeros(1, 1, 1, dtype=torch.uint8), index % 2


def test_a_dataset_may_have_more_samples_than_float32_can_count(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(drawing_data, "drawing", lambda settings, split, seed: Numbers(MANY if split == "train" else 4))
    own: dict[str, Any] = {"name": "tests.unit.drawing_data:drawing", "shape": (1, 1, 1), "classes": 2}
    splits = open_splits(DataSettings.model_validate(own), 0, CPU)
    assert splits.train.read(BatchRequest(torch.tensor([MANY - 1])))[1].tolist() == [(MANY - 1) % 2]


def test_arrays_may_have_more_samples_than_float32_can_count(tmp_path: Path) -> None:
    for split, count in (("train", MANY), ("test", 4)):
        np.save(tmp_path / f"{split}_images.npy", np.zeros((count, 1, 1), np.uint8))
        np.save(tmp_path / f"{split}_labels.npy", np.zeros(count, np.uint8))
    splits = open_splits(DataSettings(name="numpy", root=tmp_path, shape=(1, 1, 1), classes=2), 0, CPU)
    assert len(splits.train) == MANY
    assert splits.identity


SIDE = 224


def header(images: int) -> bytes:
    file = io.BytesIO()
    shape = (images, 3, SIDE, SIDE)
    np.lib.format.write_array_header_1_0(file, {"descr": "|u1", "fortran_order": False, "shape": shape})
    return file.getvalue()


def larger_than_memory(folder: Path, **others: object) -> DataSettings:
    """Write arrays whose training images need more than the memory and the swap, in a file with a hole for them."""
    kibibytes = {line.split(":")[0]: int(line.split()[1]) for line in Path("/proc/meminfo").read_text().splitlines()}
    images = 3 * (kibibytes["MemTotal"] + kibibytes["SwapTotal"]) * 1024 // (2 * 3 * SIDE * SIDE)
    for split, count in (("train", images), ("test", 4)):
        path = folder / f"{split}_images.npy"
        path.write_bytes(header(count))
        try:
            os.truncate(path, len(header(count)) + count * 3 * SIDE * SIDE)
        except OSError:
            pytest.skip("this file system has no files larger than the memory")
        np.save(folder / f"{split}_labels.npy", np.arange(count) % 2)
    form = {"name": "numpy", "root": folder, "shape": (3, SIDE, SIDE), "classes": 2}
    return DataSettings.model_validate({**form, **others})


@pytest.mark.parametrize("augment", ["none", "tests.unit.drawing_data:erased"])
@pytest.mark.parametrize("others", [{}, {"validation_size": 9}])
def test_an_array_may_be_larger_than_the_memory(others: dict[str, object], augment: str, tmp_path: Path) -> None:
    splits = open_splits(larger_than_memory(tmp_path, **others, augment=augment), 0, CPU)
    for samples in filter(None, (splits.train, splits.validation)):
        images, _ = samples.read(BatchRequest(torch.tensor([0, len(samples) - 1])))
        assert images.shape == (2, 3, SIDE, SIDE)
        assert not images.any()


def test_an_array_that_may_not_be_mapped_is_not_called_damaged(tmp_path: Path) -> None:
    settings = larger_than_memory(tmp_path)
    used = int(Path("/proc/self/statm").read_text().split()[0]) * resource.getpagesize()
    limit, most = resource.getrlimit(resource.RLIMIT_AS)
    resource.setrlimit(resource.RLIMIT_AS, (used + 2**30, most))
    try:
        with raises(UsageError, "data-unreadable"):
            open_splits(settings, 0, CPU)
    finally:
        resource.setrlimit(resource.RLIMIT_AS, (limit, most))


def test_an_archive_that_does_not_fit_the_memory_is_not_called_damaged(tmp_path: Path) -> None:
    with zipfile.ZipFile(tmp_path / "train.npz", "w") as archive:
        archive.writestr("images.npy", header(2**40))
    with raises(UsageError, "data-unreadable"):
        open_splits(DataSettings(name="numpy", root=tmp_path, shape=(3, SIDE, SIDE), classes=2), 0, CPU)


@pytest.mark.parametrize("is_contiguous", [True, False])
def test_images_are_digested_without_a_copy_of_them_all(is_contiguous: bool) -> None:
    images = torch.randint(256, (9000, 30, 30, 3), dtype=torch.uint8).movedim(-1, 1)
    images = images.contiguous() if is_contiguous else images
    labels = torch.arange(len(images)) % 10
    expected = hashlib.sha256(images.numpy().tobytes() + labels.numpy().tobytes()).hexdigest()[:16]
    tracemalloc.start()
    try:
        assert ImageSet(images, labels, 10).digest() == expected
        _, peak = tracemalloc.get_traced_memory()
    finally:
        tracemalloc.stop()
    assert peak < images.nbytes / 10
