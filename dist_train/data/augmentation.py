"""From stored bytes to what the network reads: copies to the device, augmentation, scaling, mixup and CutMix.

The partner of a mixed image is the next sample of the global batch, whose order is a random one; after the last comes
the first. So neither the number of ranks nor the size of micro-batches changes what is mixed. A micro-batch reads one
sample more. Draws depend on (seed, epoch, sample).
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass
from functools import lru_cache, partial

import torch
from torch import Tensor
from torch.nn import functional

from dist_train.config import RegularizationSettings
from dist_train.data.images import BatchRequest
from dist_train.reproducible import generator, key, uniform

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
"""Uniforms that a sample takes, of crops and of boxes."""


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


@dataclass(frozen=True)
class Target:
    """What a loss is taken against: `labels` int64 [n]; of a mixed image, also the partner's, with what is left of
    `share` float32 [n], the image's own.
    """

    labels: Tensor
    partners: Tensor | None = None
    share: Tensor | None = None

    @property
    def main(self) -> Tensor:
        """The label of the larger part of each image, int64 [n]: what training accuracy counts."""
        if self.partners is None or self.share is None:
            return self.labels
        return torch.where(self.share >= 0.5, self.labels, self.partners)


Mix = Callable[[Tensor, Tensor, BatchRequest], tuple[Tensor, Target]]
"""(inputs [n + 1, C, H, W], labels int64 [n + 1], what was asked for) -> mixed inputs [n, C, H, W] and their target."""


def unmixed(inputs: Tensor, labels: Tensor, batch: BatchRequest) -> tuple[Tensor, Target]:
    """Return all as it is."""
    return inputs, Target(labels)


def build_mix(settings: RegularizationSettings, seed: int, samples: int) -> Mix:
    """Return what `settings` do to the micro-batches of a training set of so many samples."""
    if not settings.mixes:
        return unmixed
    shares = lru_cache(4)(partial(beta_shares, samples, seed))
    return partial(_mixed, settings=settings, seed=seed, shares=shares)


def beta_shares(samples: int, seed: int, epoch: int, kind: str, alpha: float) -> Tensor:
    """Return the share of its own that each sample of an epoch keeps, from Beta(alpha, alpha): float32 [samples]."""
    # what torch.distributions.Beta calls, which takes no generator
    both = torch.full((samples, 2), alpha, dtype=torch.float64)
    return torch._sample_dirichlet(both, generator=generator(seed, kind, epoch))[:, 0].to(torch.float32)


def _mixed(
    inputs: Tensor,
    labels: Tensor,
    batch: BatchRequest,
    *,
    settings: RegularizationSettings,
    seed: int,
    shares: Callable[[int, str, float], Tensor],
) -> tuple[Tensor, Target]:
    assert batch.epoch is not None, "evaluations are not mixed"
    indices, device = batch.indices[:-1], inputs.device
    samples = move(indices, device)
    height, width = inputs.shape[2:]
    own, share = torch.ones(len(indices), 1, 1, 1, device=device), torch.ones(len(indices), device=device)
    if settings.mixup:
        share = move(shares(batch.epoch, "mixup", settings.mixup)[indices], device)
        own = share.view(-1, 1, 1, 1)
    if settings.cutmix:
        drawn = move(shares(batch.epoch, "cutmix", settings.cutmix)[indices], device)
        stream = key(seed, "cutmix boxes", batch.epoch)
        down, right, coin = (uniform(stream, samples * _DRAWS + draw) for draw in range(_DRAWS))
        kept = ~_boxes(drawn, down, right, height, width)
        is_cut = coin < (0.5 if settings.mixup else 1.0)
        own = torch.where(is_cut.view(-1, 1, 1, 1), kept.to(torch.float32).unsqueeze(1), own)
        share = torch.where(is_cut, kept.sum((1, 2)) / (height * width), share)
    mixed = torch.lerp(inputs[1:], inputs[:-1], own.to(inputs.dtype))
    return mixed, Target(labels[:-1], labels[1:], share)


def _boxes(share: Tensor, down: Tensor, right: Tensor, height: int, width: int) -> Tensor:
    """Return a box of each image, of area 1 - `share` around a uniform centre, cut off at the edges: bool [n, H, W]."""
    side = (1.0 - share).sqrt()

    def within(centre: Tensor, length: int) -> Tensor:
        middle, half = (centre * length).floor(), (side * length).floor() / 2
        places = torch.arange(length, device=share.device)
        low, high = (middle - half).floor().unsqueeze(1), (middle + half).floor().unsqueeze(1)
        return (places >= low) & (places < high)

    return within(down, height).unsqueeze(2) & within(right, width).unsqueeze(1)
