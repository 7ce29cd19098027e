"""Augmentations, batched on the device; each image's change depends on (seed, epoch, sample) alone."""

from __future__ import annotations

from collections.abc import Callable, Mapping

import torch
from torch import Tensor
from torch.nn import functional

from dist_train.randomness import key, uniform

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


AUGMENTATIONS: Mapping[str, Augmentation] = {
    "none": unchanged,
    "crop-flip": crop_flip,
}
