"""Training on a part of a data set."""

from __future__ import annotations

import torch
from torch import Tensor

from dist_train.data.images import ImageSet
from dist_train.outcome import UsageError
from dist_train.randomness import generator


def balanced_subset(images: ImageSet, size: int, seed: int) -> ImageSet:
    """Return `size` images chosen by the seed, as many of each class as there are, in their old order.

    A larger subset of the same seed contains the smaller. Raises UsageError when there are fewer images.
    """
    chosen = balanced_choice(images.labels, size, images.classes, seed)
    if size == len(images):
        return images
    return ImageSet(images.images[chosen], images.labels[chosen], images.classes, images.identity)


def balanced_choice(labels: Tensor, size: int, classes: int, seed: int) -> Tensor:
    """Return which of the samples with `labels` such a subset holds, int64 [size], ascending.

    Raises UsageError when there are fewer.
    """
    if size > labels.numel():
        raise UsageError(
            f"data.train_size is {size}, but there are {labels.numel()} training images: "
            f"set it to at most {labels.numel()}, or leave it out"
        )
    return _chosen(labels, size, classes, seed)


def _chosen(labels: Tensor, size: int, classes: int, seed: int) -> Tensor:
    """Shuffle, then take the first of every class, then the second of every class, and so on."""
    shuffled = torch.randperm(labels.numel(), generator=generator(seed, "training subset"))
    by_class = torch.argsort(labels[shuffled], stable=True)
    counts = torch.bincount(labels, minlength=classes)
    first_of_class = torch.cumsum(counts, 0) - counts
    turn = torch.empty_like(by_class)
    turn[by_class] = torch.arange(labels.numel()) - first_of_class.repeat_interleave(counts)
    return shuffled[torch.argsort(turn, stable=True)[:size]].sort().values
