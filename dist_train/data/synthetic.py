"""A learnable data set made from the seed: no files, for tests and benchmarks."""

from __future__ import annotations

import torch
from torch import Tensor

from dist_train.data.images import ImageSet, Split
from dist_train.randomness import generator

_GRID = 4
_CONTRAST = 48
_NOISE = 64
_GREY = 128
_CHUNK = 4096


def make(shape: tuple[int, int, int], classes: int, samples: int, split: Split, seed: int) -> ImageSet:
    """Return `samples` images: their class's coarse pattern, common to both splits, under noise.

    Only integers are drawn and added, so that every machine makes the same bytes. Classes are as equal
    in size as `samples` allows.
    """
    patterns = _patterns(shape, classes, seed)
    shuffle = torch.randperm(samples, generator=generator(seed, "synthetic labels", split))
    labels = (torch.arange(samples) % classes)[shuffle]
    images = torch.empty((samples, *shape), dtype=torch.uint8)
    for index, start in enumerate(range(0, samples, _CHUNK)):
        part = slice(start, min(start + _CHUNK, samples))
        source = generator(seed, "synthetic noise", split, index)
        noise = torch.randint(-_NOISE, _NOISE + 1, images[part].shape, dtype=torch.int16, generator=source)
        images[part] = noise.add_(patterns[labels[part]]).clamp_(0, 255).to(torch.uint8)
    return ImageSet(images, labels, classes)


def _patterns(shape: tuple[int, int, int], classes: int, seed: int) -> Tensor:
    """One picture of coarse blocks for each class, int16 [classes, C, H, W]."""
    channels, height, width = shape
    source = generator(seed, "synthetic patterns")
    blocks = torch.randint(
        -_CONTRAST, _CONTRAST + 1, (classes, channels, _GRID, _GRID), dtype=torch.int16, generator=source
    )
    rows = torch.arange(height) * _GRID // height
    columns = torch.arange(width) * _GRID // width
    return blocks[:, :, rows][:, :, :, columns] + _GREY
