"""What a step does with noise: one method a row. They differ in where a gradient is taken, and in what stays.

A draw is a pure function of (seed, step) and of what `sharing` adds to it, so that ranks agree on it without
communication. Perturbed weights lie in a buffer of their own, which the model computes with meanwhile: the clean ones
are never written, and (w + n) - n would not be w in floating point.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import KW_ONLY, dataclass
from types import MappingProxyType
from typing import Protocol

import torch

from dist_train.config import NoiseSettings
from dist_train.optim.flat_weights import FlatWeights, digest
from dist_train.optim.noise_draws import NoiseDraws
from dist_train.optim.schedules import noise_factor

Ascend = Callable[[], None]
"""Takes the gradient of a micro-batch's loss where the weights are, into the flat gradients."""


class Noise:
    """What a step does with the weights around its gradients; here: nothing, the method `none`."""

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


@dataclass(eq=False)
class _Scheduled(Noise):
    """Noise on `weights`, its amplitude laid out over `total_steps` updates."""

    settings: NoiseSettings
    weights: FlatWeights
    _: KW_ONLY
    seed: int
    total_steps: int
    rank: int

    def amplitude(self, step: int) -> float:
        """Return a c(t), for `sam` rho c(t)."""
        return self.settings.amplitude * noise_factor(self.settings.schedule, step, self.total_steps)


@dataclass(eq=False)
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
            self.move(step, "rank", self.rank)

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
            self._draws.draw(self.weights.values, self.amplitude(step), step, "rank", 0)
        elif self.settings.sharing == "micro_batch":
            self._draws.draw(self.weights.values, self.amplitude(step), step, 0)
        return digest(self._perturbed)


@dataclass(eq=False)
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


class _Method(Protocol):
    def __call__(
        self, settings: NoiseSettings, weights: FlatWeights, *, seed: int, total_steps: int, rank: int
    ) -> Noise: ...


_METHODS: Mapping[str, _Method] = MappingProxyType(
    {
        "none": lambda settings, weights, *, seed, total_steps, rank: Noise(),
        "smoothout": SmoothOut,
        "langevin": Langevin,
        "sam": SharpnessAware,
    }
)


def build_noise(settings: NoiseSettings, weights: FlatWeights, *, seed: int, total_steps: int, rank: int) -> Noise:
    """Return the noise that `settings` describe, on `weights`, for `rank`."""
    return _METHODS[settings.method](settings, weights, seed=seed, total_steps=total_steps, rank=rank)
