"""The order of the samples in an epoch, from (seed, epoch) alone: a resume replays nothing."""

from __future__ import annotations

import torch
from torch import Tensor

from dist_train.randomness import generator


def epoch_order(samples: int, seed: int, epoch: int) -> Tensor:
    """Return a permutation of 0..samples-1, int64 [samples] on the CPU."""
    return torch.randperm(samples, generator=generator(seed, "sample order", epoch))


def batch_indices(order: Tensor, step_in_epoch: int, global_size: int) -> Tensor:
    """Return the samples of one global batch, int64 [global_size], a view of `order`.

    What is left of `order` after its last whole batch belongs to no step; it is another part each epoch.
    """
    start = step_in_epoch * global_size
    assert 0 <= start <= order.numel() - global_size
    return order[start : start + global_size]
