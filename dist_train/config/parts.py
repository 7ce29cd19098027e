"""What the sections of a configuration are made of: formats of images, kinds of numbers."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from types import MappingProxyType
from typing import Annotated, Any

from pydantic import BaseModel, ConfigDict, Field


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
