"""The base class of sections, image formats and number types; and the section `data`."""

from __future__ import annotations

import os
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Any, Literal

from pydantic import AfterValidator, BaseModel, ConfigDict, Field, NonNegativeInt, PositiveInt

from dist_train.config.plugins import Options, PluginName, is_plugin


@dataclass(frozen=True)
class ImageFormat:
    """What a model must know about a data set: (channels, height, width) of an image, and the number of classes."""

    shape: tuple[int, int, int]
    classes: int


DATA_SETS: Mapping[str, ImageFormat] = {
    "fashion-mnist": ImageFormat((1, 28, 28), 10),
    "cifar10": ImageFormat((3, 32, 32), 10),
    "cifar100": ImageFormat((3, 32, 32), 100),
    "synthetic": ImageFormat((3, 32, 32), 10),
}
"""Image format by data set; `data.synthetic_*` override that of the synthetic set."""


AtLeastTwo = Annotated[int, Field(ge=2)]
Beta = Annotated[float, Field(ge=0, lt=1)]
Fraction = Annotated[float, Field(gt=0, le=1)]
UserPath = Annotated[Path, AfterValidator(lambda path: Path(os.path.expanduser(path)))]
"""A path, in which a leading ~ is the user's home: a shell does not expand it in section.key=~/folder."""


class Section(BaseModel):
    """A section of the configuration: frozen, and without unknown keys."""

    model_config = ConfigDict(frozen=True, extra="forbid", allow_inf_nan=False)


def options_of(setting: str) -> Any:
    """Return the field for the settings of the plug-in that `setting` names."""
    return Field(default_factory=dict, description=f"Settings of the plug-in in {setting}.", examples=[{"depth": 3}])


ENCODED = ("imagefolder", "parquet", "webdataset", "huggingface")
"""Kinds of a user's own data sets: files of encoded images of any size."""


class DataSettings(Section):
    """The data set."""

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
    ) = "fashion-mnist"
    """fashion-mnist: 1x28x28, 10 classes. cifar10, cifar100: 3x32x32, 10 or 100 classes. Your own data in `root`:
    imagefolder, one folder per class; parquet, webdataset, huggingface (`save_to_disk`), encoded images with labels;
    numpy, arrays. synthetic: generated images, no files needed.
    """
    options: Options = options_of("data.name")
    root: UserPath | None = Field(None, examples=["/data/cifar10"])
    """Folder of the data set's files; null: the default places."""
    download: bool = False
    """Download CIFAR's archive into `root` if it is missing."""
    train_size: PositiveInt | None = Field(None, examples=[16384])
    """Train on a seeded, class-balanced subset of this size; null: on all."""
    validation_size: PositiveInt | None = Field(None, examples=[5000])
    """Number of training images held out as the validation split, by a seeded, stratified choice. They are never
    trained on; `train_size` is taken from the rest.
    """
    augment: Literal["none", "crop-flip"] | PluginName = "none"
    """crop-flip: shift training images by up to 4 pixels (encoded images: random crop and resize), and flip half of
    them horizontally.
    """
    augment_options: Options = options_of("data.augment")
    normalize: bool = False
    """Normalize each channel by its mean and standard deviation."""
    loader_workers: NonNegativeInt = Field(0, examples=[4])
    """Processes per rank that decode images, for data not held in memory."""
    image_size: PositiveInt = Field(224, examples=[128])
    """Height and width to which encoded images are cropped."""
    shape: tuple[PositiveInt, PositiveInt, PositiveInt] | None = Field(None, examples=[(3, 64, 64)])
    """Channels, height and width of the images of a plug-in or of numpy arrays."""
    classes: AtLeastTwo | None = Field(None, examples=[1000])
    """Number of classes in your own data."""
    image_column: str | None = Field(None, min_length=1, examples=["img"])
    """Where images are: a column of parquet and huggingface (null: image), a suffix of webdataset's members (null: any
    image suffix), the name of a numpy array (null: images).
    """
    label_column: str | None = Field(None, min_length=1, examples=["fine_label"])
    """Where labels are, likewise (null: label; webdataset: cls; numpy: labels)."""
    synthetic_samples: PositiveInt = Field(4096, examples=[1024])
    """Training samples of the synthetic set; its test split has a fourth of that."""
    synthetic_shape: tuple[PositiveInt, PositiveInt, PositiveInt] = Field((3, 32, 32), examples=[(1, 12, 12)])
    """Channels, height and width of the synthetic set's images."""
    synthetic_classes: AtLeastTwo = Field(10, examples=[100])
    """Number of classes of the synthetic set."""

    @property
    def folder(self) -> Path:
        """`root`, for data sets that need one."""
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
