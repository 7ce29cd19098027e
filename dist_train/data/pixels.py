"""From stored bytes to the numbers that the network reads, on the device."""

from __future__ import annotations

import math
from collections.abc import Iterable
from dataclasses import dataclass

import torch
from torch import Tensor

_CHUNK = 4096


@dataclass(frozen=True)
class ChannelStatistics:
    """Mean and standard deviation of each channel, of pixels scaled to [0, 1]."""

    mean: tuple[float, ...]
    deviation: tuple[float, ...]


@dataclass(frozen=True)
class PixelFormat:
    """What the network is fed: pixels scaled to [0, 1], then normalized where `statistics` are given."""

    dtype: torch.dtype = torch.float32
    memory_format: torch.memory_format = torch.contiguous_format
    statistics: ChannelStatistics | None = None

    def convert(self, images: Tensor) -> Tensor:
        """Return uint8 [n, C, H, W] as `dtype` on the same device; each image on its own."""
        pixels = images.to(torch.float32, memory_format=self.memory_format).div_(255)
        if self.statistics is not None:
            for channel, (mean, deviation) in enumerate(
                zip(self.statistics.mean, self.statistics.deviation, strict=True)
            ):
                pixels[:, channel].sub_(mean).div_(deviation)
        return pixels.to(self.dtype)


def channel_statistics(images: Tensor) -> ChannelStatistics:
    """Return the statistics of uint8 [N, C, H, W] from exact integer sums: equal on every machine.

    A channel without any variation gets the deviation 1, so that it can be divided by.
    """
    return statistics_of_parts(torch.split(images, _CHUNK))


def statistics_of_parts(parts: Iterable[Tensor]) -> ChannelStatistics:
    """Return the statistics of images that come in parts, uint8 [n, C, H, W]; how they are cut does not matter."""
    counts = torch.zeros(0, 256, dtype=torch.int64)
    for part in parts:
        found = [torch.bincount(part[:, channel].reshape(-1), minlength=256) for channel in range(part.shape[1])]
        counts = torch.stack(found) + (counts if len(counts) else 0)
    values = torch.arange(256)
    pixels = int(counts[0].sum())
    means, deviations = [], []
    for channel_counts in counts:
        total = int((channel_counts * values).sum())
        squares = int((channel_counts * values * values).sum())
        means.append(total / (pixels * 255))
        deviations.append(math.sqrt(pixels * squares - total * total) / (pixels * 255) or 1.0)
    return ChannelStatistics(tuple(means), tuple(deviations))
