"""Noise: what a step does with it, and how it is drawn; methods, distributions and scales are a row each.

A draw is a pure function of (seed, step) and of what `sharing` adds to it, so that ranks agree on it without
communication. Perturbed weights lie in a buffer of their own, which the model computes with meanwhile: the clean ones
are never written, and (w + n) - n would not be w in floating point.
"""

from __future__ import annotations

from bisect import bisect_left
from collections import deque
from collections.abc import Callable, Iterator, Mapping
from dataclasses import KW_ONLY, dataclass
from functools import partial
from types import MappingProxyType
from typing import cast

import torch
from torch import Tensor

from dist_train.config import NoiseSettings
from dist_train.config.former import STREAM_OF_A_RANK
from dist_train.config.plugins import call_plugin, is_plugin
from dist_train.optim.flat_weights import FlatWeights, digest
from dist_train.optim.schedules import noise_factor
from dist_train.randomness import bits, key

Ascend = Callable[[], None]
"""Takes the gradient of a micro-batch's loss where the weights are, into the flat gradients."""


@dataclass(eq=False)
class Noise:
    """What a step does with `weights` around its gradients, over `total_steps` updates; here nothing: `none`."""

    settings: NoiseSettings
    weights: FlatWeights
    _: KW_ONLY
    seed: int
    total_steps: int
    rank: int

    def __post_init__(self) -> None:
        pass  # subclasses make their buffers

    def amplitude(self, step: int) -> float:
        """Return a c(t), the amplitude in force at `step`."""
        return 0.0

    def perturb(self, step: int) -> None:
        """Let the model compute with perturbed weights; the clean ones are not written."""

    def perturb_for(self, micro_batch: int, ascend: Ascend) -> None:
        """Move to the point of micro-batch `micro_batch` of the global batch, where it has one of its own."""

    def restore(self) -> None:
        """Let the model compute with the clean weights again."""

    def after_update(self, step: int) -> None:
        """Do what remains once the optimizer has moved the weights in `step`."""

    def digest(self, step: int) -> int:
        """Return a digest of what the noise of `step`, just taken, made; the same on all ranks that agree."""
        return 0


class _Scheduled(Noise):
    def amplitude(self, step: int) -> float:
        """Return a c(t), for `sam` rho c(t)."""
        return self.settings.amplitude * noise_factor(self.settings.schedule, step, self.total_steps)


class _Perturbing(_Scheduled):
    """Noise whose gradients are taken at perturbed weights, in a buffer of their own."""

    def __post_init__(self) -> None:
        self._step = 0
        self._perturbed = torch.zeros_like(self.weights.values)
        self._views = self.weights.views_of(self._perturbed)

    def perturb(self, step: int) -> None:
        """Let the model compute with the perturbed weights, which are moved then."""
        self._step = step
        self.weights.compute_with(self._views)

    def restore(self) -> None:
        """Let the model compute with the clean weights again."""
        self.weights.compute_with_own()


class SmoothOut(_Perturbing):
    """SmoothOut (Wen et al., arXiv 1805.07898): gradients at perturbed weights, none of it left behind.

    `sharing: global` is one draw a step; `rank` one for each rank; `micro_batch` one for each micro-batch of the
    global batch, whichever rank holds it.
    """

    def __post_init__(self) -> None:
        super().__post_init__()
        # Draws lie where the perturbed weights are to be: a buffer less to go through.
        self._draws = NoiseDraws(self.settings, self.weights, self.seed, self._perturbed)

    def perturb(self, step: int) -> None:
        """Move to the point that the step's micro-batches share, if they do."""
        super().perturb(step)
        if self.settings.sharing == "global":
            self.move(step)
        elif self.settings.sharing == "rank":
            self.move(step, STREAM_OF_A_RANK, self.rank)

    def perturb_for(self, micro_batch: int, ascend: Ascend) -> None:
        """Move to the micro-batch's own point, if it has one."""
        if self.settings.sharing == "micro_batch":
            self.move(self._step, micro_batch)

    def move(self, step: int, *indices: int | str) -> None:
        """Be at the clean weights plus the draw of (`step`, `indices`)."""
        clean = self.weights.values
        for part in self._draws.parts(clean, self.amplitude(step), step, *indices):
            self._perturbed[part].add_(clean[part])

    def lost_in(self, precision: torch.dtype, step: int) -> float:
        """Return which share of the weights under noise a cast to `precision` leaves where they were in `step`."""
        clean = self.weights.values
        self.move(step)
        noisy = self._perturbed != clean
        lost = noisy & (self._perturbed.to(precision) == clean.to(precision))
        return float(lost.sum() / noisy.sum().clamp_(min=1))

    def digest(self, step: int) -> int:
        """Return a digest of the perturbed weights, or, where they differ on purpose, of the first draw."""
        if self.settings.sharing == "rank":
            self._draws.draw(self.weights.values, self.amplitude(step), step, STREAM_OF_A_RANK, 0)
        elif self.settings.sharing == "micro_batch":
            self._draws.draw(self.weights.values, self.amplitude(step), step, 0)
        return digest(self._perturbed)


class Langevin(_Scheduled):
    """Equation 1 of Naganuma and Yokota: theta(t+1) = theta(t) - eta grad E(theta(t)) + delta(t).

    The noise stays. It is part of the update, not of the gradient: momentum does not see it.
    """

    def __post_init__(self) -> None:
        self._draws = NoiseDraws(self.settings, self.weights, self.seed)

    def perturb(self, step: int) -> None:
        """Draw delta(t), scaled by theta(t), and leave the weights as they are: the gradient is taken there."""
        self._draws.draw(self.weights.values, self.amplitude(step), step)

    def after_update(self, step: int) -> None:
        """Add delta(t)."""
        self.weights.values.add_(self._draws.values)

    def digest(self, step: int) -> int:
        """Return a digest of the draw."""
        return digest(self._draws.values)


class SharpnessAware(_Perturbing):
    """SAM (Foret et al., arXiv 2010.01412), its ascent taken by each micro-batch's own gradient.

    The gradient is taken at w + rho g / ||g||, where g is the micro-batch's gradient at w and rho the amplitude:
    two passes for each micro-batch, a function of its samples alone.
    """

    def __post_init__(self) -> None:
        super().__post_init__()
        self._mask = self.weights.mask(self.settings.exclude)

    def perturb_for(self, micro_batch: int, ascend: Ascend) -> None:
        """Go uphill from the clean weights by the micro-batch's gradient."""
        clean = self.weights.values
        self._perturbed.copy_(clean)
        self.weights.gradients.zero_()
        ascend()
        uphill = self.weights.gradients.mul_(self._mask)
        length = torch.linalg.vector_norm(uphill).clamp_(min=torch.finfo(uphill.dtype).tiny)
        torch.add(clean, uphill.div_(length), alpha=self.amplitude(self._step), out=self._perturbed)


_METHODS: Mapping[str, type[Noise]] = MappingProxyType(
    {"none": Noise, "smoothout": SmoothOut, "langevin": Langevin, "sam": SharpnessAware}
)


def build_noise(settings: NoiseSettings, weights: FlatWeights, *, seed: int, total_steps: int, rank: int) -> Noise:
    """Return the noise that `settings` describe, on `weights`, for `rank`."""
    name, place = settings.method, {"seed": seed, "total_steps": total_steps, "rank": rank}
    if is_plugin(name):
        return cast(Noise, call_plugin(name, settings.options, Noise, settings, weights, **place))
    return _METHODS[name](settings, weights, **place)


_DEVIATION_OF_UNIFORM = 3.0**-0.5
_LARGEST = 2**15 - 1
_SQUARES = 2.0**40
"""Squares of weights are summed as multiples of its inverse."""


class NoiseDraws:
    """Draws of one kind for one set of weights, into one buffer; bit-identical on CPUs and GPUs.

    A draw is made part by part, so that what is to be done with a part finds it in the cache. What is drawn are
    integers; they, and each scale, are turned into floats by single operations, whose rounding IEEE 754 defines: no sum
    of floats, no function beyond a root, no multiplication and addition that may be fused.
    """

    def __init__(self, settings: NoiseSettings, weights: FlatWeights, seed: int, values: Tensor | None = None) -> None:
        """Draw into `values` [n] (none: new ones), as `settings` say."""
        self._distribution = _DISTRIBUTIONS[settings.distribution](weights.values.device)
        self._scale = _scale_of(settings)
        self._seed = seed
        self._places = weights.places_without(settings.exclude)
        self._still = torch.tensor(self._places, dtype=torch.int64, device=weights.values.device)
        self._filters = Filters(weights.filter_lengths, len(weights.values))
        self.values = torch.zeros_like(weights.values) if values is None else values

    def draw(self, weights: Tensor, amplitude: float, step: int, *indices: int | str) -> Tensor:
        """Return the noise of (`step`, `indices`) at `amplitude` for flat `weights` [n]; excluded weights get 0.

        The tensor is `values`: the next draw overwrites it.
        """
        deque(self.parts(weights, amplitude, step, *indices), maxlen=0)
        return self.values

    def parts(self, weights: Tensor, amplitude: float, step: int, *indices: int | str) -> Iterator[slice]:
        """Make the same draw, and yield where in `values` each part lies once it is there."""
        drawn = self._integers(key(self._seed, "noise", step, *indices))
        for part in self._scale(self.values, weights, self._filters, drawn, amplitude, self._distribution.unit):
            first, last = bisect_left(self._places, part.start), bisect_left(self._places, part.stop)
            self.values.index_fill_(0, self._still[first:last], 0.0)
            yield part

    def _integers(self, stream: int) -> Iterator[slice]:
        """Fill `values` with the integers of a draw."""
        start = 0
        for random in bits(stream, len(self.values), self.values.device):
            part = slice(start, start + len(random))
            self.values[part].copy_(self._distribution.integers(random))
            yield part
            start = part.stop


@dataclass(frozen=True)
class _Distribution:
    """Integers between -32,767 and 32,767, of mean 0; times `unit` their variance is 1/3."""

    unit: float
    integers: Callable[[Tensor], Tensor]
    """From int16 of random bits, which may be overwritten, to int16 of the distribution."""


def _uniform(device: torch.device) -> _Distribution:
    """Return the 32,768 odd integers, equally likely."""
    return _Distribution(2.0**-15, lambda random: random.bitwise_or_(1))


def _normal(device: torch.device) -> _Distribution:
    """Return the quantiles of 65,536 equally likely parts of the normal distribution; the outermost is 4.3 sigma."""
    middles = (torch.arange(2**16, dtype=torch.float64) + 0.5) / 2**16
    quantiles = torch.special.ndtri(middles)
    rounded = (quantiles * (_LARGEST / quantiles[-1])).round()
    unit = _DEVIATION_OF_UNIFORM / float(rounded.square().mean().sqrt())
    table = rounded.to(torch.int16).to(device)
    return _Distribution(unit, lambda random: table[random.to(torch.int32).add_(2**15)])


class Filters:
    """Which of `count` flat weights are a filter's: so many of each, one after the other."""

    def __init__(self, lengths: Tensor, count: int) -> None:
        self._lengths = lengths
        self._last = lengths.cumsum(0) - 1
        self._count = count

    def sum(self, integers: Tensor) -> Tensor:
        """Return the sums of int64 `integers` [n] over each filter, float64 [filters]."""
        ends = integers.cumsum(0)[self._last]
        return torch.diff(ends, prepend=torch.zeros_like(ends[:1])).to(torch.float64)

    def repeat(self, values: Tensor) -> Tensor:
        """Return `values` [filters] for each weight [n]."""
        return torch.repeat_interleave(values, self._lengths, output_size=self._count)


def _absolute(
    noise: Tensor, weights: Tensor, filters: Filters, drawn: Iterator[slice], amplitude: float, unit: float
) -> Iterator[slice]:
    """Make it a u: the amplitude is in the weights' own unit."""
    for part in drawn:
        noise[part].mul_(amplitude * unit)
        yield part


def _weight(
    noise: Tensor, weights: Tensor, filters: Filters, drawn: Iterator[slice], amplitude: float, unit: float
) -> Iterator[slice]:
    """Make it a u |w|, element by element."""
    for part in drawn:
        noise[part].mul_(amplitude * unit).mul_(weights[part].abs())
        yield part


def _filter(
    noise: Tensor, weights: Tensor, filters: Filters, drawn: Iterator[slice], amplitude: float, unit: float
) -> Iterator[slice]:
    """Make it a u_f ||w_f|| / ||u_f|| for each filter f: AdaSmoothOut (Wen et al., arXiv 1805.07898)."""
    deque(drawn, maxlen=0)
    of_weights = filters.sum(weights.square().mul_(_SQUARES).to(torch.int64))
    of_noise = filters.sum(noise.to(torch.int64).square_())
    ratios = (of_weights / of_noise.clamp_(min=1.0)).sqrt_().mul_(amplitude * _SQUARES**-0.5)
    noise.mul_(filters.repeat(ratios.to(noise.dtype)))
    yield slice(0, len(noise))


_DISTRIBUTIONS: Mapping[str, Callable[[torch.device], _Distribution]] = MappingProxyType(
    {"uniform": _uniform, "normal": _normal}
)
_Scale = Callable[[Tensor, Tensor, Filters, Iterator[slice], float, float], Iterator[slice]]
_SCALES: Mapping[str, _Scale] = MappingProxyType({"absolute": _absolute, "weight": _weight, "filter": _filter})


def _scale_of(settings: NoiseSettings) -> _Scale:
    if is_plugin(settings.scale):
        return partial(call_plugin, settings.scale, settings.scale_options, Iterator)
    return _SCALES[settings.scale]
