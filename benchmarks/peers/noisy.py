"""SmoothOut in the style of its reference implementation: a draw, an addition and a subtraction for each tensor."""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import nn

from benchmarks.peers.bare import train
from benchmarks.peers.work import work_from_arguments

AMPLITUDE = 0.01


@torch.no_grad()
def add_noise(model: nn.Module) -> Callable[[], None]:
    """Perturb every parameter, and return a function that removes the noise."""
    noises = []
    for parameter in model.parameters():
        noise = torch.empty_like(parameter).uniform_(-AMPLITUDE, AMPLITUDE)
        parameter.add_(noise)
        noises.append(noise)

    def restore() -> None:
        with torch.no_grad():
            for parameter, noise in zip(model.parameters(), noises, strict=True):
                parameter.sub_(noise)

    return restore


if __name__ == "__main__":
    train(work_from_arguments(), add_noise)
