"""What the sections of a configuration are made of: formats of images, kinds of numbers, noise schedules."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from types import MappingProxyType
from typing import Annotated, Any, Literal

from pydantic import BaseModel, ConfigDict, Field

from dist_train.config.plugins import Options, PluginName


@dataclass(frozen=True)
class ImageFormat:
    """What a model must know of a data set: (channels, height, width) of an image, and the classes."""

    shape: tuple[int, int, int]
    classes: int


DATA_SETS: Mapping[str, ImageFormat] = MappingProxyType(
    {
        "fashion-mnist": ImageFormat((1, 28, 28), 10),
        "cifar10": ImageFormat((3, 32, 32), 10),
        "cifar100": ImageFormat((3, 32, 32), 100),
        "synthetic": ImageFormat((3, 32, 32), 10),
    }
)
"""Format by name; the synthetic set's is its default, which `data.synthetic_*` overrides."""


PositiveFloat = Annotated[float, Field(gt=0)]
NonNegativeFloat = Annotated[float, Field(ge=0)]
NonNegativeInt = Annotated[int, Field(ge=0)]
Beta = Annotated[float, Field(ge=0, lt=1)]
Fraction = Annotated[float, Field(gt=0, le=1)]


class Section(BaseModel):
    """A part of the configuration: frozen, and closed to keys that it does not know."""

    model_config = ConfigDict(frozen=True, extra="forbid", allow_inf_nan=False)


def options_of(setting: str) -> Any:
    """Return the field for the settings of the plug-in that `setting` names."""
    return Field(
        default_factory=dict,
        description=f"Settings of the plug-in that {setting} names.",
        examples=[{"depth": 3}],
    )


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
    final_fraction: Fraction = Field(0.01, description="r, what is left at the end.", examples=[0.1])


class InversePowerSchedule(Section):
    """c(t) = (1 + t)^(-g/2)."""

    kind: Literal["inverse_power"] = Field(description="c(t) = (1 + t)^(-g/2).")
    gamma: PositiveFloat = Field(0.55, description="g.", examples=[1.0])


class TanhSchedule(Section):
    """c(t) = (tanh(s (t/T - 1/2)) + 1) / 2: it rises, as SmoothOut's reference has it."""

    kind: Literal["tanh"] = Field(description="c(t) = (tanh(s (t/T - 1/2)) + 1) / 2; it rises.")
    steepness: PositiveFloat = Field(10.0, description="s.", examples=[5.0])


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
    | PluginSchedule,
    Field(discriminator="kind"),
]
