"""What a model computes with, which noise puts in the place of its weights for a while."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager

import torch

from dist_train.optim.flat_weights import FlatWeights
from dist_train.optim.noise import Noise


@contextmanager
def perturbed(noise: Noise, step: int) -> Iterator[None]:
    """Be at the perturbed weights within the block, as the training step is."""
    try:
        noise.perturb(step)
        yield
    finally:
        noise.restore()


def in_force(weights: FlatWeights) -> torch.Tensor:
    """Return the weights that the model computes with, laid out as `values`."""
    flat = torch.zeros_like(weights.values)
    for view, parameter in zip(weights.views_of(flat), weights.parameters, strict=True):
        view.copy_(parameter.detach())
    return flat
