"""Mixup and CutMix: each image of a global batch with the next one, by draws that depend on (seed, epoch, sample).

The partner is the next sample of the global batch, whose order is a random one; after the last comes the first. So
neither the number of ranks nor the size of micro-batches changes what is mixed. A micro-batch reads one sample more.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from functools import lru_cache, partial

import torch
from torch import Tensor

from dist_train.config import RegularizationSettings
from dist_train.data.images import BatchRequest
from dist_train.data.pixels import move
from dist_train.randomness import generator, key, uniform

_DRAWS = 3


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
