"""The row of the perturbation alone: ours on all weights at once, against the reference's, tensor by tensor."""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import nn

from benchmarks.peers.work import vgg9
from benchmarks.timing import Ratio, compare
from dist_train.cluster.devices import device_type
from dist_train.config import NoiseSettings
from dist_train.optim.flat_weights import FlatWeights
from dist_train.optim.noise import build_noise
from dist_train.start_up import keep_freed_memory, use_large_pages

BY_TENSOR = "a draw, an addition, a subtraction a tensor"
_AMPLITUDE = 0.01


def perturb_ours(width: float) -> Callable[[], object]:
    """Return a function that perturbs and restores the weights of VGG9 of `width` as we do."""
    weights = FlatWeights(vgg9(width).to(device_type()))
    described = NoiseSettings(method="smoothout", amplitude=_AMPLITUDE)
    noise = build_noise(described, weights, seed=1, total_steps=1, rank=0)

    def perturb() -> None:
        noise.perturb(0)
        noise.perturb_for(0, lambda: None)
        noise.restore()

    return perturb


def perturb_by_tensor(width: float) -> Callable[[], object]:
    """Return a function that perturbs and restores the weights of VGG9 of `width` as the reference does."""
    model = vgg9(width).to(device_type())
    return lambda: _add_and_subtract_noise(model)


@torch.no_grad()
def _add_and_subtract_noise(model: nn.Module) -> None:
    noises = []
    for parameter in model.parameters():
        noise = torch.empty_like(parameter).uniform_(-_AMPLITUDE, _AMPLITUDE)
        parameter.add_(noise)
        noises.append(noise)
    for parameter, noise in zip(model.parameters(), noises, strict=True):
        parameter.sub_(noise)


def perturbation_row(pairs: int) -> Ratio:
    """Return our time of perturbing and restoring VGG9 of width 1 over the reference's."""
    torch.set_num_threads(1)
    keep_freed_memory()
    use_large_pages()
    return compare(
        "perturb and restore, width 1",
        ("SmoothOut", perturb_ours(1.0)),
        (BY_TENSOR, perturb_by_tensor(1.0)),
        pairs=pairs,
        bar=0.5,
    )
