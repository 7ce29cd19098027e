from __future__ import annotations

import math

import pytest
import torch

from dist_train.data.augmentation import ChannelStatistics, PixelFormat, channel_statistics

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
    statistics = channel_statistics(images)
    exact = images.double().div(255).transpose(0, 1).flatten(1)
    assert statistics.mean == pytest.approx(exact.mean(1).tolist(), rel=1e-12)
    assert statistics.deviation == pytest.approx(exact.std(1, correction=0).tolist(), rel=1e-9)


def test_statistics_do_not_depend_on_the_order_of_the_images_bit_identically() -> None:
    images = torch.randint(0, 256, (9000, 2, 3, 3), dtype=torch.uint8, generator=torch.Generator().manual_seed(1))
    assert channel_statistics(images) == channel_statistics(images.flip(0))


def test_normalized_pixels_have_mean_0_and_deviation_1() -> None:
    images = torch.randint(0, 99, (500, 3, 6, 6), dtype=torch.uint8, generator=torch.Generator().manual_seed(2))
    pixels = PixelFormat(statistics=channel_statistics(images)).convert(images)
    by_channel = pixels.double().transpose(0, 1).flatten(1)
    assert by_channel.mean(1).abs().max() < 1e-6
    assert (by_channel.std(1, correction=0) - 1).abs().max() < 1e-6


def test_a_constant_channel_can_be_normalized() -> None:
    images = torch.full((4, 1, 3, 3), 51, dtype=torch.uint8)
    statistics = channel_statistics(images)
    assert statistics.deviation == (1.0,)
    assert math.isclose(statistics.mean[0], 0.2)
    assert PixelFormat(statistics=statistics).convert(images).abs().max() < 1e-7


def test_channels_last_and_another_type_change_layout_and_type_only() -> None:
    images = torch.randint(0, 256, (5, 3, 4, 4), dtype=torch.uint8, generator=torch.Generator().manual_seed(3))
    statistics = channel_statistics(images)
    plain = PixelFormat(statistics=statistics).convert(images)
    last = PixelFormat(torch.bfloat16, torch.channels_last, statistics).convert(images)
    assert last.is_contiguous(memory_format=torch.channels_last)
    assert torch.equal(last, plain.to(torch.bfloat16))
