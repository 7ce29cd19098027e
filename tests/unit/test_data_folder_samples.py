from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from dist_train.config import DataSettings
from dist_train.data import loader
from dist_train.data.augmentation import channel_statistics
from dist_train.data.images import BatchRequest
from dist_train.data.loader import Splits, augmentation_draws, open_splits
from dist_train.outcome import FaultError
from tests.raising import raises
from tests.unit.image_folders import damage, listed, write_folder
from tests.unit.image_sets import decode

CPU = torch.device("cpu")
TRAIN = 24
LOADERS = (0, 1, 2)


@pytest.fixture(scope="module")
def root(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_folder(tmp_path_factory.mktemp("folder"))


def data(root: Path, loaders: int = 0, **others: object) -> DataSettings:
    values = {"name": "imagefolder", "root": root, "classes": 3, "image_size": 8, "loader_workers": loaders}
    return DataSettings.model_validate({**values, **others})


@pytest.fixture(scope="module")
def opened(root: Path) -> Iterator[dict[int, Splits]]:
    """The same folder, augmented, with 0, 1 and 2 loader processes."""
    opened = {loaders: open_splits(data(root, loaders, augment="crop-flip"), 5, CPU) for loaders in LOADERS}
    yield opened
    for splits in opened.values():
        splits.close()


def bytes_of(root: Path, split: str, sample: int, draws: list[float] | None, seed: int = 5) -> Tensor:
    listing = listed(root, "train" if split == "train" else "test", 3, seed)
    return torch.from_numpy(np.ascontiguousarray(decode(listing.reference(sample), 8, draws)))


@pytest.mark.parametrize("loaders", LOADERS)
def test_samples_are_those_of_the_shuffled_listing(opened: dict[int, Splits], root: Path, loaders: int) -> None:
    splits = opened[loaders]
    assert (len(splits.train), len(splits.test)) == (24, 12)
    inputs, labels = splits.train.read(BatchRequest(torch.arange(4, 7)))
    expected = torch.stack([bytes_of(root, "train", sample, None) for sample in (4, 5, 6)])
    assert torch.equal(inputs, expected.to(torch.float32) / 255)
    known = listed(root, "train", 3, 5).labels
    assert known is not None
    assert torch.equal(labels, known[4:7])
    indices = torch.tensor([11, 2])
    assert torch.equal(
        splits.test.read(BatchRequest(indices))[0][1], bytes_of(root, "test", 2, None).to(torch.float32) / 255
    )
    assert torch.equal(splits.test.read(BatchRequest(indices, 3))[0], splits.test.read(BatchRequest(indices))[0])


@settings(deadline=None, max_examples=25)
@given(
    st.lists(st.integers(0, TRAIN - 1), min_size=1, max_size=40),
    st.integers(0, 3),
    st.lists(st.integers(1, 15), min_size=1, max_size=4),
    st.booleans(),
)
def test_promise_2_no_number_of_loaders_and_no_grouping_changes_a_bit(
    opened: dict[int, Splits], root: Path, indices: list[int], epoch: int, sizes: list[int], announced: bool
) -> None:
    wanted = torch.tensor(indices)
    draws = augmentation_draws(wanted, 5, epoch).tolist()
    expected = torch.stack(
        [bytes_of(root, "train", sample, values) for sample, values in zip(indices, draws, strict=True)]
    )
    cuts = torch.tensor(sizes).cumsum(0)
    parts = [part for part in torch.tensor_split(wanted, cuts[cuts < len(indices)]) if len(part)]
    for splits in opened.values():
        if announced:
            splits.train.prefetch(BatchRequest(part, epoch) for part in parts)
        found = torch.cat([splits.train.read(BatchRequest(part, epoch))[0] for part in parts])
        assert torch.equal(found, expected.to(torch.float32) / 255)


def test_augmentation_changes_with_the_epoch_and_the_sample() -> None:
    samples = torch.arange(50)
    first, again, later = (augmentation_draws(samples, 0, epoch) for epoch in (0, 0, 1))
    assert torch.equal(first, again)
    assert len(torch.unique(torch.cat([first, later]))) > 0.999 * 2 * first.numel()
    assert torch.equal(augmentation_draws(samples[7:9], 0, 0), first[7:9])


@pytest.mark.parametrize("loaders", LOADERS)
def test_an_evaluation_amid_what_was_announced_changes_nothing(opened: dict[int, Splits], loaders: int) -> None:
    train, test = opened[loaders].train, opened[loaders].test
    batches = [torch.arange(0, 10), torch.arange(10, 20)]
    expected = [opened[0].train.read(BatchRequest(batch, 1))[0] for batch in batches]
    train.prefetch(BatchRequest(batch, 1) for batch in batches)
    assert torch.equal(train.read(BatchRequest(batches[0], 1))[0], expected[0])
    test.prefetch([BatchRequest(torch.arange(12), None)])
    assert torch.equal(
        test.read(BatchRequest(torch.arange(0, 12)))[0], opened[0].test.read(BatchRequest(torch.arange(0, 12)))[0]
    )
    assert torch.equal(train.read(BatchRequest(batches[1], 1))[0], expected[1])


@pytest.mark.parametrize("loaders", [0, 2])
def test_both_splits_are_normalized_by_a_seeded_sample_of_the_training_images(
    root: Path, monkeypatch: pytest.MonkeyPatch, loaders: int
) -> None:
    monkeypatch.setattr(loader, "STATISTICS_SAMPLES", 10)
    monkeypatch.setattr(loader, "_STATISTICS_PART", 4)
    splits = open_splits(data(root, loaders, normalize=True), 5, CPU)
    images = torch.stack([bytes_of(root, "train", sample, None) for sample in range(10)])
    statistics = channel_statistics([images])
    assert splits.normalization == statistics
    for split in ("train", "test"):
        expected = bytes_of(root, split, 7, None).to(torch.float32) / 255
        for channel in range(3):
            expected[channel].sub_(statistics.mean[channel]).div_(statistics.deviation[channel])
        assert torch.equal(getattr(splits, split).read(BatchRequest(torch.arange(7, 8)))[0][0], expected)
    splits.close()


def test_train_size_takes_a_balanced_part_of_train_and_all_of_test(root: Path) -> None:
    splits = open_splits(data(root, train_size=6), 5, CPU)
    assert torch.bincount(splits.train.read(BatchRequest(torch.arange(0, 6)))[1]).tolist() == [2, 2, 2]
    assert (len(splits.train), len(splits.test)) == (6, 12)


@pytest.mark.parametrize("loaders", LOADERS)
def test_a_damaged_image_is_a_fault_that_names_the_file(tmp_path: Path, loaders: int) -> None:
    broken = damage(write_folder(tmp_path) / "train" / "bee" / "0003.png")
    splits = open_splits(data(tmp_path, loaders), 0, CPU)
    with raises(FaultError, "image-unreadable") as fault:
        splits.train.read(BatchRequest(torch.arange(0, TRAIN)))
    assert str(broken) in str(fault.value)
    splits.close()
    with raises(FaultError, "image-unreadable"):
        open_splits(data(tmp_path, loaders, normalize=True), 0, CPU)
