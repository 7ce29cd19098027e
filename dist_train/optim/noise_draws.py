"""How noise is drawn and scaled. A draw is a pure function of (seed, step, indices that `noise.sharing` adds)."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from functools import partial
from typing import Any

import numpy as np
import torch
from torch import Tensor

from dist_train.config import NoiseSettings
from dist_train.config.plugins import call_plugin
from dist_train.optim.flat_weights import FlatWeights
from dist_train.outcome import PluginResultError
from dist_train.reproducible import bits, key

_DEVIATION_OF_UNIFORM = 3.0**-0.5
_LARGEST = 2**15 - 1
_SQUARE_UNITS = 2.0**40  # units in 1: squares of weights are summed as integers

Parts = Iterator[slice]  # parts of the buffer, each yielded as soon as the draw is in it


class NoiseDraws:
    """Draws noise for one set of weights into one buffer; bit-identical on CPUs and GPUs.

    A draw is made part by part, so that each part is still in the cache when it is used. Draws are integers. They are
    scaled and converted to floats by single operations whose rounding IEEE 754 defines: no sums of floats, no functions
    but the square root, no multiply-adds that a compiler might fuse.
    """

    def __init__(self, settings: NoiseSettings, weights: FlatWeights, seed: int, values: Tensor | None = None) -> None:
        self._distribution = _DISTRIBUTIONS[settings.distribution](weights.values.device)
        self._scale = _SCALES.get(settings.scale) or partial(_plugin_parts, settings)
        self._seed = seed
        self._excluded = weights.masked_indices(settings.exclude)
        self._excluded_on_device = torch.tensor(self._excluded, device=weights.values.device)
        self._filters = Filters(weights)
        self.values = torch.zeros_like(weights.values) if values is None else values

    def draw(self, weights: Tensor, amplitude: float, step: int, *indices: int | str) -> Tensor:
        """Return the buffer with the noise of (`step`, `indices`) for flat `weights` [n]; excluded weights get 0."""
        for _ in self.parts(weights, amplitude, step, *indices):
            pass
        return self.values

    def parts(self, weights: Tensor, amplitude: float, step: int, *indices: int | str) -> Parts:
        """Make the same draw; yield each part's slice of `values` as soon as it is filled."""
        drawn = self._integers(key(self._seed, "noise", step, *indices))
        for part in self._scale(self.values, weights, self._filters, drawn, amplitude, self._distribution.unit):
            # NumPy's, since torch's is slower, and the tensors of an emulated GPU hold no values.
            first, last = np.searchsorted(self._excluded, (part.start, part.stop))
            self.values.index_fill_(0, self._excluded_on_device[first:last], 0.0)
            yield part

    def _integers(self, stream: int) -> Parts:
        start = 0
        for random in bits(stream, len(self.values), self.values.device):
            part = slice(start, start + len(random))
            self.values[part].copy_(self._distribution.integers(random))
            yield part
            start = part.stop


@dataclass(frozen=True)
class _Distribution:
    """Integers from -32,767 to 32,767 with mean 0; multiplied by `unit`, their variance is 1/3."""

    unit: float
    integers: Callable[[Tensor], Tensor]  # random bits (int16, may be overwritten) -> integers (int16)


def _uniform(device: torch.device) -> _Distribution:
    """Return the 32,768 odd integers, equally likely."""
    return _Distribution(2.0**-15, lambda random: random.bitwise_or_(1))


def _normal(device: torch.device) -> _Distribution:
    """Return 65,536 equally likely quantiles of the normal distribution; the outermost is at 4.3 sigma."""
    middles = (torch.arange(2**16, dtype=torch.float64) + 0.5) / 2**16
    quantiles = torch.special.ndtri(middles)
    rounded = (quantiles * (_LARGEST / quantiles[-1])).round()
    unit = _DEVIATION_OF_UNIFORM / float(rounded.square().mean().sqrt())
    table = rounded.to(torch.int16).to(device)
    return _Distribution(unit, lambda random: table[random.to(torch.int32).add_(2**15)])


class Filters:
    """The filters of flat `weights`: slices along dimension 0, whole tensors of one dimension, and padding."""

    def __init__(self, weights: FlatWeights) -> None:
        self._count = len(weights.values)
        lengths: list[int] = []
        ends = [segment.start for segment in weights.segments[1:]] + [self._count]
        for segment, end in zip(weights.segments, ends, strict=True):
            filters = segment.shape[0] if len(segment.shape) > 1 else 1
            lengths += [(segment.stop - segment.start) // filters] * filters
            if end > segment.stop:
                lengths.append(end - segment.stop)
        self._lengths = torch.tensor(lengths, dtype=torch.int64, device=weights.values.device)
        self._last = self._lengths.cumsum(0) - 1

    def sum(self, integers: Tensor) -> Tensor:
        """Return the sums of int64 `integers` [n] over each filter, float64 [filters]."""
        ends = integers.cumsum(0)[self._last]
        return torch.diff(ends, prepend=torch.zeros_like(ends[:1])).to(torch.float64)

    def repeat(self, values: Tensor) -> Tensor:
        """Return the value of `values` [filters] for each weight [n]."""
        return torch.repeat_interleave(values, self._lengths, output_size=self._count)


def _absolute(noise: Tensor, weights: Tensor, filters: Filters, drawn: Parts, amplitude: float, unit: float) -> Parts:
    """Scale the draw u to a u: the amplitude a is in units of the weights."""
    for part in drawn:
        noise[part].mul_(amplitude * unit)
        yield part


def _weight(noise: Tensor, weights: Tensor, filters: Filters, drawn: Parts, amplitude: float, unit: float) -> Parts:
    """Scale the draw to a u |w|, element by element."""
    for part in drawn:
        noise[part].mul_(amplitude * unit).mul_(weights[part].abs())
        yield part


def _filter(noise: Tensor, weights: Tensor, filters: Filters, drawn: Parts, amplitude: float, unit: float) -> Parts:
    """Scale the draw to a u_f ||w_f|| / ||u_f|| for each filter f: AdaSmoothOut (Wen et al., arXiv 1805.07898)."""
    for _ in drawn:
        pass
    weight_squares = filters.sum(weights.square().mul_(_SQUARE_UNITS).to(torch.int64))
    noise_squares = filters.sum(noise.to(torch.int64).square_())
    ratios = (weight_squares / noise_squares.clamp_(min=1.0)).sqrt_().mul_(amplitude * _SQUARE_UNITS**-0.5)
    noise.mul_(filters.repeat(ratios.to(noise.dtype)))
    yield slice(0, len(noise))


def _filter_norm(
    noise: Tensor, weights: Tensor, filters: Filters, drawn: Parts, amplitude: float, unit: float
) -> Parts:
    """Scale the draw to a u ||w_f|| for each filter f, as in LPF-SGD (arXiv 2201.08025) and RWP."""
    squares = filters.sum(weights.square().mul_(_SQUARE_UNITS).to(torch.int64))
    norms = squares.sqrt_().mul_(amplitude * unit * _SQUARE_UNITS**-0.5)
    factors = filters.repeat(norms.to(noise.dtype))
    for part in drawn:
        noise[part].mul_(factors[part])
        yield part


def _plugin_parts(settings: NoiseSettings, noise: Tensor, weights: Tensor, *arguments: Any) -> Parts:
    """Scale as a plug-in does.

    Raises UsageError unless its parts follow each other, to the end of `noise`, and it leaves the weights alone.
    """
    stop, version = 0, weights._version
    for part in call_plugin(settings.scale, settings.scale_options, Iterator, noise, weights, *arguments):
        _check_unchanged(weights, version, settings.scale)
        if not isinstance(part, slice) or part.start != stop or not isinstance(part.stop, int):
            raise PluginResultError(f"{settings.scale} yields {part} after {stop} weights")
        yield part
        stop, version = part.stop, weights._version  # the consumer of the parts may change the weights
    _check_unchanged(weights, version, settings.scale)
    if stop != len(noise):
        raise PluginResultError(
            f"{settings.scale} yields parts of {stop} of the {len(noise)} weights: yield each part once it is scaled"
        )


def _check_unchanged(weights: Tensor, version: int, name: str) -> None:
    if weights._version != version:
        raise PluginResultError(
            f"{name} changes the clean weights in place: write for example weights[part].abs(), not .abs_()"
        )


_DISTRIBUTIONS: Mapping[str, Callable[[torch.device], _Distribution]] = {"uniform": _uniform, "normal": _normal}
_Scale = Callable[[Tensor, Tensor, Filters, Parts, float, float], Parts]
_SCALES: Mapping[str, _Scale] = {
    "absolute": _absolute,
    "weight": _weight,
    "filter": _filter,
    "filter_norm": _filter_norm,
}
