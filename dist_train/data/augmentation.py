"""From stored bytes to network inputs: copies to the device, augmentation, scaling, mixup and CutMix.

Each image is mixed with the next sample of the global batch, which is in random order; the last one is mixed with the
first. So neither the number of ranks nor the micro-batch size changes which images are mixed. A micro-batch reads one
sample more than it has. Draws depend on (seed, epoch, sample).
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable
from dataclasses import dataclass
from functools import lru_cache, partial

import torch
from torch import Tensor
from torch.nn import functional

from dist_train.config import RegularizationSettings
from dist_train.data.images import BatchRequest
from dist_train.reproducible import generator, key, uniform


@dataclass(frozen=True)
class ChannelStatistics:
    """Mean and standard deviation of each channel, for pixels scaled to [0, 1]."""

    mean: tuple[float, ...]
    deviation: tuple[float, ...]


@dataclass(frozen=True)
class PixelFormat:
    """The network's input format: pixels scaled to [0, 1], then normalized if `statistics` are given."""

    memory_format: torch.memory_format = torch.contiguous_format
    statistics: ChannelStatistics | None = None

    def convert(self, images: Tensor) -> Tensor:
        """Convert uint8 images [n, C, H, W] to float32 on the same device; images do not affect each other."""
        pixels = images.to(torch.float32, memory_format=self.memory_format).div_(255)
        if self.statistics is not None:
            means, deviations = self.statistics.mean, self.statistics.deviation
            for plane, mean, deviation in zip(pixels.unbind(1), means, deviations, strict=True):
                plane.sub_(mean).div_(deviation)
        return pixels


def channel_statistics(parts: Iterable[Tensor]) -> ChannelStatistics:
    """Return the statistics of all images in `parts`, uint8 [n, C, H, W], from exact integer sums.

    They do not depend on the division. A deviation of 0 becomes 1.
    """
    counts = torch.zeros(0, 256, dtype=torch.int64)
    for part in parts:
        channels = [torch.bincount(part[:, channel].reshape(-1), minlength=256) for channel in range(part.shape[1])]
        counts = torch.stack(channels) + (counts if len(counts) else 0)
    values = torch.arange(256)
    pixels = int(counts[0].sum())
    means, deviations = [], []
    for channel_counts in counts:
        total = int((channel_counts * values).sum())
        squares = int((channel_counts * values * values).sum())
        means.append(total / (pixels * 255))
        deviations.append(math.sqrt(pixels * squares - total * total) / (pixels * 255) or 1.0)
    return ChannelStatistics(tuple(means), tuple(deviations))


_MARGIN = 4
_DRAWS = 3  # uniform random numbers per sample, both for crops and for boxes


def crop_flip(images: Tensor, samples: Tensor, seed: int, epoch: int) -> Tensor:
    """Pad by 4 zero pixels, crop to the former size at random, and mirror left to right with probability 1/2.

    `images`: uint8 [n, C, H, W]; `samples`: their numbers, int64 [n] on the same device.
    """
    count, channels, height, width = images.shape
    stream = key(seed, "crop-flip", epoch)
    down, right, mirror = (uniform(stream, samples * _DRAWS + draw) for draw in range(_DRAWS))
    offsets = 2 * _MARGIN + 1
    top = (down * offsets).long()
    left = (right * offsets).long()
    rows = top.unsqueeze(1) + torch.arange(height, device=images.device)
    columns = torch.arange(width, device=images.device).expand(count, width)
    columns = left.unsqueeze(1) + torch.where(mirror.unsqueeze(1) < 0.5, columns.flip(1), columns)
    padded = functional.pad(images, (_MARGIN, _MARGIN, _MARGIN, _MARGIN))
    padded_width = width + 2 * _MARGIN
    indices = (rows.unsqueeze(2) * padded_width + columns.unsqueeze(1)).view(count, 1, height * width)
    cropped = padded.flatten(2).gather(2, indices.expand(count, channels, height * width))
    return cropped.view(count, channels, height, width)


def move(tensor: Tensor, device: torch.device) -> Tensor:
    """Copy `tensor` to the device without making the host wait; on a CPU, nothing is copied."""
    if device.type != "cuda":
        return tensor.to(device)
    return tensor.pin_memory().to(device, non_blocking=True)


def staging_buffer(shape: tuple[int, ...], dtype: torch.dtype, device: torch.device) -> Tensor:
    """Return a buffer to copy to `device` without waiting; torch reuses a pinned block only after the copies."""
    return torch.empty(shape, dtype=dtype, pin_memory=device.type == "cuda")


@dataclass(frozen=True)
class Target:
    """The labels of a loss, int64 [n]. Mixed images also have their `partners`' labels, int64 [n]; then `labels` count
    with weight `share`, float32 [n], and `partners` with 1 - `share`.
    """

    labels: Tensor
    partners: Tensor | None = None
    share: Tensor | None = None

    @property
    def main(self) -> Tensor:
        """The label with the larger weight for each image, int64 [n]: training accuracy is measured by it."""
        if self.partners is None or self.share is None:
            return self.labels
        return torch.where(self.share >= 0.5, self.labels, self.partners)


Mix = Callable[[Tensor, Tensor, BatchRequest], tuple[Tensor, Target]]
"""(inputs [n + 1, C, H, W], labels int64 [n + 1], their request) -> mixed inputs [n, C, H, W] and their target.

`unmixed` takes and returns n inputs.
"""


def unmixed(inputs: Tensor, labels: Tensor, batch: BatchRequest) -> tuple[Tensor, Target]:
    """Return the inputs unchanged, and their labels as the target."""
    return inputs, Target(labels)


def build_mix(settings: RegularizationSettings, seed: int, samples: int) -> Mix:
    """Return how `settings` mix the images of a micro-batch, for a training set of `samples` samples."""
    if not settings.mixes:
        return unmixed
    shares = lru_cache(4)(partial(beta_shares, samples, seed))

    def mix(inputs: Tensor, labels: Tensor, batch: BatchRequest) -> tuple[Tensor, Target]:
        assert batch.epoch is not None, "evaluations are not mixed"
        indices, device = batch.indices[:-1], inputs.device
        numbers = move(indices, device)
        height, width = inputs.shape[2:]
        weight, share = torch.ones(len(indices), 1, 1, 1, device=device), torch.ones(len(indices), device=device)
        if settings.mixup:
            share = move(shares(batch.epoch, "mixup", settings.mixup)[indices], device)
            weight = share.view(-1, 1, 1, 1)
        if settings.cutmix:
            drawn = move(shares(batch.epoch, "cutmix", settings.cutmix)[indices], device)
            stream = key(seed, "cutmix boxes", batch.epoch)
            down, right, coin = (uniform(stream, numbers * _DRAWS + draw) for draw in range(_DRAWS))
            kept = ~_boxes(drawn, down, right, height, width)
            is_cut = coin < (0.5 if settings.mixup else 1.0)
            weight = torch.where(is_cut.view(-1, 1, 1, 1), kept.to(torch.float32).unsqueeze(1), weight)
            share = torch.where(is_cut, kept.sum((1, 2)) / (height * width), share)
        mixed = torch.lerp(inputs[1:], inputs[:-1], weight.to(inputs.dtype))
        return mixed, Target(labels[:-1], labels[1:], share)

    return mix


def beta_shares(samples: int, seed: int, epoch: int, kind: str, alpha: float) -> Tensor:
    """Return for each sample of an epoch the share of its own image, from Beta(alpha, alpha): float32 [samples]."""
    # This is what torch.distributions.Beta calls; it takes no generator itself.
    both, source = torch.full((samples, 2), alpha, dtype=torch.float64), generator(seed, kind, epoch)
    shares = torch._sample_dirichlet(both, generator=source)[:, 0]
    if alpha < 1:  # with a small one both gamma variates may underflow: torch then returns 1/2 instead of about 0 or 1
        coins = torch.randint(0, 2, (samples,), dtype=torch.float64, generator=source)
        shares = torch.where(shares == 0.5, coins, shares)
    return shares.to(torch.float32)


def _boxes(share: Tensor, down: Tensor, right: Tensor, height: int, width: int) -> Tensor:
    """Return a box for each image: area 1 - `share`, uniform centre, clipped at the edges; bool [n, H, W]."""
    side = (1.0 - share).sqrt()

    def within(centre: Tensor, length: int) -> Tensor:
        middle, half = (centre * length).floor(), (side * length).floor() / 2
        positions = torch.arange(length, device=share.device)
        low, high = (middle - half).floor().unsqueeze(1), (middle + half).floor().unsqueeze(1)
        return (positions >= low) & (positions < high)

    return within(down, height).unsqueeze(2) & within(right, width).unsqueeze(1)
