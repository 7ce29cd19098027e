"""The data sets that can be named, and the shape of their images."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from types import MappingProxyType
from typing import Annotated, Literal

from pydantic import BaseModel, ConfigDict, Field, PositiveInt


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
Device = Literal["auto", "cpu", "cuda"]


class Section(BaseModel):
    """A part of the configuration: frozen, and closed to keys that it does not know."""

    model_config = ConfigDict(frozen=True, extra="forbid", allow_inf_nan=False)


class RunSettings(Section):
    """The run's name, place and length."""

    name: str = Field("run", pattern=r"^[A-Za-z0-9][A-Za-z0-9._-]*$", description="Name of the run's directory.")
    directory: Path = Field(Path("runs"), description="Folder that holds the run directories.")
    seed: NonNegativeInt = Field(0, description="All randomness is a function of it.")
    device: Device = Field(
        "auto",
        description="Where the ranks compute. auto: on the GPUs, where there are any; GPUs that torch cannot use are "
        "an error, not a run on the CPU. Decided when a run begins, and kept on a resume.",
    )
    epochs: PositiveInt = Field(10, description="Passes over the training data; schedules are laid out over them.")
    max_steps: PositiveInt | None = Field(None, description="Stop after this many updates.")
    profile_steps: NonNegativeInt = Field(0, description="Updates of which a profiler trace is written.")
    stop_signal: Literal["SIGUSR1", "SIGUSR2", "SIGHUP"] = Field(
        "SIGUSR2", description="Signal that asks the run to save and stop, beside SIGTERM, SIGINT and SIGUSR2."
    )
    resume: str = Field(
        "auto",
        description="auto: resume from the last checkpoint, if any. never: start anew. Or a checkpoint's path.",
    )


class DataSettings(Section):
    """What is trained on."""

    name: Literal["fashion-mnist", "cifar10", "cifar100", "imagefolder", "synthetic"] = "fashion-mnist"
    root: Path | None = Field(None, description="Folder of the data set's files; none: the usual places.")
    download: bool = Field(False, description="Fetch CIFAR's archive into `root` when it is not there.")
    train_size: PositiveInt | None = Field(None, description="Train on a seeded, class-balanced subset of this size.")
    augment: Literal["none", "crop-flip"] = "none"
    normalize: bool = Field(False, description="Subtract the channels' mean and divide by their deviation.")
    loader_workers: NonNegativeInt = Field(0, description="Processes that decode images, for data not held in memory.")
    image_size: PositiveInt = Field(224, description="Height and width of an image folder's images, once cropped.")
    classes: Annotated[int, Field(ge=2)] | None = Field(None, description="Classes of an image folder.")
    synthetic_samples: PositiveInt = Field(4096, description="Training samples of the synthetic set (test: a fourth).")
    synthetic_shape: tuple[PositiveInt, PositiveInt, PositiveInt] = (3, 32, 32)
    synthetic_classes: Annotated[int, Field(ge=2)] = 10

    @property
    def image_format(self) -> ImageFormat:
        """Shape of the images and number of classes."""
        if self.name == "synthetic":
            return ImageFormat(self.synthetic_shape, self.synthetic_classes)
        if self.name == "imagefolder":
            assert self.classes is not None, "checked before"
            return ImageFormat((3, self.image_size, self.image_size), self.classes)
        return DATA_SETS[self.name]


class ModelSettings(Section):
    """The network and its norms."""

    name: Literal["vgg9", "vgg16", "vgg19", "resnet18", "resnet50"] = "vgg9"
    width: PositiveFloat = Field(1.0, description="Factor on the number of channels.")
    norm: Literal["batch", "ghost", "sync", "group", "none"] = Field(
        "ghost",
        description="batch: over a micro-batch. ghost: over groups of `ghost_size` samples. "
        "sync: over a micro-batch that all ranks share. group: over groups of channels of each sample.",
    )
    ghost_size: Annotated[int, Field(ge=2)] = Field(128, description="Samples that ghost norm normalizes together.")
    channel_groups: PositiveInt = Field(32, description="Groups of channels of group norm, where they divide.")
    norm_statistics: Literal["auto", "running", "recomputed"] = Field(
        "auto",
        description="Statistics for evaluation: running averages of the training's, or recomputed from training "
        "data with the clean weights. auto: recomputed where noise is on.",
    )
    norm_samples: Annotated[int, Field(ge=2)] = Field(
        2048, description="Training samples that recomputed statistics are taken from."
    )


class BatchSettings(Section):
    """The global batch and how it is cut."""

    global_size: PositiveInt = Field(8192, description="Samples of one update, over all ranks.")
    micro_size: PositiveInt | Literal["auto"] = Field(
        "auto", description="Samples of one forward and backward pass; auto: what fits the device."
    )


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
    final_fraction: Fraction = Field(0.01, description="r, what is left at the end.")


class InversePowerSchedule(Section):
    """c(t) = (1 + t)^(-g/2)."""

    kind: Literal["inverse_power"]
    gamma: PositiveFloat = Field(0.55, description="g.")


class TanhSchedule(Section):
    """c(t) = (tanh(s (t/T - 1/2)) + 1) / 2: it rises, as SmoothOut's reference has it."""

    kind: Literal["tanh"]
    steepness: PositiveFloat = Field(10.0, description="s.")


NoiseSchedule = Annotated[
    ConstantSchedule | LinearSchedule | CosineSchedule | ExponentialSchedule | InversePowerSchedule | TanhSchedule,
    Field(discriminator="kind"),
]


class NoiseSettings(Section):
    """The noise on the weights."""

    method: Literal["none", "smoothout", "langevin", "sam"] = Field(
        "none",
        description="smoothout: gradients at perturbed weights, which are restored before the update. "
        "langevin: noise added by the update, to stay. sam: gradients where the micro-batch's loss is sharpest.",
    )
    distribution: Literal["uniform", "normal"] = Field(
        "uniform", description="uniform on [-1, 1], or normal with the same variance, 1/3; times the amplitude."
    )
    amplitude: NonNegativeFloat = Field(0.01, description="a, the factor on the noise.")
    scale: Literal["absolute", "weight", "filter"] = Field(
        "absolute",
        description="absolute: a c(t) u. weight: times |w|. filter: each filter's draw with the filter's own norm.",
    )
    sharing: Literal["global", "rank", "micro_batch"] = Field(
        "global",
        description="How many draws a step. global: one for all. rank: one each. micro_batch: one per micro-batch.",
    )
    schedule: NoiseSchedule = Field(default_factory=ConstantSchedule, description="c(t), the decay of the amplitude.")
    exclude: tuple[str, ...] = Field(
        ("norm",),
        description="Weights kept free of noise: norm, bias, or patterns of parameter names (*, ?).",
    )


class OptimizerSettings(Section):
    """The update rule."""

    name: Literal["sgd", "adam", "adamw", "lars", "lamb"] = "sgd"
    learning_rate: NonNegativeFloat = Field(0.1, description="Rate at `schedule.base_batch`.")
    momentum: Annotated[float, Field(ge=0, lt=1)] = 0.9
    nesterov: bool = True
    betas: tuple[Beta, Beta] = Field((0.9, 0.999), description="Decay of the moments of adam, adamw and lamb.")
    epsilon: PositiveFloat = Field(1e-8, description="Added to denominators by adam, adamw and lamb.")
    trust: PositiveFloat = Field(0.001, description="Trust coefficient of lars.")
    weight_decay: NonNegativeFloat = 0.0
    exclude: tuple[str, ...] = Field(
        ("norm", "bias"),
        description="Weights kept free of weight decay and layer-wise adaptation: norm, bias, or patterns of names.",
    )
    clip_norm: PositiveFloat | None = Field(None, description="Largest norm of the global gradient.")


class ScheduleSettings(Section):
    """The learning rate over the run."""

    scaling: Literal["none", "linear", "sqrt"] = Field(
        "none", description="Factor for the global batch: (global_size / base_batch), or its square root."
    )
    base_batch: PositiveInt = 128
    warmup_epochs: NonNegativeFloat = Field(0.0, description="Epochs in which the rate rises from the unscaled one.")
    keep_updates: bool = Field(
        False,
        description="As many updates as at `base_batch`: an epoch of the run, of its warm-up and milestones, has the "
        "updates that it would have there (Hoffer et al., arXiv 1705.08741).",
    )
    decay: Literal["constant", "step", "cosine", "poly"] = "constant"
    milestones: tuple[PositiveFloat, ...] = Field((), description="Epochs at which a step decay applies `factor`.")
    factor: Fraction = Field(0.1, description="Factor of a step decay.")
    power: PositiveFloat = Field(2.0, description="Exponent of a polynomial decay.")


class PrecisionSettings(Section):
    """Numbers and kernels."""

    compute: Literal["float32", "bfloat16", "float16"] = Field(
        "float32", description="Precision of forward and backward; float16, with loss scaling, on CUDA alone."
    )
    channels_last: bool = Field(True, description="Images in channels-last layout: faster convolutions.")
    compile: bool = Field(False, description="Compile the model with torch.compile.")
    tf32: bool = Field(
        False, description="On a GPU, float32 convolutions and matrix products may round their inputs to TF32."
    )
    deterministic: bool | Literal["auto"] = Field(
        "auto",
        description="Only kernels that give the same bits each time; auto: on a GPU, where comm.reduction is exact.",
    )
    threads: PositiveInt | Literal["auto"] = Field(
        "auto", description="CPU threads of a rank; auto: OMP_NUM_THREADS, else the cores shared out."
    )


Engine = Literal["auto", "horovod", "torch"]


class CommSettings(Section):
    """What the ranks say to each other."""

    engine: Engine = Field(
        "auto",
        description="What carries the ranks. auto: Horovod under horovodrun and mpirun, and under srun where it is "
        "installed; else torch.distributed.",
    )
    reduction: Literal["exact", "float"] = Field(
        "exact", description="exact: gradients summed as integers, the same bits on any number of ranks."
    )
    compression: Literal["none", "fp16"] = Field("none", description="Gradients sent as float16 (float only).")
    op: Literal["average", "adasum"] = Field(
        "average", description="How ranks' gradients combine (adasum: float only)."
    )
    verify_every: NonNegativeInt = Field(100, description="Steps between agreement checks; 0: none.")
    timeout: Annotated[float, Field(ge=5)] = Field(
        60.0, description="Seconds within which the run ends when a rank does not answer."
    )


class EvaluationSettings(Section):
    """When and how the model is evaluated."""

    every_epochs: NonNegativeInt = Field(1, description="Epochs between evaluations; 0: at the end only.")
    batch_size: PositiveInt = Field(500, description="Samples of one forward pass.")
    train_samples: NonNegativeInt = Field(10000, description="Training samples evaluated beside the test set.")


class CheckpointSettings(Section):
    """When the run is saved, and what is kept."""

    every_epochs: NonNegativeInt = Field(1, description="Epochs between checkpoints; 0: at the end only.")
    every_steps: PositiveInt | None = Field(None, description="Also after every so many updates.")
    keep: PositiveInt = Field(3, description="Checkpoints kept, the last ones.")
    keep_best: bool = Field(True, description="Also keep the one with the best test accuracy.")
    background: bool = Field(True, description="Write while training continues.")


class MetricsSettings(Section):
    """The Prometheus exporter and the pace of reports. Secrets are named as files: settings are saved with the run."""

    enabled: bool = True
    host: str = Field("127.0.0.1", description="Address to serve at; 0.0.0.0: every address of the node.")
    port: Annotated[int, Field(ge=0, le=65535)] = Field(
        9810, description="The next free one from here; 0: any free port."
    )
    ranks: Literal["first", "all"] = Field(
        "first", description="Who serves metrics. first: rank 0, those of the run. all: every rank its own too."
    )
    every_steps: PositiveInt = Field(1, description="Steps between training records.")
    token_file: Path | None = Field(None, description="File with the bearer token that a scrape must bring.")
    password_file: Path | None = Field(None, description="File with user:password that a scrape must bring.")
    certificate_file: Path | None = Field(None, description="TLS certificate (PEM), with its chain; none: plain HTTP.")
    key_file: Path | None = Field(None, description="Private key (PEM) of the TLS certificate.")
    targets_directory: Path | None = Field(
        None,
        description="Folder where Prometheus looks for targets (file_sd); lists the run, and for a day how it ended.",
    )
    advertised_host: str | None = Field(
        None, description="Host in the target file; none: the node's name, or `host` where that is one address."
    )
    pushgateway: str | None = Field(
        None, pattern=r"^https?://", description="URL of a Pushgateway that takes the last values, for short runs."
    )
    last_scrape_seconds: NonNegativeFloat = Field(
        20.0, description="Longest wait, at the end of a run that is being scraped, for a scrape of the last values."
    )
    tensorboard: bool = Field(False, description="Write TensorBoard's event files into the run directory too.")


class Config(Section):
    """All settings of a run."""

    run: RunSettings = Field(default_factory=RunSettings)
    data: DataSettings = Field(default_factory=DataSettings)
    model: ModelSettings = Field(default_factory=ModelSettings)
    batch: BatchSettings = Field(default_factory=BatchSettings)
    noise: NoiseSettings = Field(default_factory=NoiseSettings)
    optimizer: OptimizerSettings = Field(default_factory=OptimizerSettings)
    schedule: ScheduleSettings = Field(default_factory=ScheduleSettings)
    precision: PrecisionSettings = Field(default_factory=PrecisionSettings)
    comm: CommSettings = Field(default_factory=CommSettings)
    evaluation: EvaluationSettings = Field(default_factory=EvaluationSettings)
    checkpoint: CheckpointSettings = Field(default_factory=CheckpointSettings)
    metrics: MetricsSettings = Field(default_factory=MetricsSettings)

    @property
    def run_directory(self) -> Path:
        """The run's own directory, unless the command names another."""
        return self.run.directory / self.run.name

    @property
    def recomputes_statistics(self) -> bool:
        """Whether norm statistics for evaluation are recomputed from training data."""
        if self.model.norm in ("group", "none"):
            return False
        if self.model.norm_statistics == "auto":
            return self.noise.method != "none"
        return self.model.norm_statistics == "recomputed"
