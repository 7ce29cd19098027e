"""One draw of noise: its distribution, and its scale against the weights. Each is a function and a row."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from types import MappingProxyType

import torch

from dist_train.config import NoiseSettings
from dist_train.optim.flat_weights import FlatWeights
from dist_train.randomness import bits, key

_DEVIATION_OF_UNIFORM = 3.0**-0.5


class NoiseDraws:
    """Draws of one kind for one set of weights, into one buffer: a draw is a handful of kernels."""

    def __init__(self, settings: NoiseSettings, weights: FlatWeights, seed: int) -> None:
        """Draw as `settings` say; a draw depends on `seed` and on what it is asked for, on nothing else."""
        self._distribute = _DISTRIBUTIONS[settings.distribution]
        self._scale = _SCALES[settings.scale]
        self._seed = seed
        self._still = (weights.mask(settings.exclude) == 0).nonzero()[:, 0]
        self._lengths = weights.filter_lengths
        self.values = torch.zeros_like(weights.values)

    def draw(self, weights: torch.Tensor, step: int, *indices: int | str) -> torch.Tensor:
        """Return the noise of (`step`, `indices`) at amplitude 1 for flat `weights` [n]; excluded weights get 0.

        The tensor is `values`: the next draw overwrites it.
        """
        self._distribute(self.values, key(self._seed, "noise", step, *indices))
        self._scale(self.values, weights, self._lengths)
        return self.values.index_fill_(0, self._still, 0.0)


def _uniform(noise: torch.Tensor, stream: int) -> None:
    """Fill `noise` with 65,536 equally likely, equally spaced values between -1 and 1, of mean 0 and variance 1/3.

    They are 2^-15 of the amplitude apart, and take a third of the time of 24 random bits an element.
    """
    # Filled on the device: a copy from the host would make the host wait for it.
    middle = torch.full((), 2.0**-16, device=noise.device)
    torch.add(middle, bits(stream, len(noise), noise.device), alpha=2.0**-15, out=noise)


def _normal(noise: torch.Tensor, stream: int) -> None:
    """Fill `noise` normally, with the variance of the uniform, 1/3."""
    noise.normal_(0.0, _DEVIATION_OF_UNIFORM, generator=torch.Generator(noise.device).manual_seed(stream))


def _absolute(noise: torch.Tensor, weights: torch.Tensor, lengths: torch.Tensor) -> None:
    """Leave the draw u as it is: the amplitude is in the weights' own unit."""


def _weight(noise: torch.Tensor, weights: torch.Tensor, lengths: torch.Tensor) -> None:
    """Make it u |w|, element by element."""
    noise.mul_(weights.abs())


def _filter(noise: torch.Tensor, weights: torch.Tensor, lengths: torch.Tensor) -> None:
    """Make it u_f ||w_f|| / ||u_f|| for each filter f: AdaSmoothOut (Wen et al., arXiv 1805.07898)."""
    # Unchecked: to check the lengths, the host would wait for the device.
    of_weights = torch.segment_reduce(weights.square(), "sum", lengths=lengths, unsafe=True)
    of_noise = torch.segment_reduce(noise.square(), "sum", lengths=lengths, unsafe=True)
    ratios = (of_weights / of_noise.clamp_(min=torch.finfo(noise.dtype).tiny)).sqrt_()
    noise.mul_(torch.repeat_interleave(ratios, lengths, output_size=len(noise)))


_DISTRIBUTIONS: Mapping[str, Callable[[torch.Tensor, int], None]] = MappingProxyType(
    {"uniform": _uniform, "normal": _normal}
)
_SCALES: Mapping[str, Callable[[torch.Tensor, torch.Tensor, torch.Tensor], None]] = MappingProxyType(
    {"absolute": _absolute, "weight": _weight, "filter": _filter}
)
