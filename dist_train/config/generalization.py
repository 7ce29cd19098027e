"""Sections of what trainers have beside the update: regularization, averages of weights, early stopping."""

from __future__ import annotations

from typing import Annotated, Literal

from pydantic import Field, PositiveInt

from dist_train.config.parts import NonNegativeFloat, Section

Metric = Annotated[str, Field(pattern=r"^(train|validation|test)(-averaged)?\.(accuracy|loss)$")]
"""What an evaluation measures of a split, with the averaged weights where it says so."""


class RegularizationSettings(Section):
    """What training alone does to labels and images; evaluations keep the plain ones."""

    label_smoothing: Annotated[float, Field(ge=0, lt=1)] = Field(
        0.0, description="Share of each label that is spread over all classes (arXiv 1512.00567).", examples=[0.1]
    )
    mixup: NonNegativeFloat = Field(
        0.0,
        description="alpha: each image is blended with the next of the global batch, by a share from Beta(alpha, "
        "alpha), and so are their labels (arXiv 1710.09412); 0: none.",
        examples=[0.2],
    )
    cutmix: NonNegativeFloat = Field(
        0.0,
        description="alpha: a box of each image is replaced by the next image's, of an area from Beta(alpha, alpha) "
        "(arXiv 1905.04899); 0: none. With mixup too, each image gets one of the two at random.",
        examples=[1.0],
    )

    @property
    def mixes(self) -> bool:
        """Whether images are mixed."""
        return self.mixup > 0 or self.cutmix > 0


class AveragingSettings(Section):
    """An average of the weights along the way, evaluated and saved beside the weights themselves."""

    kind: Literal["none", "ema", "lawa"] = Field(
        "none",
        description="ema: exponential moving average (Polyak). lawa: mean of the `last` weights (arXiv 2209.14981).",
    )
    decay: Annotated[float, Field(gt=0, lt=1)] = Field(
        0.999, description="Of the ema: what stays of the average each time.", examples=[0.99]
    )
    every_steps: PositiveInt | None = Field(
        None,
        description="Updates between two weights that are taken; none: ema each update, lawa each epoch.",
        examples=[100],
    )
    last: Annotated[int, Field(ge=2)] = Field(5, description="Weights that lawa averages.", examples=[10])


class EarlyStoppingSettings(Section):
    """The run's end before its last epoch, when evaluations get no better."""

    patience: PositiveInt | None = Field(
        None, description="Evaluations without an improvement after which the run ends; none: never.", examples=[5]
    )
    min_delta: NonNegativeFloat = Field(
        0.0, description="What the metric must improve by, to count as an improvement.", examples=[0.001]
    )
    metric: Metric | None = Field(
        None,
        description="SPLIT.accuracy or SPLIT.loss; none: the accuracy on the validation split, else on the test split.",
        examples=["validation.loss"],
    )
