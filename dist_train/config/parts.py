"""The base class of sections, and the sections for data, noise, regularization, averaging and early stopping."""

from __future__ import annotations

import os
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Any, Literal

from pydantic import (
    AfterValidator,
    BaseModel,
    ConfigDict,
    Field,
    NonNegativeFloat,
    NonNegativeInt,
    PositiveFloat,
    PositiveInt,
)

from dist_train.config.plugins import Options, PluginName


@dataclass(frozen=True)
class ImageFormat:
    """What a model must know about a data set: (channels, height, width) of an image, and the number of classes."""

    shape: tuple[int, int, int]
    classes: int


@dataclass(frozen=True)
class DataSet:
    """What is known about a data set before its files are read."""

    image_format: ImageFormat | None = None  # None: that of the settings
    is_encoded: bool = False  # files of encoded images of any size, decoded when needed
    has_columns: bool = False  # images and labels are found by name
    can_download: bool = False


DataSetName = Literal[
    "fashion-mnist", "cifar10", "cifar100", "imagefolder", "parquet", "webdataset", "huggingface", "numpy", "synthetic"
]

DATA_SETS: Mapping[str, DataSet] = {
    "fashion-mnist": DataSet(ImageFormat((1, 28, 28), 10)),
    "cifar10": DataSet(ImageFormat((3, 32, 32), 10), can_download=True),
    "cifar100": DataSet(ImageFormat((3, 32, 32), 100), can_download=True),
    "imagefolder": DataSet(is_encoded=True),
    "parquet": DataSet(is_encoded=True, has_columns=True),
    "webdataset": DataSet(is_encoded=True, has_columns=True),
    "huggingface": DataSet(is_encoded=True, has_columns=True),
    "numpy": DataSet(has_columns=True),
    "synthetic": DataSet(),
}
"""By `data.name`; a plug-in is a `DataSet()`."""


AtLeastTwo = Annotated[int, Field(ge=2)]
Beta = Annotated[float, Field(ge=0, lt=1)]
Fraction = Annotated[float, Field(gt=0, le=1)]
UserPath = Annotated[Path, AfterValidator(lambda path: Path(os.path.expanduser(path)))]
"""A path, in which a leading ~ is the user's home: a shell does not expand it in section.key=~/folder."""


class Section(BaseModel):
    """A section of the configuration: frozen, and without unknown keys; the text below a setting describes it."""

    model_config = ConfigDict(frozen=True, extra="forbid", allow_inf_nan=False, use_attribute_docstrings=True)


def options_of(setting: str) -> Any:
    """Return the field for the settings of the plug-in that `setting` names."""
    return Field({}, description=f"Settings of the plug-in in {setting}.", examples=[{"depth": 3}])


class DataSettings(Section):
    """The data set."""

    name: DataSetName | PluginName = "fashion-mnist"
    """fashion-mnist: 1x28x28, 10 classes. cifar10, cifar100: 3x32x32, 10 or 100 classes. Your own data in `root`:
    imagefolder, one folder per class; parquet, webdataset, huggingface (`save_to_disk`), encoded images with labels;
    numpy, arrays. synthetic: generated images, no files needed.
    """
    options: Options = options_of("data.name")
    root: UserPath | None = Field(None, examples=["/data/cifar10"])
    """Folder of the data set's files. null: for CIFAR the cache, for fashion-mnist Debian's package or the cache."""
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
        """`root`, for data sets that need one; absolute, as messages are to name it."""
        assert self.root is not None, "checked before"
        return self.root.absolute()

    @property
    def data_set(self) -> DataSet:
        """What is known about the data set before its files are read."""
        return DATA_SETS.get(self.name, DataSet())

    @property
    def has_own_format(self) -> bool:
        """Whether it holds a user's own images, whose format the settings give."""
        return self.data_set.image_format is None and self.name != "synthetic"

    @property
    def image_format(self) -> ImageFormat:
        """Shape of the images and number of classes."""
        if self.data_set.image_format is not None:
            return self.data_set.image_format
        if self.name == "synthetic":
            return ImageFormat(self.synthetic_shape, self.synthetic_classes)
        shape = (3, self.image_size, self.image_size) if self.data_set.is_encoded else self.shape
        assert shape is not None, "checked before"
        assert self.classes is not None, "checked before"
        return ImageFormat(shape, self.classes)


class ConstantSchedule(Section):
    """c(t) = 1."""

    kind: Literal["constant"] = "constant"


class CosineSchedule(Section):
    """c(t) = (1 + cos(pi t/T)) / 2."""

    kind: Literal["cosine"]


class LinearSchedule(Section):
    """c(t) = 1 - t/T."""

    kind: Literal["linear"]


class ExponentialSchedule(Section):
    """c(t) = r^(t/T)."""

    kind: Literal["exponential"]
    final_fraction: Fraction = Field(0.01, examples=[0.1])
    """r, the value at the end."""


class InversePowerSchedule(Section):
    """c(t) = (1 + t)^(-g/2)."""

    kind: Literal["inverse_power"]
    gamma: PositiveFloat = Field(0.55, examples=[1.0])
    """g."""


class TanhSchedule(Section):
    """c(t) = (tanh(s (t/T - 1/2)) + 1) / 2; it rises, as in SmoothOut's reference code."""

    kind: Literal["tanh"]
    steepness: PositiveFloat = Field(10.0, examples=[5.0])
    """s."""


class LateSchedule(Section):
    """c(t) = 0 before t = s T, then 1."""

    kind: Literal["late"]
    start: Fraction = Field(0.75, examples=[0.9])
    """s, the part of the run without noise."""


class RiseSchedule(Section):
    """c(t) = 1 + r (1 - cos(pi t/T)) / 2; it rises from 1 to 1 + r, as in LPF-SGD."""

    kind: Literal["rise"]
    rise: PositiveFloat = Field(15.0, examples=[3.0])
    """r."""


class PluginSchedule(Section):
    """c(t) = `function`(t, T)."""

    kind: Literal["plugin"]
    function: PluginName = Field(examples=["mine.py:hold"])
    """`package.module:name`, `FILE.py:name`, or a name from `plugins`."""
    options: Options = Field({}, examples=[{"until": 0.5}])
    """Settings of `function`."""


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


NoiseMethod = Literal["none", "smoothout", "arwp", "langevin", "sgld", "fsgld", "sam", "asam", "ivon"]


class NoiseSettings(Section):
    """The noise on the weights."""

    method: NoiseMethod | PluginName = "none"
    """smoothout: gradients at perturbed weights, which are restored before the update; arwp: likewise, with less noise
    where gradients were large. langevin: each update adds noise that stays; sgld: likewise, times the square root of
    the learning rate; fsgld: smoothout and sgld together. sam, asam: gradients at weights moved up the micro-batch's
    own gradient. ivon: variational online Newton.
    """
    options: Options = options_of("noise.method")
    distribution: Literal["uniform", "normal"] = "uniform"
    """Distribution of u. uniform: on [-1, 1]. normal: with the same variance, 1/3."""
    amplitude: NonNegativeFloat = Field(0.01, examples=[0.03])
    """a, the amplitude of the noise."""
    scale: Literal["absolute", "weight", "filter", "filter_norm"] | PluginName = "absolute"
    """absolute: the noise is a c(t) u. weight: times |w|. filter: each filter's draw is rescaled to the filter's norm.
    filter_norm: each element is multiplied by the filter's norm.
    """
    scale_options: Options = options_of("noise.scale")
    sharing: Literal["global", "rank", "micro_batch"] = "global"
    """Draws of noise per step. global: one for all ranks. rank: one per rank. micro_batch: one per micro-batch."""
    schedule: NoiseSchedule = Field(default_factory=ConstantSchedule)
    """c(t), the factor on the amplitude at step t of T."""
    target_rise: PositiveFloat | None = Field(None, examples=[0.05])
    """Rise of the training loss that the noise should cause: the amplitude begins as `amplitude`, and each update
    adapts it to the rise measured on its first micro-batch. null: the amplitude does not depend on the loss.
    """
    exclude: tuple[str, ...] = Field(("norm",), examples=[["norm", "bias"]])
    """Weights without noise: norm, bias, or patterns of parameter names (*, ?)."""
    draws: PositiveInt = Field(1, examples=[4])
    """Number of draws over which each micro-batch's gradient is averaged."""
    antithetic: bool = False
    """Use each draw u together with -u."""
    mix: Fraction = Field(1.0, examples=[0.5])
    """Weight of the perturbed gradients; the rest is the gradient at the weights."""
    passes: Literal["all", "one"] = "all"
    """all: each micro-batch is computed at every point given by draws, antithetic and mix. one: at a single one of
    them, in turn, at the cost of plain training.
    """
    offset: NonNegativeFloat = Field(0.01, examples=[0.1])
    """asam: added to |w|."""
    adaptation: NonNegativeFloat = Field(1.0, examples=[0.1])
    """arwp: factor on the squared gradients."""
    memory: Beta = Field(0.9, examples=[0.99])
    """arwp: decay of the squared gradients."""
    temperature: NonNegativeFloat | None = Field(None, examples=[1e-8])
    """fsgld: temperature of the noise that stays; null: derived from the amplitude as its authors do."""
    sample_size: PositiveFloat = Field(60000.0, examples=[2048.0])
    """ivon: effective sample size, usually the training set's size."""
    curvature: PositiveFloat = Field(1.0, examples=[0.1])
    """ivon: initial estimate of the Hessian."""
    damping: PositiveFloat = Field(1e-4, examples=[0.001])
    """ivon: weight decay, delta."""
    betas: tuple[Beta, Beta] = Field((0.9, 0.99999), examples=[[0.9, 0.999]])
    """ivon: decay of the momentum and of the Hessian estimate."""

    @property
    def points(self) -> int:
        """Number of points at which gradients are taken, for methods that draw them."""
        return self.draws * (2 if self.antithetic else 1) + (self.mix < 1)

    @property
    def summary(self) -> str:
        """The method and, if it uses them, the settings of what it draws, for display."""
        if self.method in ("none", "ivon"):  # whose estimate of the Hessian determines the draw
            return self.method
        draws_nothing = self.method in ("sam", "asam")
        drawn = ("" if draws_nothing else f"{self.distribution} ") + f"{self.amplitude:g}"
        points = (
            f"draws {self.draws}" if self.draws > 1 else "",
            "antithetic" if self.antithetic else "",
            f"mix {self.mix:g}" if self.mix < 1 else "",
        )
        parts = (self.method, drawn, self.sharing, self.schedule.kind, *(() if draws_nothing else points))
        return ", ".join(filter(None, parts))


Metric = Annotated[str, Field(pattern=r"^(train|validation|test)(-averaged)?\.(accuracy|loss)$")]
"""A quantity that evaluations measure: a split, with `-averaged` for the averaged weights, and accuracy or loss."""


class RegularizationSettings(Section):
    """Changes to labels and images in training only; evaluations use the original ones."""

    label_smoothing: Beta = Field(0.0, examples=[0.1])
    """Share of each label that is spread over all classes (arXiv 1512.00567)."""
    mixup: NonNegativeFloat = Field(0.0, examples=[0.2])
    """alpha: each image and its label are blended with the next of the global batch, in a proportion from Beta(alpha,
    alpha) (arXiv 1710.09412); 0: off.
    """
    cutmix: NonNegativeFloat = Field(0.0, examples=[1.0])
    """alpha: a box of each image is replaced by that of the next image; its area comes from Beta(alpha, alpha) (arXiv
    1905.04899); 0: off. If mixup is on, too, each image gets one of the two at random.
    """

    @property
    def mixes(self) -> bool:
        """Whether images are mixed."""
        return self.mixup > 0 or self.cutmix > 0


class AveragingSettings(Section):
    """An average of the weights over training, evaluated and saved beside the weights."""

    kind: Literal["none", "ema", "lawa"] = "none"
    """ema: exponential moving average (Polyak). lawa, latest weight averaging: mean of the `last` snapshots of the
    weights (arXiv 2209.14981).
    """
    decay: Annotated[float, Field(gt=0, lt=1)] = Field(0.999, examples=[0.99])
    """Decay of the ema: weight of the old average in each new one."""
    every_steps: PositiveInt | None = Field(None, examples=[100])
    """Updates between two snapshots; null: each update for ema, each epoch for lawa."""
    last: AtLeastTwo = Field(5, examples=[10])
    """Number of snapshots that lawa averages."""


class EarlyStoppingSettings(Section):
    """Ends the run before its last epoch when evaluations no longer improve."""

    patience: PositiveInt | None = Field(None, examples=[5])
    """Evaluations without improvement after which the run ends; null: never."""
    min_delta: NonNegativeFloat = Field(0.0, examples=[0.001])
    """The metric must improve by more than this."""
    metric: Metric | None = Field(None, examples=["validation.loss"])
    """SPLIT.accuracy or SPLIT.loss; null: accuracy on the validation split, or else on the test split."""
