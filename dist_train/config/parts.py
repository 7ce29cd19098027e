"""What sections are made of, formats of images and kinds of numbers; and the section `data`."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Any, Literal

from pydantic import BaseModel, ConfigDict, Field, PositiveInt

from dist_train.config.plugins import Options, PluginName, is_plugin


@dataclass(frozen=True)
class ImageFormat:
    """What a model must know of a data set: (channels, height, width) of an image, and the classes."""

    shape: tuple[int, int, int]
    classes: int


DATA_SETS: Mapping[str, ImageFormat] = {
    "fashion-mnist": ImageFormat((1, 28, 28), 10),
    "cifar10": ImageFormat((3, 32, 32), 10),
    "cifar100": ImageFormat((3, 32, 32), 100),
    "synthetic": ImageFormat((3, 32, 32), 10),
}
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


ENCODED = ("imagefolder", "parquet", "webdataset", "huggingface")
"""Data sets of encoded images, of any size, in files of one's own."""


class DataSettings(Section):
    """What is trained on."""

    name: (
        Literal[
            "fashion-mnist",
            "cifar10",
            "cifar100",
            "imagefolder",
            "parquet",
            "webdataset",
            "huggingface",
            "numpy",
            "synthetic",
        ]
        | PluginName
    ) = Field(
        "fashion-mnist",
        description="fashion-mnist: 1x28x28, 10 classes. cifar10, cifar100: 3x32x32, 10 or 100 classes. Of your own, "
        "in `root`: imagefolder, a folder a class; parquet, webdataset, huggingface (`save_to_disk`), encoded images "
        "and labels; numpy, arrays. synthetic: made-up images, no files needed.",
    )
    options: Options = options_of("data.name")
    root: Path | None = Field(
        None, description="Folder of the data set's files; none: the usual places.", examples=["/data/cifar10"]
    )
    download: bool = Field(False, description="Fetch CIFAR's archive into `root` when it is not there.")
    train_size: PositiveInt | None = Field(
        None, description="Train on a seeded, class-balanced subset of this size.", examples=[16384]
    )
    validation_size: PositiveInt | None = Field(
        None,
        description="Hold out so many training images, a seeded choice with the classes' shares: the validation split. "
        "It is never trained on, and `train_size` is taken of the rest.",
        examples=[5000],
    )
    augment: Literal["none", "crop-flip"] | PluginName = Field(
        "none",
        description="crop-flip: training images are shifted by up to 4 pixels, encoded ones cropped and resized at "
        "random, and half of them mirrored.",
    )
    augment_options: Options = options_of("data.augment")
    normalize: bool = Field(False, description="Subtract the channels' mean and divide by their deviation.")
    loader_workers: NonNegativeInt = Field(
        0, description="Processes that decode images, for data not held in memory.", examples=[4]
    )
    image_size: PositiveInt = Field(
        224, description="Height and width of encoded images, once cropped.", examples=[128]
    )
    shape: tuple[PositiveInt, PositiveInt, PositiveInt] | None = Field(
        None, description="Channels, height and width of a plug-in's images, or of NumPy's.", examples=[(3, 64, 64)]
    )
    classes: Annotated[int, Field(ge=2)] | None = Field(
        None, description="Classes of data of your own.", examples=[1000]
    )
    image_column: str | None = Field(
        None,
        min_length=1,
        description="Where images are: a column of parquet and huggingface (none: image), the suffix of webdataset's "
        "members (none: any of an image), the name of numpy's array (none: images).",
        examples=["img"],
    )
    label_column: str | None = Field(
        None,
        min_length=1,
        description="Where labels are, likewise; none: label, webdataset: cls, numpy: labels.",
        examples=["fine_label"],
    )
    synthetic_samples: PositiveInt = Field(
        4096, description="Training samples of the synthetic set (test: a fourth).", examples=[1024]
    )
    synthetic_shape: tuple[PositiveInt, PositiveInt, PositiveInt] = Field(
        (3, 32, 32),
        description="Channels, height and width of the synthetic set's images.",
        examples=[(1, 12, 12)],
    )
    synthetic_classes: Annotated[int, Field(ge=2)] = Field(
        10, description="Classes of the synthetic set.", examples=[100]
    )

    @property
    def folder(self) -> Path:
        """`root`, of data sets that need one."""
        assert self.root is not None, "checked before"
        return self.root

    @property
    def image_format(self) -> ImageFormat:
        """Shape of the images and number of classes."""
        if self.name == "synthetic":
            return ImageFormat(self.synthetic_shape, self.synthetic_classes)
        if self.name in ENCODED:
            assert self.classes is not None, "checked before"
            return ImageFormat((3, self.image_size, self.image_size), self.classes)
        if is_plugin(self.name) or self.name == "numpy":
            assert self.shape is not None, "checked before"
            assert self.classes is not None, "checked before"
            return ImageFormat(self.shape, self.classes)
        return DATA_SETS[self.name]
