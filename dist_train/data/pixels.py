"""From stored bytes to what the network reads: copies to the device, augmentation, scaling."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass

import torch
from torch import Tensor
from torch.nn import functional

from dist_train.randomness import key, uniform

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


Augmentation = Callable[[Tensor, Tensor, int, int], Tensor]
"""(images uint8 [n, C, H, W], samples int64 [n] on the same device, seed, epoch) -> images."""

_MARGIN = 4
_DRAWS = 3


def unchanged(images: Tensor, samples: Tensor, seed: int, epoch: int) -> Tensor:
    """Return the images as they are."""
    return images


def crop_flip(images: Tensor, samples: Tensor, seed: int, epoch: int) -> Tensor:
    """Pad by 4 zero pixels, crop back at a random place, and mirror every second image left to right."""
    count, channels, height, width = images.shape
    stream = key(seed, "crop-flip", epoch)
    down, right, mirror = (uniform(stream, samples * _DRAWS + draw) for draw in range(_DRAWS))
    places = 2 * _MARGIN + 1
    top = (down * places).long()
    left = (right * places).long()
    rows = top.unsqueeze(1) + torch.arange(height, device=images.device)
    columns = torch.arange(width, device=images.device).expand(count, width)
    columns = left.unsqueeze(1) + torch.where(mirror.unsqueeze(1) < 0.5, columns.flip(1), columns)
    padded = functional.pad(images, (_MARGIN, _MARGIN, _MARGIN, _MARGIN))
    padded_width = width + 2 * _MARGIN
    places_in_image = (rows.unsqueeze(2) * padded_width + columns.unsqueeze(1)).view(count, 1, height * width)
    cropped = padded.flatten(2).gather(2, places_in_image.expand(count, channels, height * width))
    return cropped.view(count, channels, height, width)


AUGMENTATIONS: Mapping[str, Augmentation] = {"none": unchanged, "crop-flip": crop_flip}


def move(tensor: Tensor, device: torch.device) -> Tensor:
    """Copy to the device without making the host wait; on a CPU, nothing is copied."""
    if device.type != "cuda":
        return tensor.to(device)
    return tensor.pin_memory().to(device, non_blocking=True)


def staging_buffer(shape: tuple[int, ...], dtype: torch.dtype, device: torch.device) -> Tensor:
    """Return memory that can be copied to `device` without a wait: `buffer.to(device, non_blocking=True)`.

    torch keeps a pinned block from being reused until the copy out of it is done.
    """
    return torch.empty(shape, dtype=dtype, pin_memory=device.type == "cuda")
