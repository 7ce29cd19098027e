"""The data sets that can be named, and the shape of their images."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from types import MappingProxyType


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
