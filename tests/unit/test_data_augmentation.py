from __future__ import annotations

import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from dist_train.data.augmentation import AUGMENTATIONS, crop_flip


def pictures(count: int, channels: int = 3, height: int = 10, width: int = 7) -> Tensor:
    source = torch.Generator().manual_seed(count)
    return torch.randint(1, 256, (count, channels, height, width), dtype=torch.uint8, generator=source)


def all_changes(picture: Tensor) -> set[bytes]:
    """Every crop of a picture padded by 4, mirrored or not."""
    _, height, width = picture.shape
    padded = torch.nn.functional.pad(picture, (4, 4, 4, 4))
    crops = [padded[:, top : top + height, left : left + width] for top in range(9) for left in range(9)]
    return {each.contiguous().numpy().tobytes() for crop in crops for each in (crop, crop.flip(2))}


def test_every_image_is_one_of_the_crops_of_its_own_and_all_occur() -> None:
    picture = pictures(1)
    changed = crop_flip(picture.expand(4000, -1, -1, -1), torch.arange(4000), seed=0, epoch=0)
    assert changed.dtype == torch.uint8
    seen = {each.numpy().tobytes() for each in changed}
    assert seen == all_changes(picture[0])


def test_images_are_not_mixed() -> None:
    several = pictures(50)
    changed = crop_flip(several, torch.arange(50), seed=3, epoch=1)
    assert all(new.numpy().tobytes() in all_changes(old) for old, new in zip(several, changed, strict=True))


@settings(deadline=None, max_examples=40)
@given(st.integers(1, 60), st.integers(1, 60), st.integers(0, 5))
def test_promise_2_a_change_depends_on_seed_epoch_and_sample_alone(count: int, part: int, epoch: int) -> None:
    images = pictures(count)
    samples = torch.randperm(count, generator=torch.Generator().manual_seed(part)) * 1001
    whole = crop_flip(images, samples, seed=1, epoch=epoch)
    grouped = [
        crop_flip(*pair, 1, epoch) for pair in zip(torch.split(images, part), torch.split(samples, part), strict=True)
    ]
    assert torch.equal(torch.cat(grouped), whole)
    backwards = crop_flip(images.flip(0), samples.flip(0), 1, epoch)
    assert torch.equal(backwards.flip(0), whole)


def test_another_epoch_or_seed_changes_otherwise() -> None:
    images, samples = pictures(20), torch.arange(20)
    first = crop_flip(images, samples, seed=0, epoch=0)
    assert not torch.equal(crop_flip(images, samples, seed=0, epoch=1), first)
    assert not torch.equal(crop_flip(images, samples, seed=1, epoch=0), first)


def test_none_is_the_identity() -> None:
    images = pictures(3)
    assert AUGMENTATIONS["none"](images, torch.arange(3), 0, 0) is images
