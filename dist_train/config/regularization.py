"""The sections for noise, regularization, weight averaging and early stopping."""

from __future__ import annotations

from typing import Annotated, Literal

from pydantic import Field, NonNegativeFloat, PositiveFloat, PositiveInt

from dist_train.config.parts import AtLeastTwo, Beta, Fraction, Section, options_of
from dist_train.config.plugins import Options, PluginName


class ConstantSchedule(Section):
    """c(t) = 1."""

    kind: Literal["constant"] = Field("constant", description="c(t) = 1.")


class CosineSchedule(Section):
    """c(t) = (1 + cos(pi t/T)) / 2."""

    kind: Literal["cosine"] = Field(description="c(t) = (1 + cos(pi t/T)) / 2.")


class LinearSchedule(Section):
    """c(t) = 1 - t/T."""

    kind: Literal["linear"] = Field(description="c(t) = 1 - t/T.")


class ExponentialSchedule(Section):
    """c(t) = r^(t/T)."""

    kind: Literal["exponential"] = Field(description="c(t) = r^(t/T).")
    final_fraction: Fraction = Field(0.01, description="r, the value at the end.", examples=[0.1])


class InversePowerSchedule(Section):
    """c(t) = (1 + t)^(-g/2)."""

    kind: Literal["inverse_power"] = Field(description="c(t) = (1 + t)^(-g/2).")
    gamma: PositiveFloat = Field(0.55, description="g.", examples=[1.0])


class TanhSchedule(Section):
    """c(t) = (tanh(s (t/T - 1/2)) + 1) / 2: it rises, as in SmoothOut's reference code."""

    kind: Literal["tanh"] = Field(description="c(t) = (tanh(s (t/T - 1/2)) + 1) / 2; it rises.")
    steepness: PositiveFloat = Field(10.0, description="s.", examples=[5.0])


class LateSchedule(Section):
    """c(t) = 0 before t = s T, then 1."""

    kind: Literal["late"] = Field(description="c(t) = 0 before t = s T, then 1.")
    start: Fraction = Field(0.75, description="s, the part of the run without noise.", examples=[0.9])


class RiseSchedule(Section):
    """c(t) = 1 + r (1 - cos(pi t/T)) / 2: it rises from 1 to 1 + r, as in LPF-SGD."""

    kind: Literal["rise"] = Field(description="c(t) = 1 + r (1 - cos(pi t/T)) / 2; it rises from 1 to 1 + r.")
    rise: PositiveFloat = Field(15.0, description="r.", examples=[3.0])


class PluginSchedule(Section):
    """c(t) = function(step, total_steps)."""

    kind: Literal["plugin"] = Field(description="c(t) = `function`(t, T).")
    function: PluginName = Field(description="`package.module:name` or `FILE.py:name`.", examples=["mine.py:hold"])
    options: Options = Field(default_factory=dict, description="Settings of `function`.", examples=[{"until": 0.5}])


NoiseSchedule = Annotated[
    ConstantSchedule
    | LinearSchedule
    | CosineSchedule
    | ExponentialSchedule
    | InversePowerSchedule
    | TanhSchedule
    | LateSchedule
    | RiseSchedule
    | PluginSchedule,
    Field(discriminator="kind"),
]


class NoiseSettings(Section):
    """The noise on the weights."""

    method: Literal["none", "smoothout", "arwp", "langevin", "sgld", "fsgld", "sam", "asam", "ivon"] | PluginName = (
        Field(
            "none",
            description="smoothout: gradients at perturbed weights, which are restored before the update; arwp: "
            "likewise, with less noise where gradients were large. langevin: each update adds noise that stays; sgld: "
            "likewise, times the square root of the learning rate; fsgld: smoothout and sgld together. sam, asam: "
            "gradients at weights moved up the micro-batch's own gradient. ivon: variational online Newton.",
        )
    )
    options: Options = options_of("noise.method")
    distribution: Literal["uniform", "normal"] = Field(
        "uniform", description="Distribution of u. uniform: on [-1, 1]. normal: with the same variance, 1/3."
    )
    amplitude: NonNegativeFloat = Field(0.01, description="a, the amplitude of the noise.", examples=[0.03])
    scale: Literal["absolute", "weight", "filter", "filter_norm"] | PluginName = Field(
        "absolute",
        description="absolute: the noise is a c(t) u. weight: times |w|. filter: each filter's draw is rescaled to the "
        "filter's norm. filter_norm: each element is multiplied by the filter's norm.",
    )
    scale_options: Options = options_of("noise.scale")
    sharing: Literal["global", "rank", "micro_batch"] = Field(
        "global",
        description="Draws of noise per step. global: one for all ranks. rank: one per rank. micro_batch: one per "
        "micro-batch.",
    )
    schedule: NoiseSchedule = Field(
        default_factory=ConstantSchedule, description="c(t), the factor on the amplitude at step t of T."
    )
    exclude: tuple[str, ...] = Field(
        ("norm",),
        description="Weights without noise: norm, bias, or patterns of parameter names (*, ?).",
        examples=[["norm", "bias"]],
    )
    draws: PositiveInt = Field(
        1, description="Number of draws over which each micro-batch's gradient is averaged.", examples=[4]
    )
    antithetic: bool = Field(False, description="Use each draw u together with -u.")
    mix: Fraction = Field(
        1.0, description="Weight of the perturbed gradients; the rest is the gradient at the weights.", examples=[0.5]
    )
    passes: Literal["all", "one"] = Field(
        "all",
        description="all: each micro-batch is computed at every point given by draws, antithetic and mix. one: at a "
        "single one of them, in turn, at the cost of plain training.",
    )
    offset: NonNegativeFloat = Field(0.01, description="asam: added to |w|.", examples=[0.1])
    adaptation: NonNegativeFloat = Field(1.0, description="arwp: factor on the squared gradients.", examples=[0.1])
    memory: Beta = Field(0.9, description="arwp: decay of the squared gradients.", examples=[0.99])
    temperature: NonNegativeFloat | None = Field(
        None,
        description="fsgld: temperature of the noise that stays; null: derived from the amplitude as its authors do.",
        examples=[1e-8],
    )
    sample_size: PositiveFloat = Field(
        60000.0, description="ivon: effective sample size, usually the training set's size.", examples=[2048.0]
    )
    curvature: PositiveFloat = Field(1.0, description="ivon: initial estimate of the Hessian.", examples=[0.1])
    damping: PositiveFloat = Field(1e-4, description="ivon: weight decay, delta.", examples=[0.001])
    betas: tuple[Beta, Beta] = Field(
        (0.9, 0.99999), description="ivon: decay of the momentum and of the Hessian estimate.", examples=[[0.9, 0.999]]
    )

    @property
    def points(self) -> int:
        """Number of points at which gradients are taken, for methods that draw them."""
        return self.draws * (2 if self.antithetic else 1) + (self.mix < 1)


Metric = Annotated[str, Field(pattern=r"^(train|validation|test)(-averaged)?\.(accuracy|loss)$")]
"""A quantity that evaluations measure: a split, with `-averaged` for the averaged weights, and accuracy or loss."""


class RegularizationSettings(Section):
    """Changes to labels and images in training only; evaluations use the original ones."""

    label_smoothing: Beta = Field(
        0.0, description="Share of each label that is spread over all classes (arXiv 1512.00567).", examples=[0.1]
    )
    mixup: NonNegativeFloat = Field(
        0.0,
        description="alpha: each image and its label are blended with the next of the global batch, in a proportion "
        "from Beta(alpha, alpha) (arXiv 1710.09412); 0: off.",
        examples=[0.2],
    )
    cutmix: NonNegativeFloat = Field(
        0.0,
        description="alpha: a box of each image is replaced by that of the next image; its area comes from Beta(alpha, "
        "alpha) (arXiv 1905.04899); 0: off. If mixup is on, too, each image gets one of the two at random.",
        examples=[1.0],
    )

    @property
    def mixes(self) -> bool:
        """Whether images are mixed."""
        return self.mixup > 0 or self.cutmix > 0


class AveragingSettings(Section):
    """An average of the weights over training, evaluated and saved beside the weights."""

    kind: Literal["none", "ema", "lawa"] = Field(
        "none",
        description="ema: exponential moving average (Polyak). lawa: mean of the `last` snapshots of the weights "
        "(arXiv 2209.14981).",
    )
    decay: Annotated[float, Field(gt=0, lt=1)] = Field(
        0.999, description="Decay of the ema: weight of the old average in each new one.", examples=[0.99]
    )
    every_steps: PositiveInt | None = Field(
        None,
        description="Updates between two snapshots; null: each update for ema, each epoch for lawa.",
        examples=[100],
    )
    last: AtLeastTwo = Field(5, description="Number of snapshots that lawa averages.", examples=[10])


class EarlyStoppingSettings(Section):
    """Ends the run before its last epoch when evaluations no longer improve."""

    patience: PositiveInt | None = Field(
        None, description="Evaluations without improvement after which the run ends; null: never.", examples=[5]
    )
    min_delta: NonNegativeFloat = Field(
        0.0, description="Smallest improvement of the metric that counts.", examples=[0.001]
    )
    metric: Metric | None = Field(
        None,
        description="SPLIT.accuracy or SPLIT.loss; null: accuracy on the validation split, or else on the test split.",
        examples=["validation.loss"],
    )
