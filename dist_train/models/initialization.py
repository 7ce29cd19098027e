"""Initial weights as a pure function of the seed and the parameter's name; the width of layers."""

from __future__ import annotations

import torch
from torch import nn

from dist_train.models.norms import norm_parameters
from dist_train.randomness import generator


def scaled(channels: int, width: float) -> int:
    """Return `channels` times `width`, rounded; at least one."""
    return max(1, round(channels * width))


def initialize(model: nn.Module, seed: int) -> None:
    """Set weights after He et al. (arXiv 1502.01852), biases to 0, norms to the identity.

    Each parameter has its own stream, drawn on the CPU, so that the device does not matter.
    """
    of_norms = norm_parameters(model)
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if name in of_norms:
                parameter.fill_(1.0 if name.endswith("weight") else 0.0)
            elif parameter.dim() < 2:
                parameter.zero_()
            else:
                fan_in = parameter[0].numel()
                sample = torch.empty(parameter.shape).normal_(generator=generator(seed, "initial weights", name))
                parameter.copy_(sample.mul_((2.0 / fan_in) ** 0.5))
