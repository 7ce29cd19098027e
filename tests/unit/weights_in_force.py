"""What a model computes with, which noise puts in the place of its weights for a while."""

from __future__ import annotations

import torch

from dist_train.optim.flat_weights import FlatWeights


def in_force(weights: FlatWeights) -> torch.Tensor:
    """Return the weights that the model computes with, laid out as `values`."""
    flat = torch.zeros_like(weights.values)
    for view, parameter in zip(weights.views_of(flat), weights.parameters, strict=True):
        view.copy_(parameter.detach())
    return flat
