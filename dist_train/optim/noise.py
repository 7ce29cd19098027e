"""What a step does with noise; methods are a row each. `noise_draws.py` has how it is drawn.

A method says at which points each micro-batch's gradient is taken, and what each counts. Perturbed weights lie in a
buffer of their own, which the model computes with meanwhile: the clean ones are never written, and (w + n) - n would
not be w in floating point.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import KW_ONLY, dataclass, field, replace
from typing import cast

import torch
from torch import Tensor

from dist_train.config import NoiseSettings
from dist_train.config.plugins import call_plugin, is_plugin
from dist_train.config.resuming import STREAM_OF_A_RANK
from dist_train.optim.flat_weights import FlatWeights, digest
from dist_train.optim.noise_draws import Filters, NoiseDraws
from dist_train.optim.schedules import noise_factor

Ascend = Callable[[], None]
"""Takes the gradient of a micro-batch's loss where the weights are, into the flat gradients."""


_DEVIATIONS = math.sqrt(3.0)
"""From a deviation to the amplitude of a draw, whose variance at amplitude 1 is 1/3."""


@dataclass(frozen=True)
class Point:
    """Where a micro-batch's gradient is taken: the weights plus `sign` times a draw; and what it counts in the sum."""

    draw: int = 0
    sign: int = 1
    weight: float = 1.0


@dataclass(eq=False)
class Noise:
    """What a step does with `weights` around its gradients, over `total_steps` updates; here nothing: `none`."""

    settings: NoiseSettings
    weights: FlatWeights
    _: KW_ONLY
    seed: int
    total_steps: int
    rank: int

    kept: dict[str, Tensor] = field(default_factory=dict, init=False)
    """What a checkpoint must hold of it, [n] each: what earlier updates have left."""

    def __post_init__(self) -> None:
        pass  # subclasses make their buffers

    def load(self, kept: Mapping[str, Tensor]) -> None:
        """Take over what a checkpoint holds of `kept`, by name and parameter."""
        for name, values in self.kept.items():
            for segment, view in zip(self.weights.segments, self.weights.views_of(values), strict=True):
                view.copy_(kept[f"{name}.{segment.name}"])

    def state(self) -> dict[str, Tensor]:
        """Return what a checkpoint holds of `kept`."""
        views = {name: self.weights.views_of(values) for name, values in self.kept.items()}
        names = [segment.name for segment in self.weights.segments]
        return {f"{name}.{each}": view for name in views for each, view in zip(names, views[name], strict=True)}

    def points(self, micro_batch: int) -> Sequence[Point]:
        """Return where the gradient of micro-batch `micro_batch` is taken: as many points for each of them."""
        return (Point(),)

    def amplitude(self, step: int) -> float:
        """Return a c(t), the amplitude in force at `step`."""
        return 0.0

    def perturb(self, step: int) -> None:
        """Let the model compute with perturbed weights; the clean ones are not written."""

    def perturb_for(self, micro_batch: int, ascend: Ascend, point: Point = Point()) -> None:
        """Move to `point` of micro-batch `micro_batch` of the global batch, where it is its own."""

    def restore(self) -> None:
        """Let the model compute with the clean weights again."""

    def before_update(self, step: int, learning_rate: float) -> None:
        """Take in, or change, the global gradient, clipped, from which the optimizer is about to make `step`."""

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
    global batch, whichever rank holds it. With `draws` there are as many, with `antithetic` each has its opposite too
    (NSO, arXiv 2306.08553), and `mix` leaves a share to the clean weights (m-RWP, arXiv 2404.00357).
    """

    def __post_init__(self) -> None:
        super().__post_init__()
        settings = self.settings
        # Draws lie where the perturbed weights are to be: a buffer less to go through.
        self._draws = NoiseDraws(settings, self.weights, self.seed, self._perturbed)
        signs = (1, -1) if settings.antithetic else (1,)
        weight = settings.mix / (settings.draws * len(signs))
        points = [Point(draw, sign, weight) for draw in range(settings.draws) for sign in signs]
        if settings.mix < 1:
            points.append(Point(0, 0, 1 - settings.mix))
        self._points = tuple(points)
        self._turns = len(points) if settings.passes == "one" else 1
        """Micro-batches that take turns at the points, and share their draws."""
        self._moves_once = len(points) == 1 and settings.sharing != "micro_batch"

    def points(self, micro_batch: int) -> Sequence[Point]:
        """Return all points, or, where micro-batches take turns, the one whose turn it is, for the others too."""
        if self._turns == 1:
            return self._points
        point = self._points[micro_batch % self._turns]
        return (replace(point, weight=point.weight * self._turns),)

    def perturb(self, step: int) -> None:
        """Move to the point that the step's micro-batches share, if they do."""
        super().perturb(step)
        if self._moves_once:
            self._move_to(self._points[0], 0, self.rank)

    def perturb_for(self, micro_batch: int, ascend: Ascend, point: Point = Point()) -> None:
        """Move to the micro-batch's point, unless all share one."""
        if not self._moves_once:
            self._move_to(point, micro_batch, self.rank)

    def _move_to(self, point: Point, micro_batch: int, rank: int) -> None:
        sharing = self.settings.sharing
        indices: tuple[int | str, ...] = (micro_batch // self._turns,) if sharing == "micro_batch" else ()
        if sharing == "rank":
            indices = STREAM_OF_A_RANK, rank
        if point.draw:
            indices = (*indices, "draw", point.draw)
        self.move(self._step, *indices, sign=point.sign)

    def move(self, step: int, *indices: int | str, sign: int = 1) -> None:
        """Be at the clean weights plus `sign` times the draw of (`step`, `indices`)."""
        clean = self.weights.values
        if sign == 0:
            self._perturbed.copy_(clean)
            return
        for part in self._draws.parts(clean, sign * self.amplitude(step), step, *indices):
            self._add(clean, part)

    def _add(self, clean: Tensor, part: slice) -> None:
        """Add the clean weights to the draw, which lies where the perturbed ones are to be."""
        self._perturbed[part].add_(clean[part])

    def lost_in(self, precision: torch.dtype, step: int) -> float:
        """Return which share of the weights under noise a cast to `precision` leaves where they were in `step`."""
        clean = self.weights.values
        self.move(step)
        noisy = self._perturbed != clean
        lost = noisy & (self._perturbed.to(precision) == clean.to(precision))
        return float(lost.sum() / noisy.sum().clamp_(min=1))

    def digest(self, step: int) -> int:
        """Return a digest of the weights at the first draw, which ranks share also where they differ on purpose."""
        if not self._moves_once or self.settings.sharing == "rank":
            self._step = step
            self._move_to(self._points[0], 0, 0)
        return digest(self._perturbed)


class AdaptivePerturbation(SmoothOut):
    """ARWP (arXiv 2404.00357): noise e / sqrt(1 + eta F), F <- beta F + g^2, summed over each filter.

    g is the global gradient, as it is clipped; filters are summed as integers, as in draws. As in its authors' code.
    """

    def __post_init__(self) -> None:
        super().__post_init__()
        self._filters = Filters(self.weights.filter_lengths, len(self.weights.values))
        self._damping = torch.ones_like(self.weights.values)
        self.kept["squares"] = torch.zeros_like(self.weights.values)

    def perturb(self, step: int) -> None:
        """Find out how much noise each filter has, and be SmoothOut with it."""
        squares = self.kept["squares"].clamp(max=_MOST_SQUARES).mul_(_SQUARE_UNITS).to(torch.int64)
        summed = self._filters.sum(squares).mul_(self.settings.adaptation / _SQUARE_UNITS).add_(1.0).sqrt_()
        self._damping.copy_(self._filters.repeat(summed.to(self._damping.dtype)))
        super().perturb(step)

    def _add(self, clean: Tensor, part: slice) -> None:
        self._perturbed[part].div_(self._damping[part]).add_(clean[part])

    def before_update(self, step: int, learning_rate: float) -> None:
        """Take the gradient into F."""
        gradients = self.weights.gradients
        self.kept["squares"].mul_(self.settings.memory).add_(gradients.square())


_MOST_SQUARES, _SQUARE_UNITS = 2.0**10, 2.0**32
"""A filter's squared gradients are summed as multiples of 2^-32, of at most 2^10 each."""


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


class ScaledLangevin(Langevin):
    """SGLD (Welling and Teh, 2011): noise that stays, in proportion to the root of the learning rate.

    At amplitude a and learning rate eta its variance is a^2 eta / 3: the temperature is a^2 / 6.
    """

    def before_update(self, step: int, learning_rate: float) -> None:
        """Scale the draw by the rate of the update."""
        self._draws.values.mul_(math.sqrt(learning_rate))


class FlatLangevin(SmoothOut):
    """fSGLD (arXiv 2510.02174): gradients at theta + sigma e, and noise of variance 2 eta tau that stays.

    sigma^2 is a draw's variance, a^2 / 3; tau, where it is not set, sigma^(4 / 1.01), the coupling of its authors.
    """

    def before_update(self, step: int, learning_rate: float) -> None:
        """Draw what stays, scaled by the weights before the update, into the buffer of the perturbed weights."""
        tau = self.settings.temperature
        if tau is None:
            tau = (self.amplitude(step) / _DEVIATIONS) ** (4.0 / 1.01)
        deviation = math.sqrt(2.0 * learning_rate * tau)
        self._draws.draw(self.weights.values, deviation * _DEVIATIONS, step, "stays")

    def after_update(self, step: int) -> None:
        """Add it."""
        self.weights.values.add_(self._perturbed)


class SharpnessAware(_Perturbing):
    """SAM (Foret et al., arXiv 2010.01412), its ascent taken by each micro-batch's own gradient.

    The gradient is taken at w + rho g / ||g||, where g is the micro-batch's gradient at w and rho the amplitude:
    two passes for each micro-batch, a function of its samples alone.
    """

    def __post_init__(self) -> None:
        super().__post_init__()
        self._mask = self.weights.mask(self.settings.exclude)

    def perturb_for(self, micro_batch: int, ascend: Ascend, point: Point = Point()) -> None:
        """Go uphill from the clean weights by the micro-batch's gradient."""
        clean = self.weights.values
        self._perturbed.copy_(clean)
        self.weights.gradients.zero_()
        ascend()
        torch.add(clean, self._uphill(self.weights.gradients), alpha=self.amplitude(self._step), out=self._perturbed)

    def _uphill(self, gradient: Tensor) -> Tensor:
        """Return the way of length 1 from `gradient`, which is overwritten."""
        return _normalized(gradient.mul_(self._mask))


class AdaptiveSharpnessAware(SharpnessAware):
    """ASAM (Kwon et al., arXiv 2102.11600): w + rho T^2 g / ||T g||, T = |w| + offset, element by element."""

    def _uphill(self, gradient: Tensor) -> Tensor:
        sizes = self.weights.values.abs().add_(self.settings.offset)
        return _normalized(gradient.mul_(self._mask).mul_(sizes)).mul_(sizes)


def _normalized(way: Tensor) -> Tensor:
    return way.div_(torch.linalg.vector_norm(way).clamp_(min=torch.finfo(way.dtype).tiny))


class VariationalNewton(_Perturbing):
    """IVON (Shen et al., arXiv 2402.17641): weights are the mean of a Gaussian, gradients are at a sample.

    With h the Hessian's estimate, d the damping, l the sample size and g the global gradient at w + e, where
    e ~ N(0, 1/(l (h + d))):

        m <- b1 m + (1 - b1) g
        f = l (h + d) e g
        h <- b2 h + (1 - b2) f + (1 - b2)^2 (h - f)^2 / (2 (h + d))
        w <- w - eta (h0 + d) (m / (1 - b1^t) + d w) / (h + d)

    The last line is what the optimizer gets as the gradient: plain gradient descent makes it the update. One sample a
    step, of all weights, is shared by all ranks, so that f needs the sum of gradients alone.
    """

    def __post_init__(self) -> None:
        super().__post_init__()
        drawn = self.settings.model_copy(update={"distribution": "normal", "scale": "absolute", "exclude": ()})
        self._draws = NoiseDraws(drawn, self.weights, self.seed)
        self.kept["momentum"] = torch.zeros_like(self.weights.values)
        self.kept["curvature"] = torch.full_like(self.weights.values, self.settings.curvature)

    def amplitude(self, step: int) -> float:
        """Return 1: the Hessian's estimate says how wide the noise is."""
        return 1.0

    def perturb(self, step: int) -> None:
        """Let the model compute with a sample."""
        super().perturb(step)
        widths = (self.kept["curvature"] + self.settings.damping).mul_(self.settings.sample_size).rsqrt_()
        noise = self._draws.draw(self.weights.values, _DEVIATIONS, step).mul_(widths)
        torch.add(self.weights.values, noise, out=self._perturbed)

    def before_update(self, step: int, learning_rate: float) -> None:
        """Take in the gradient, and put Newton's direction in its place."""
        gradient, momentum, curvature = self.weights.gradients, self.kept["momentum"], self.kept["curvature"]
        first, second = self.settings.betas
        damping = self.settings.damping
        momentum.mul_(first).add_(gradient, alpha=1 - first)
        damped = curvature + damping
        found = (self._draws.values * gradient).mul_(damped).mul_(self.settings.sample_size)
        surprise = (curvature - found).square_().div_(damped)
        curvature.mul_(second).add_(found, alpha=1 - second).add_(surprise, alpha=(1 - second) ** 2 / 2)
        gradient.copy_(momentum).div_(1 - first ** (step + 1)).add_(self.weights.values, alpha=damping)
        gradient.mul_(self.settings.curvature + damping).div_(curvature + damping)

    def digest(self, step: int) -> int:
        """Return a digest of the sample."""
        return digest(self._perturbed)


_METHODS: Mapping[str, type[Noise]] = {
    "none": Noise,
    "smoothout": SmoothOut,
    "arwp": AdaptivePerturbation,
    "langevin": Langevin,
    "sgld": ScaledLangevin,
    "fsgld": FlatLangevin,
    "sam": SharpnessAware,
    "asam": AdaptiveSharpnessAware,
    "ivon": VariationalNewton,
}


def build_noise(settings: NoiseSettings, weights: FlatWeights, *, seed: int, total_steps: int, rank: int) -> Noise:
    """Return the noise that `settings` describe, on `weights`, for `rank`."""
    name, place = settings.method, {"seed": seed, "total_steps": total_steps, "rank": rank}
    if is_plugin(name):
        return cast(Noise, call_plugin(name, settings.options, Noise, settings, weights, **place))
    return _METHODS[name](settings, weights, **place)
