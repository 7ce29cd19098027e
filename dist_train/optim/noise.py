"""The noise methods: what a training step does with noise. `noise_draws.py` draws it.

A method says at which points each micro-batch's gradient is taken, and with what weight. Perturbed weights have a
buffer of their own, with which the model computes meanwhile. The clean weights are not overwritten, since (w + n) - n
is not w in floating point.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import KW_ONLY, dataclass, field, replace
from typing import cast

import torch
from torch import Tensor

from dist_train.config import NoiseSettings
from dist_train.config.plugins import call_plugin, failing_clearly, is_plugin
from dist_train.config.resuming import STREAM_OF_A_RANK
from dist_train.optim.flat_weights import FlatWeights, check_movable, digest, norm
from dist_train.optim.noise_draws import Filters, NoiseDraws
from dist_train.optim.schedules import noise_factor
from dist_train.outcome import PluginResultError

Ascend = Callable[[], None]  # takes a micro-batch's gradient at the current weights into `FlatWeights.gradients`


_MAX_CHANGE = 1.1  # factor by which `target_rise` may change the amplitude in one update

_AMPLITUDE_PER_DEVIATION = math.sqrt(3.0)  # a draw of amplitude 1 has variance 1/3


@dataclass(frozen=True)
class Point:
    """Where a micro-batch's gradient is taken: the weights plus `sign` times a draw; and its weight in the sum."""

    draw: int = 0
    sign: int = 1
    weight: float = 1.0


@dataclass(eq=False)
class Noise:
    """What a training step does with `weights` around its gradients. This base class does nothing: `method: none`."""

    settings: NoiseSettings
    weights: FlatWeights
    _: KW_ONLY
    seed: int
    total_steps: int
    rank: int

    kept: dict[str, Tensor] = field(default_factory=dict, init=False)
    """What checkpoints hold, [n] by parameter. Changes only in `before_update`, `after_update` and `adapt`: during the
    rest of an update a thread may still copy it for the last checkpoint.
    """

    def __post_init__(self) -> None:
        pass  # subclasses create their buffers

    def load(self, kept: Mapping[str, Tensor]) -> None:
        """Restore `kept` from what `state` returned."""
        for name, view in self.state().items():
            view.copy_(kept[name])

    def state(self) -> dict[str, Tensor]:
        """Return `kept` as checkpoints hold it: views by name or, where there is a value for each weight, parameter."""
        whole = {name: values for name, values in self.kept.items() if values.shape != self.weights.values.shape}
        named = {name: self.weights.named(values) for name, values in self.kept.items() if name not in whole}
        return whole | {f"{name}.{each}": view for name, views in named.items() for each, view in views.items()}

    def points(self, micro_batch: int) -> Sequence[Point]:
        """Return the points at which the gradient of a micro-batch is taken: equally many for every micro-batch."""
        return (Point(),)

    def amplitude(self, step: int) -> float:
        """Return a c(t), the noise amplitude at `step`."""
        return 0.0

    def perturb(self, step: int) -> None:
        """Let the model compute with perturbed weights; the clean ones do not change."""

    def perturb_for(self, micro_batch: int, ascend: Ascend, point: Point = Point()) -> None:
        """Move the perturbed weights to `point` of `micro_batch`, unless all micro-batches share one point."""

    @contextmanager
    def at_clean_weights(self) -> Iterator[None]:
        """Let the model compute with the clean weights within the block."""
        yield

    def restore(self) -> None:
        """Let the model compute with the clean weights again."""

    def before_update(self, step: int, learning_rate: float) -> None:
        """Read or change the clipped global gradient, before the optimizer makes update `step` with it."""

    def after_update(self, step: int) -> None:
        """Change the weights after the optimizer has made update `step`."""

    def adapt(self, step: int, rise: float) -> None:
        """Adapt the noise to `rise`: by how much it raised the mean loss of the first micro-batch of `step`."""

    def digest(self, step: int) -> int:
        """Return a digest of the noise of `step`, the last update; equal on ranks that agree."""
        return 0


class _Scheduled(Noise):
    def amplitude(self, step: int) -> float:
        return self.settings.amplitude * noise_factor(self.settings.schedule, step, self.total_steps)


class _Perturbing(_Scheduled):
    """Methods that take gradients at perturbed weights, which have a buffer of their own, filled after `perturb`."""

    def __post_init__(self) -> None:
        self._step = 0
        self._perturbed = torch.zeros_like(self.weights.values)
        self._views = self.weights.views_of(self._perturbed)

    def perturb(self, step: int) -> None:
        self._step = step
        self.weights.compute_with(self._views)

    @contextmanager
    def at_clean_weights(self) -> Iterator[None]:
        self.weights.compute_with_values()
        try:
            yield
        finally:
            self.weights.compute_with(self._views)

    def restore(self) -> None:
        self.weights.compute_with_values()


class SmoothOut(_Perturbing):
    """SmoothOut (Wen et al., arXiv 1805.07898): gradients at perturbed weights; the noise does not stay.

    `sharing: global` makes one draw per step, `rank` one per rank, `micro_batch` one per micro-batch of the global
    batch, whichever rank computes it. `draws` multiplies them; with `antithetic`, each draw is also taken with the
    opposite sign (NSO, arXiv 2306.08553); `mix` below 1 adds the clean weights as a point (m-RWP, arXiv 2404.00357).

    With `target_rise` the amplitude follows the measured rises: `kept["strength"]` holds three float64 on the host, the
    number of an update, and the factors on the amplitude before that update and from it on.
    """

    def __post_init__(self) -> None:
        super().__post_init__()
        settings = self.settings
        # Draw into the buffer of the perturbed weights, to read and write one buffer less.
        self._draws = NoiseDraws(settings, self.weights, self.seed, self._perturbed)
        signs = (1, -1) if settings.antithetic else (1,)
        weight = settings.mix / (settings.draws * len(signs))
        points = [Point(draw, sign, weight) for draw in range(settings.draws) for sign in signs]
        if settings.mix < 1:
            points.append(Point(0, 0, 1 - settings.mix))
        self._points = tuple(points)
        self._turns = len(points) if settings.passes == "one" else 1  # micro-batches in a row that share the draws
        self._has_one_point = len(points) == 1 and settings.sharing != "micro_batch"  # for all micro-batches
        if settings.target_rise is not None:
            self.kept["strength"] = torch.tensor((0.0, 1.0, 1.0), dtype=torch.float64)

    def amplitude(self, step: int) -> float:
        """Return a c(t), times the strength that follows the measured rises, if it does."""
        amplitude = super().amplitude(step)
        if "strength" not in self.kept:
            return amplitude
        since, before, now = map(float, self.kept["strength"].tolist())
        return amplitude * (now if step >= since else before)

    def adapt(self, step: int, rise: float) -> None:
        """Let the next amplitude be larger if `rise` is below the target, and smaller if it is above.

        For small noise the rise is proportional to the amplitude squared: a fourth root goes half of the way.
        """
        if self.settings.target_rise is None:
            return
        # Square roots have the same bits on all computers.
        factor = math.sqrt(math.sqrt(self.settings.target_rise / rise)) if rise > 0 else _MAX_CHANGE
        strength = self.kept["strength"]
        now = float(strength[2])
        following = now * min(max(factor, 1 / _MAX_CHANGE), _MAX_CHANGE)
        strength.copy_(torch.tensor((step + 1.0, now, following), dtype=torch.float64))

    def points(self, micro_batch: int) -> Sequence[Point]:
        """Return all points or, if micro-batches take turns, the one of `micro_batch` with the weight of all."""
        if self._turns == 1:
            return self._points
        point = self._points[micro_batch % self._turns]
        return (replace(point, weight=point.weight * self._turns),)

    def perturb(self, step: int) -> None:
        """Move to the point of the step, if all micro-batches share one."""
        super().perturb(step)
        if self._has_one_point:
            self._move_to(self._points[0], 0, self.rank)

    def perturb_for(self, micro_batch: int, ascend: Ascend, point: Point = Point()) -> None:
        if not self._has_one_point:
            self._move_to(point, micro_batch, self.rank)

    def _move_to(self, point: Point, micro_batch: int, rank: int) -> None:
        """Set the perturbed weights to `point` of `micro_batch`, at the step of the last `perturb`, on `rank`."""
        clean, sharing = self.weights.values, self.settings.sharing
        if point.sign == 0:
            self._perturbed.copy_(clean)
            return
        indices: tuple[int | str, ...] = (micro_batch // self._turns,) if sharing == "micro_batch" else ()
        if sharing == "rank":
            indices = STREAM_OF_A_RANK, rank
        if point.draw:
            indices = (*indices, "draw", point.draw)
        for part in self._draws.parts(clean, point.sign * self.amplitude(self._step), self._step, *indices):
            self._add_clean(clean, part)

    def _add_clean(self, clean: Tensor, part: slice) -> None:
        """Add the clean weights to the draw, which is already in the buffer of the perturbed ones."""
        self._perturbed[part].add_(clean[part])

    def rounded_away(self, rounded: Callable[[Tensor], Tensor], step: int) -> float:
        """Return the share of the perturbed weights whose noise at `step` is lost where weights are `rounded`."""
        clean, self._step = self.weights.values, step
        self._move_to(self._points[0], 0, self.rank)
        noisy = self._perturbed != clean
        lost = noisy & (rounded(self._perturbed) == rounded(clean))
        return float(lost.sum() / noisy.sum().clamp_(min=1))

    def digest(self, step: int) -> int:
        """Return a digest of the weights perturbed by rank 0's first draw, which all ranks can compute."""
        if not self._has_one_point or self.settings.sharing == "rank":
            self._step = step
            self._move_to(self._points[0], 0, 0)
        return digest(self._perturbed)


class AdaptivePerturbation(SmoothOut):
    """ARWP (arXiv 2404.00357): noise e / sqrt(1 + eta F), F <- beta F + g^2, summed over each filter.

    g is the clipped global gradient. Filters are summed as integers, as in `noise_draws.py`. The formula is that of the
    authors' code.
    """

    def __post_init__(self) -> None:
        super().__post_init__()
        self._filters = Filters(self.weights)
        self._damping = torch.ones_like(self.weights.values)
        self.kept["squares"] = torch.zeros_like(self.weights.values)

    def perturb(self, step: int) -> None:
        """Compute the damping of each filter, then perturb as SmoothOut does."""
        squares = self.kept["squares"].clamp(max=_MAX_SQUARE).mul_(_SQUARE_UNITS).to(torch.int64)
        summed = self._filters.sum(squares).mul_(self.settings.adaptation / _SQUARE_UNITS).add_(1.0).sqrt_()
        self._damping.copy_(self._filters.repeat(summed.to(self._damping.dtype)))
        super().perturb(step)

    def _add_clean(self, clean: Tensor, part: slice) -> None:
        self._perturbed[part].div_(self._damping[part]).add_(clean[part])

    def before_update(self, step: int, learning_rate: float) -> None:
        """Update F by the gradient."""
        gradients = self.weights.gradients
        self.kept["squares"].mul_(self.settings.memory).add_(gradients.square())


_MAX_SQUARE, _SQUARE_UNITS = 2.0**10, 2.0**32  # gradients squared are clamped, and summed as integers


class Langevin(_Scheduled):
    """Equation 1 of Naganuma and Yokota: theta(t+1) = theta(t) - eta grad E(theta(t)) + delta(t).

    The noise stays in the weights. It is part of the update, not of the gradient: momentum does not see it.
    """

    def __post_init__(self) -> None:
        self._draws = NoiseDraws(self.settings, self.weights, self.seed)

    def perturb(self, step: int) -> None:
        """Draw delta(t), scaled by theta(t). The weights do not change: the gradient is taken at the clean ones."""
        self._draws.draw(self.weights.values, self.amplitude(step), step)

    def after_update(self, step: int) -> None:
        self.weights.values.add_(self._draws.values)

    def digest(self, step: int) -> int:
        return digest(self._draws.values)


class ScaledLangevin(Langevin):
    """SGLD (Welling and Teh, 2011): noise that stays, proportional to the square root of the learning rate.

    With amplitude a and learning rate eta its variance is a^2 eta / 3: the temperature is a^2 / 6.
    """

    def before_update(self, step: int, learning_rate: float) -> None:
        """Scale the draw by the square root of the learning rate."""
        self._draws.values.mul_(math.sqrt(learning_rate))


class FlatLangevin(SmoothOut):
    """fSGLD (arXiv 2510.02174): gradients at theta + sigma e, and noise of variance 2 eta tau that stays.

    sigma^2 is a draw's variance, a^2 / 3. tau defaults to sigma^(4 / 1.01), the authors' coupling.
    """

    def before_update(self, step: int, learning_rate: float) -> None:
        """Draw the noise that stays, scaled by the weights before the update, into the buffer of perturbed weights."""
        tau = self.settings.temperature
        if tau is None:
            tau = (self.amplitude(step) / _AMPLITUDE_PER_DEVIATION) ** (4.0 / 1.01)
        deviation = math.sqrt(2.0 * learning_rate * tau)
        self._draws.draw(self.weights.values, deviation * _AMPLITUDE_PER_DEVIATION, step, "stays")

    def after_update(self, step: int) -> None:
        self.weights.values.add_(self._perturbed)


class SharpnessAware(_Perturbing):
    """SAM (Foret et al., arXiv 2010.01412), ascending along each micro-batch's own gradient.

    The gradient is taken at w + rho g / ||g||, where g is the micro-batch's gradient at w and rho the amplitude. This
    needs two passes per micro-batch, and depends on its samples alone.
    """

    def __post_init__(self) -> None:
        super().__post_init__()
        self._mask = self.weights.mask(self.settings.exclude)

    def perturb_for(self, micro_batch: int, ascend: Ascend, point: Point = Point()) -> None:
        """Ascend from the clean weights along the micro-batch's gradient."""
        clean = self.weights.values
        self._perturbed.copy_(clean)
        self.weights.gradients.zero_()
        ascend()
        torch.add(clean, self._ascent(self.weights.gradients), alpha=self.amplitude(self._step), out=self._perturbed)

    def _ascent(self, gradient: Tensor) -> Tensor:
        """Return the perturbation for rho = 1; overwrites `gradient`."""
        return _normalized(gradient.mul_(self._mask))


class AdaptiveSharpnessAware(SharpnessAware):
    """ASAM (Kwon et al., arXiv 2102.11600): w + rho T^2 g / ||T g||, T = |w| + offset, element by element."""

    def _ascent(self, gradient: Tensor) -> Tensor:
        scales = self.weights.values.abs().add_(self.settings.offset)
        return _normalized(gradient.mul_(self._mask).mul_(scales)).mul_(scales)


_SHORTEST = 1e-12  # as in SAM's reference code: the squares of a much shorter gradient vanish in float32


def _normalized(vector: Tensor) -> Tensor:
    return vector.div_(norm(vector).clamp_(min=_SHORTEST))


class VariationalNewton(_Perturbing):
    """IVON (Shen et al., arXiv 2402.17641): the weights are the mean of a Gaussian; gradients are taken at a sample.

    With h the estimate of the Hessian, d the damping, l the sample size and g the global gradient at w + e, where
    e ~ N(0, 1/(l (h + d))):

        m <- b1 m + (1 - b1) g
        f = l (h + d) e g
        h <- b2 h + (1 - b2) f + (1 - b2)^2 (h - f)^2 / (2 (h + d))
        w <- w - eta (h0 + d) (m / (1 - b1^(t+1)) + d w) / (h + d)

    The optimizer gets the factor of eta in the last line as its gradient, so that plain SGD makes this update. All
    ranks share one sample of all weights per step, so that f needs only the sum of the gradients.
    """

    def __post_init__(self) -> None:
        super().__post_init__()
        drawn = self.settings.model_copy(update={"distribution": "normal", "scale": "absolute", "exclude": ()})
        self._draws = NoiseDraws(drawn, self.weights, self.seed)
        self.kept["momentum"] = torch.zeros_like(self.weights.values)
        self.kept["curvature"] = torch.full_like(self.weights.values, self.settings.curvature)

    def amplitude(self, step: int) -> float:
        """Return 1: the estimate of the Hessian determines the size of the noise."""
        return 1.0

    def perturb(self, step: int) -> None:
        super().perturb(step)
        deviations = (self.kept["curvature"] + self.settings.damping).mul_(self.settings.sample_size).rsqrt_()
        noise = self._draws.draw(self.weights.values, _AMPLITUDE_PER_DEVIATION, step).mul_(deviations)
        torch.add(self.weights.values, noise, out=self._perturbed)

    def before_update(self, step: int, learning_rate: float) -> None:
        """Update m and h by the gradient, and replace the gradient by the Newton direction."""
        gradient, momentum, curvature = self.weights.gradients, self.kept["momentum"], self.kept["curvature"]
        first, second = self.settings.betas
        damping = self.settings.damping
        momentum.mul_(first).add_(gradient, alpha=1 - first)
        damped = curvature + damping
        estimate = (self._draws.values * gradient).mul_(damped).mul_(self.settings.sample_size)
        correction = (curvature - estimate).square_().div_(damped)
        curvature.mul_(second).add_(estimate, alpha=1 - second).add_(correction, alpha=(1 - second) ** 2 / 2)
        gradient.copy_(momentum).div_(1 - first ** (step + 1)).add_(self.weights.values, alpha=damping)
        gradient.mul_(self.settings.curvature + damping).div_(curvature + damping)

    def digest(self, step: int) -> int:
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
    """Return the noise that `settings` select, for `weights` and `rank`.

    Raises UsageError if a plug-in fails, or `noise.exclude` names no weight, or all of them.
    """
    name, arguments = settings.method, {"seed": seed, "total_steps": total_steps, "rank": rank}
    moves_all = name in ("none", "ivon")  # whatever `exclude` says
    if not moves_all:
        check_movable(weights, settings.exclude, "noise.exclude")
    if is_plugin(name):
        noise = cast(Noise, call_plugin(name, settings.options, Noise, settings, weights, **arguments))
        _check_usable(noise, name)
        return noise
    return _METHODS[name](settings, weights, **arguments)


def _check_usable(noise: Noise, name: str) -> None:
    """Raise UsageError if training would fail with the `noise` of a plug-in."""
    if not hasattr(noise, "kept"):
        raise PluginResultError(
            f"the __init__ of {name} leaves out that of Noise: call super().__init__(settings, weights, seed=seed, "
            f"total_steps=total_steps, rank=rank)"
        )
    for key, value in noise.kept.items():
        if not isinstance(value, Tensor):
            raise PluginResultError(f"kept[{key!r}] of {name} is {type(value).__name__}, not a tensor")
    with failing_clearly(name):
        float(noise.amplitude(0))
        if not noise.points(0):
            raise PluginResultError(f"{name} names no point: return (Point(),) for the weights as they are perturbed")
