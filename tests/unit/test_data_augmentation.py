"""Pixels on the device: formats, augmentation, mixup and CutMix."""

from __future__ import annotations

import math
from functools import partial

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor
from torch.nn import functional

from dist_train.config import RegularizationSettings
from dist_train.data.augmentation import (
    ChannelStatistics,
    PixelFormat,
    Target,
    beta_shares,
    build_mix,
    channel_statistics,
    crop_flip,
    unmixed,
)
from dist_train.data.images import BatchRequest
from dist_train.data.plan import BatchPlan, MicroBatch
from dist_train.training.step import GlobalBatch, loss_sum


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


EVERY_BYTE = torch.arange(256, dtype=torch.uint8).view(4, 1, 8, 8)


def test_bytes_are_scaled_to_0_and_1_exactly() -> None:
    pixels = PixelFormat().convert(EVERY_BYTE)
    assert pixels.dtype == torch.float32
    assert torch.equal(pixels, EVERY_BYTE.to(torch.float32) / 255)
    assert pixels.min() == 0
    assert pixels.max() == 1


def test_converting_leaves_the_bytes_alone() -> None:
    before = EVERY_BYTE.clone()
    PixelFormat(statistics=ChannelStatistics((0.5,), (0.2,))).convert(EVERY_BYTE)
    assert torch.equal(EVERY_BYTE, before)


@pytest.mark.parametrize("count", [1, 7, 5000])
def test_statistics_are_those_of_the_pixels(count: int) -> None:
    source = torch.Generator().manual_seed(0)
    images = torch.randint(0, 200, (count, 3, 5, 4), dtype=torch.uint8, generator=source)
    images[:, 1] //= 3
    statistics = channel_statistics([images])
    exact = images.double().div(255).transpose(0, 1).flatten(1)
    assert statistics.mean == pytest.approx(exact.mean(1).tolist(), rel=1e-12)
    assert statistics.deviation == pytest.approx(exact.std(1, correction=0).tolist(), rel=1e-9)


def test_statistics_do_not_depend_on_the_order_of_the_images_bit_identically() -> None:
    images = torch.randint(0, 256, (9000, 2, 3, 3), dtype=torch.uint8, generator=torch.Generator().manual_seed(1))
    assert channel_statistics([images]) == channel_statistics([images.flip(0)])


def test_normalized_pixels_have_mean_0_and_deviation_1() -> None:
    images = torch.randint(0, 99, (500, 3, 6, 6), dtype=torch.uint8, generator=torch.Generator().manual_seed(2))
    pixels = PixelFormat(statistics=channel_statistics([images])).convert(images)
    by_channel = pixels.double().transpose(0, 1).flatten(1)
    assert by_channel.mean(1).abs().max() < 1e-6
    assert (by_channel.std(1, correction=0) - 1).abs().max() < 1e-6


def test_a_constant_channel_can_be_normalized() -> None:
    images = torch.full((4, 1, 3, 3), 51, dtype=torch.uint8)
    statistics = channel_statistics([images])
    assert statistics.deviation == (1.0,)
    assert math.isclose(statistics.mean[0], 0.2)
    assert PixelFormat(statistics=statistics).convert(images).abs().max() < 1e-7


def test_channels_last_changes_the_layout_only() -> None:
    images = torch.randint(0, 256, (5, 3, 4, 4), dtype=torch.uint8, generator=torch.Generator().manual_seed(3))
    statistics = channel_statistics([images])
    plain = PixelFormat(statistics=statistics).convert(images)
    last = PixelFormat(torch.channels_last, statistics).convert(images)
    assert last.is_contiguous(memory_format=torch.channels_last)
    assert torch.equal(last, plain)


SAMPLES, CLASSES = 40, 5
BOTH = RegularizationSettings(mixup=0.4, cutmix=1.0)
KINDS = [RegularizationSettings(mixup=0.4), RegularizationSettings(cutmix=1.0), BOTH]


def read(request: BatchRequest) -> tuple[torch.Tensor, torch.Tensor]:
    """Return images that are their sample's number all over, and their labels."""
    numbers = request.indices.to(torch.float32)
    return numbers.view(-1, 1, 1, 1).expand(-1, 1, 6, 8).contiguous(), request.indices % CLASSES


def mixed(
    settings: RegularizationSettings, micro_batches: tuple[MicroBatch, ...], size: int, epoch: int = 3
) -> list[torch.Tensor]:
    """Return images, labels, partners' labels and shares of the first `size` samples of a shuffled set."""
    order = torch.randperm(SAMPLES, generator=torch.Generator().manual_seed(1))[:size]
    batch = GlobalBatch(0, epoch, order, micro_batches, partners=1)
    mix = build_mix(settings, 7, SAMPLES)
    parts = []
    for micro_batch in micro_batches:
        request = batch.request(micro_batch)
        inputs, target = mix(*read(request), request)
        assert target.partners is not None
        assert target.share is not None
        parts.append((inputs, target.labels, target.partners, target.share))
    return [torch.cat(list(tensors)) for tensors in zip(*parts, strict=True)]


@pytest.mark.parametrize("settings", KINDS)
@given(size=st.integers(1, SAMPLES), micro_size=st.integers(1, SAMPLES), ranks=st.integers(1, 3))
def test_neither_micro_batches_nor_shared_ones_change_what_is_mixed(
    settings: RegularizationSettings, size: int, micro_size: int, ranks: int
) -> None:
    plan = BatchPlan(size, min(size, micro_size))
    whole = mixed(settings, BatchPlan(size, size).micro_batches, size)
    cut = mixed(settings, plan.micro_batches, size)
    assert all(map(torch.equal, whole, cut))
    if plan.micro_batches[-1].size >= ranks:
        slices = sorted((part for rank in range(ranks) for part in plan.slices(rank, ranks)), key=lambda it: it.start)
        assert all(map(torch.equal, whole, mixed(settings, tuple(slices), size)))


@pytest.mark.parametrize("settings", KINDS)
def test_an_image_is_mixed_with_the_next_by_the_share_that_its_label_has(settings: RegularizationSettings) -> None:
    order = torch.randperm(SAMPLES, generator=torch.Generator().manual_seed(1)).to(torch.float32)
    images, labels, partners, share = mixed(settings, BatchPlan(SAMPLES, 16).micro_batches, SAMPLES)
    assert torch.equal(labels, order.long() % CLASSES)
    assert torch.equal(partners, labels.roll(-1))
    means = order * share + order.roll(-1) * (1 - share)
    assert torch.allclose(images.mean((1, 2, 3)), means, atol=1e-4)
    assert int((share < 1).sum()) > 0


def test_cutmix_alone_cuts_every_image_and_with_mixup_half_of_them() -> None:
    plan = BatchPlan(SAMPLES, 16)
    (alone, *_, share), (both, *_) = (
        mixed(RegularizationSettings(mixup=mixup, cutmix=1e6), plan.micro_batches, SAMPLES) for mixup in (0.0, 1e6)
    )
    assert all(len(image.unique()) == 2 for image in alone)
    assert 10 <= sum(len(image.unique()) == 2 for image in both) <= 30
    # all draw a half, and a box has the square root of that of each side, unless the edge clips it
    assert float(share.min()) == pytest.approx(1 - 4 * 5 / (6 * 8))


def test_each_epoch_mixes_otherwise() -> None:
    plan = BatchPlan(SAMPLES, 16)
    first, second = (mixed(BOTH, plan.micro_batches, SAMPLES, epoch)[3] for epoch in (0, 1))
    assert not torch.equal(first, second)


@pytest.mark.parametrize(
    ("alpha", "deviation"), [(1e-6, 0.5), (0.001, 0.4995), (0.01, 0.495), (0.2, 0.4226), (1.0, 0.2887), (5.0, 0.1508)]
)
def test_shares_follow_the_beta_distribution(alpha: float, deviation: float) -> None:
    shares = beta_shares(20_000, 0, 0, "mixup", alpha)
    assert bool(((shares >= 0) & (shares <= 1)).all())
    assert float(shares.mean()) == pytest.approx(0.5, abs=0.02)
    assert float(shares.std()) == pytest.approx(deviation, rel=0.02)


@pytest.mark.parametrize("smoothing", [0.0, 0.1])
def test_the_loss_is_the_cross_entropy_with_soft_labels(smoothing: float) -> None:
    source = torch.Generator().manual_seed(0)
    logits = torch.randn(6, CLASSES, generator=source)
    labels, partners = torch.arange(6) % CLASSES, (torch.arange(6) + 2) % CLASSES
    share = torch.rand(6, generator=source)
    hot = functional.one_hot(labels, CLASSES) * share[:, None] + functional.one_hot(partners, CLASSES) * (
        1 - share[:, None]
    )
    loss = partial(functional.cross_entropy, label_smoothing=smoothing)
    expected = functional.cross_entropy(logits, hot, label_smoothing=smoothing, reduction="sum")
    found = loss_sum(loss, logits, Target(labels, partners, share))
    assert float(found) == pytest.approx(float(expected), rel=1e-6)
    assert torch.equal(Target(labels, partners, share).main, torch.where(share >= 0.5, labels, partners))
    assert torch.equal(loss_sum(loss, logits, Target(labels)), loss(logits, labels, reduction="sum"))


def test_without_settings_nothing_is_mixed() -> None:
    assert build_mix(RegularizationSettings(label_smoothing=0.1), 0, 10) is unmixed
