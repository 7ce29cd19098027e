from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch

from dist_train.config import DataSettings
from dist_train.data import loader
from dist_train.data.augmentation import PixelFormat, channel_statistics, crop_flip
from dist_train.data.catalog import make_synthetic
from dist_train.data.images import BatchRequest, ImageSet
from dist_train.data.loader import Samples, open_splits
from dist_train.data.plan import divided
from dist_train.outcome import UsageError
from tests.raising import raises
from tests.unit.image_sets import load_images

CPU = torch.device("cpu")
INDICES = torch.tensor([31, 4, 4, 90, 0])


def test_a_split_that_there_never_is_is_not_taken_for_one_of_validation() -> None:
    split: Any = "val"
    with raises(UsageError, "no-such-choice"):
        open_splits(DataSettings(name="synthetic", synthetic_samples=8), 0, CPU).of(split)


def test_data_that_either_side_does_not_name_count_as_the_same() -> None:
    splits = open_splits(DataSettings(name="synthetic", synthetic_samples=8), 0, CPU)
    cases = (("a", "b", True), ("a", "a", False), ("", "b", False), ("a", "", False))
    assert [replace(splits, identity=here).differ_from(there) for here, there, _ in cases] == [it[2] for it in cases]


@pytest.fixture(params=["resident", "staged"])
def samples(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> Samples:
    monkeypatch.setattr(loader, "_fits", lambda needed, device: request.param == "resident")
    return Samples(made(), CPU)


def made() -> ImageSet:
    return make_synthetic((3, 8, 8), 10, 100, "train", seed=0)


def test_a_micro_batch_holds_the_samples_that_were_asked_for(samples: Samples) -> None:
    inputs, labels = samples.read(BatchRequest(INDICES, epoch=0))
    assert torch.equal(inputs, made().images[INDICES].to(torch.float32) / 255)
    assert torch.equal(labels, made().labels[INDICES])
    assert (inputs.dtype, labels.dtype, len(samples)) == (torch.float32, torch.int64, 100)


def test_plain_samples_follow_the_stored_order(samples: Samples) -> None:
    inputs, labels = samples.read(BatchRequest(torch.arange(90, 100)))
    assert torch.equal(inputs, made().images[90:].to(torch.float32) / 255)
    assert torch.equal(labels, made().labels[90:])


def test_promise_2_augmented_samples_do_not_depend_on_the_micro_batch() -> None:
    samples = Samples(made(), CPU, seed=5, augment="crop-flip")
    whole, _ = samples.read(BatchRequest(INDICES, epoch=2))
    expected = crop_flip(made().images[INDICES], INDICES, 5, 2).to(torch.float32) / 255
    assert torch.equal(whole, expected)
    parts = [samples.read(BatchRequest(part, epoch=2))[0] for part in torch.split(INDICES, 2)]
    assert torch.equal(torch.cat(parts), whole)
    assert torch.equal(samples.read(BatchRequest(torch.arange(0, 5)))[0], made().images[:5].to(torch.float32) / 255)


def test_all_splits_are_normalized_by_the_training_images_in_use(tmp_path: Path) -> None:
    settings = DataSettings(
        name="synthetic",
        synthetic_samples=200,
        train_size=50,
        validation_size=20,
        normalize=True,
        augment="crop-flip",
    )
    splits = open_splits(settings, seed=1, device=CPU, channels_last=True)
    whole = load_images(settings, "train", 1)
    kept, held_out = divided(whole.labels, settings, 1)
    assert held_out is not None
    train, held = whole.select(kept), whole.select(held_out)
    test = load_images(settings, "test", 1)
    pixels = PixelFormat(statistics=channel_statistics([train.images]))
    assert len(splits.train) == 50
    assert torch.equal(splits.train.read(BatchRequest(torch.arange(0, 50)))[0], pixels.convert(train.images))
    for samples, images in ((splits.of("validation"), held), (splits.test, test)):
        inputs, labels = samples.read(BatchRequest(torch.arange(len(images)), epoch=0))
        assert torch.equal(inputs, pixels.convert(images.images))
        assert torch.equal(labels, images.labels)
    assert inputs.is_contiguous(memory_format=torch.channels_last)
    assert not torch.equal(
        splits.train.read(BatchRequest(torch.arange(50), 0))[0], splits.train.read(BatchRequest(torch.arange(0, 50)))[0]
    )


def test_on_a_cpu_the_images_are_not_copied() -> None:
    images = made()
    samples = Samples(images, CPU)
    images.images[7] = 255
    assert samples.read(BatchRequest(torch.tensor([7]), 0))[0].min() == 1


@pytest.mark.parametrize("augment", ["crop-flip", "tests.unit.drawing_data:as_array"])
@pytest.mark.parametrize("place", ["resident", "staged"])
def test_parts_of_the_training_images_are_not_copied(place: str, augment: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(loader, "_fits", lambda needed, device: place == "resident")
    settings = DataSettings(
        name="synthetic",
        synthetic_samples=200,
        validation_size=30,
        train_size=100,  # more than half: of less, those that are not mapped would be copied, and the rest freed
        augment=augment,
        augment_options={"axes": [0, 1, 2]},
    )
    whole = load_images(settings, "train", 1)
    monkeypatch.setattr(ImageSet, "select", None)
    splits = open_splits(settings, 1, CPU)
    parts = divided(whole.labels, settings, 1)
    for samples, numbers in zip((splits.train, splits.of("validation")), parts, strict=True):
        assert numbers is not None
        images, labels = samples.read(BatchRequest(torch.arange(len(numbers))))
        assert torch.equal(images, whole.images[numbers] / 255)
        assert torch.equal(labels, whole.labels[numbers])
    if augment == "crop-flip":
        found, _ = splits.train.read(BatchRequest(INDICES % 100, epoch=2))
        assert torch.equal(found, crop_flip(whole.images[parts[0][INDICES % 100]], INDICES % 100, 1, 2) / 255)


def test_a_device_holds_the_part_in_use_alone() -> None:
    samples = Samples(made(), torch.device("meta"), numbers=INDICES)
    assert samples._images.shape == (5, 3, 8, 8)
    assert samples.read(BatchRequest(torch.arange(3)))[0].shape == (3, 3, 8, 8)


def test_a_set_stays_on_a_gpu_only_when_it_takes_less_than_a_quarter_of_its_free_memory(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    images = made()
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    for free, fits in ((4 * images.images.nbytes, False), (4 * images.images.nbytes + 4, True)):
        monkeypatch.setattr(torch.cuda, "mem_get_info", lambda device, free=free: (free, free))
        assert loader._fits(images.images.nbytes, torch.device("cuda")) is fits
