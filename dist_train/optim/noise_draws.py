"""One draw of noise: its distribution, and its scale against the weights. Each is a function and a row.

A draw is made part by part, so that what is to be done with a part finds it in the cache.
"""

from __future__ import annotations

from bisect import bisect_left
from collections import deque
from collections.abc import Callable, Iterator, Mapping
from types import MappingProxyType

import torch
from torch import Tensor

from dist_train.config import NoiseSettings
from dist_train.optim.flat_weights import FlatWeights
from dist_train.randomness import bits, key

_DEVIATION_OF_UNIFORM = 3.0**-0.5


class NoiseDraws:
    """Draws of one kind for one set of weights, into one buffer: a draw is a handful of kernels."""

    def __init__(self, settings: NoiseSettings, weights: FlatWeights, seed: int, values: Tensor | None = None) -> None:
        """Draw into `values` [n] (none: new ones), as `settings` say.

        A draw depends on `seed` and on what it is asked for, on nothing else.
        """
        self._distribute = _DISTRIBUTIONS[settings.distribution]
        self._scale = _SCALES[settings.scale]
        self._seed = seed
        self._still = (weights.mask(settings.exclude) == 0).nonzero()[:, 0]
        self._places: list[int] = self._still.tolist()
        self._lengths = weights.filter_lengths
        self.values = torch.zeros_like(weights.values) if values is None else values

    def draw(self, weights: Tensor, step: int, *indices: int | str) -> Tensor:
        """Return the noise of (`step`, `indices`) at amplitude 1 for flat `weights` [n]; excluded weights get 0.

        The tensor is `values`: the next draw overwrites it.
        """
        deque(self.parts(weights, step, *indices), maxlen=0)
        return self.values

    def parts(self, weights: Tensor, step: int, *indices: int | str) -> Iterator[slice]:
        """Make the same draw, and yield where in `values` each part lies once it is there."""
        drawn = self._distribute(self.values, key(self._seed, "noise", step, *indices))
        for part in self._scale(self.values, weights, self._lengths, drawn):
            first, last = bisect_left(self._places, part.start), bisect_left(self._places, part.stop)
            self.values.index_fill_(0, self._still[first:last], 0.0)
            yield part


def _uniform(noise: Tensor, stream: int) -> Iterator[slice]:
    """Fill `noise` with 65,536 equally likely, equally spaced values between -1 and 1, of mean 0 and variance 1/3.

    They are 2^-15 of the amplitude apart, and take a third of the time of 24 random bits an element.
    """
    # Filled on the device: a copy from the host would make the host wait for it.
    middle = torch.full((), 2.0**-16, device=noise.device)
    start = 0
    for integers in bits(stream, len(noise), noise.device):
        part = slice(start, start + len(integers))
        # Apart: an addition of two types takes three times as long as a conversion and an addition.
        torch.add(middle, noise[part].copy_(integers), alpha=2.0**-15, out=noise[part])
        yield part
        start = part.stop


def _normal(noise: Tensor, stream: int) -> Iterator[slice]:
    """Fill `noise` normally, with the variance of the uniform, 1/3."""
    noise.normal_(0.0, _DEVIATION_OF_UNIFORM, generator=torch.Generator(noise.device).manual_seed(stream))
    yield slice(0, len(noise))


def _absolute(noise: Tensor, weights: Tensor, lengths: Tensor, drawn: Iterator[slice]) -> Iterator[slice]:
    """Leave the draw u as it is: the amplitude is in the weights' own unit."""
    return drawn


def _weight(noise: Tensor, weights: Tensor, lengths: Tensor, drawn: Iterator[slice]) -> Iterator[slice]:
    """Make it u |w|, element by element."""
    for part in drawn:
        noise[part].mul_(weights[part].abs())
        yield part


def _filter(noise: Tensor, weights: Tensor, lengths: Tensor, drawn: Iterator[slice]) -> Iterator[slice]:
    """Make it u_f ||w_f|| / ||u_f|| for each filter f: AdaSmoothOut (Wen et al., arXiv 1805.07898)."""
    deque(drawn, maxlen=0)
    # Unchecked: to check the lengths, the host would wait for the device.
    of_weights = torch.segment_reduce(weights.square(), "sum", lengths=lengths, unsafe=True)
    of_noise = torch.segment_reduce(noise.square(), "sum", lengths=lengths, unsafe=True)
    ratios = (of_weights / of_noise.clamp_(min=torch.finfo(noise.dtype).tiny)).sqrt_()
    noise.mul_(torch.repeat_interleave(ratios, lengths, output_size=len(noise)))
    yield slice(0, len(noise))


_DISTRIBUTIONS: Mapping[str, Callable[[Tensor, int], Iterator[slice]]] = MappingProxyType(
    {"uniform": _uniform, "normal": _normal}
)
_SCALES: Mapping[str, Callable[[Tensor, Tensor, Tensor, Iterator[slice]], Iterator[slice]]] = MappingProxyType(
    {"absolute": _absolute, "weight": _weight, "filter": _filter}
)
