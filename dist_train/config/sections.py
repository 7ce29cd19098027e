"""The settings of a run, section by section."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated, Literal

from pydantic import Field, PositiveInt

from dist_train.config.parts import (
    Beta,
    DataSettings,
    Fraction,
    NonNegativeFloat,
    NonNegativeInt,
    PositiveFloat,
    Section,
    options_of,
)
from dist_train.config.plugins import Options, PluginName
from dist_train.config.regularization import (
    AveragingSettings,
    EarlyStoppingSettings,
    NoiseSettings,
    RegularizationSettings,
)

Device = Literal["auto", "cpu", "cuda"]


class RunSettings(Section):
    """The run's name, place and length."""

    name: str = Field(
        "run",
        pattern=r"^[A-Za-z0-9][A-Za-z0-9._-]*$",
        description="Name of the run's directory.",
        examples=["lb-noise"],
    )
    directory: Path = Field(
        Path("runs"), description="Folder that holds the run directories.", examples=["/scratch/runs"]
    )
    seed: NonNegativeInt = Field(0, description="All randomness is a function of it.", examples=[1])
    device: Device = Field(
        "auto",
        description="Where the ranks compute. auto: on the GPUs, where there are any; GPUs that torch cannot use are "
        "an error, not a run on the CPU. Decided when a run begins, and kept on a resume.",
    )
    epochs: PositiveInt = Field(
        10,
        description="Passes over the training data; schedules are laid out over them. A run that has made all of its "
        "passes may be resumed with more: schedules are then laid out anew.",
        examples=[30],
    )
    max_steps: PositiveInt | None = Field(None, description="Stop after this many updates.", examples=[100])
    profile_steps: NonNegativeInt = Field(0, description="Updates of which a profiler trace is written.", examples=[5])
    stop_signal: Literal["SIGUSR1", "SIGUSR2", "SIGHUP"] = Field(
        "SIGUSR2", description="Signal that asks the run to save and stop, beside SIGTERM, SIGINT and SIGUSR2."
    )
    resume: str = Field(
        "auto",
        description="auto: resume from the last checkpoint, if any. never: start anew. Or the path of a checkpoint, or "
        "of a run: its last one.",
        examples=["runs/other/checkpoints/step-00000040.pt"],
    )
    init_from: Path | None = Field(
        None,
        description="What a new run's weights and norm statistics are: those of a run (its last checkpoint), of a "
        "checkpoint, of a .safetensors or .pth file, or torchvision's (torchvision:NAME) in torch.hub's cache; none: "
        "those of the seed.",
        examples=["runs/other"],
    )


class ModelSettings(Section):
    """The network and its norms."""

    name: Literal["vgg9", "vgg16", "vgg19", "resnet18", "resnet50"] | PluginName = Field(
        "vgg9",
        description="vgg9: of Li et al. (arXiv 1712.09913), 2.8 million parameters on CIFAR-10. vgg16, vgg19: without "
        "hidden linear layers. resnet18, resnet50: torchvision's blocks, a small stem for images up to 64 pixels. "
        "torchvision:NAME, timm:NAME: models of those libraries, with the norm that is set here.",
    )
    options: Options = options_of("model.name")
    width: PositiveFloat = Field(1.0, description="Factor on the number of channels.", examples=[0.25])
    norm: Literal["batch", "ghost", "sync", "group", "none"] = Field(
        "ghost",
        description="batch: over a micro-batch. ghost: over groups of `ghost_size` samples. "
        "sync: over a micro-batch that all ranks share. group: over groups of channels of each sample.",
    )
    ghost_size: Annotated[int, Field(ge=2)] = Field(
        128, description="Samples that ghost norm normalizes together.", examples=[64]
    )
    channel_groups: PositiveInt = Field(
        32, description="Groups of channels of group norm, where they divide.", examples=[16]
    )
    norm_statistics: Literal["auto", "running", "recomputed"] = Field(
        "auto",
        description="Statistics for evaluation: running averages of the training's, or recomputed from training "
        "data with the clean weights. auto: recomputed where noise is on.",
    )
    norm_samples: Annotated[int, Field(ge=2)] = Field(
        2048,
        description="Training samples that recomputed statistics are taken from.",
        examples=[4096],
    )


class BatchChange(Section):
    """Another global batch from an epoch on."""

    epoch: PositiveInt = Field(description="Passes over the data before it begins.", examples=[60])
    global_size: PositiveInt = Field(description="Samples of one update from then on.", examples=[8192])


class BatchSettings(Section):
    """The global batch and how it is cut."""

    global_size: PositiveInt = Field(8192, description="Samples of one update, over all ranks.", examples=[1024])
    micro_size: PositiveInt | Literal["auto"] = Field(
        "auto",
        description="Samples of one forward and backward pass; auto: what fits the device.",
        examples=[256],
    )
    dealing: Literal["even", "measured"] = Field(
        "even",
        description="How many micro-batches a rank computes. even: all as many. measured: by its speed, as measured.",
    )
    schedule: tuple[BatchChange, ...] = Field(
        (),
        description="Other global batches later in the run, as in Smith et al. (arXiv 1711.00489): each {epoch, "
        "global_size} holds from that many passes on. schedule.scaling is by `global_size` alone.",
        examples=[[{"epoch": 60, "global_size": 2048}]],
    )

    @property
    def sizes(self) -> tuple[tuple[int, int], ...]:
        """Every global batch of the run, with the epoch that it begins with."""
        return ((0, self.global_size), *((change.epoch, change.global_size) for change in self.schedule))


class OptimizerSettings(Section):
    """The update rule."""

    name: Literal["sgd", "adam", "adamw", "lars", "lamb"] | PluginName = Field(
        "sgd",
        description="sgd: with momentum. adam: weight decay within the gradient; adamw: apart from it. lars, lamb: "
        "rates adapted layer by layer, for large batches.",
    )
    options: Options = options_of("optimizer.name")
    learning_rate: NonNegativeFloat = Field(0.1, description="Rate at `schedule.base_batch`.", examples=[0.05])
    momentum: Annotated[float, Field(ge=0, lt=1)] = Field(0.9, description="Momentum of sgd and lars.", examples=[0.95])
    nesterov: bool = Field(True, description="Nesterov's momentum, of sgd.")
    betas: tuple[Beta, Beta] = Field(
        (0.9, 0.999), description="Decay of the moments of adam, adamw and lamb.", examples=[[0.9, 0.98]]
    )
    epsilon: PositiveFloat = Field(1e-8, description="Added to denominators by adam, adamw and lamb.", examples=[1e-06])
    trust: PositiveFloat = Field(0.001, description="Trust coefficient of lars.", examples=[0.01])
    weight_decay: NonNegativeFloat = Field(
        0.0, description="Decay of the weights that `exclude` does not name.", examples=[0.0005]
    )
    exclude: tuple[str, ...] = Field(
        ("norm", "bias"),
        description="Weights kept free of weight decay and layer-wise adaptation: norm, bias, or patterns of names.",
        examples=[["norm"]],
    )
    clip_norm: PositiveFloat | None = Field(None, description="Largest norm of the global gradient.", examples=[1.0])


class ScheduleSettings(Section):
    """The learning rate over the run."""

    scaling: Literal["none", "linear", "sqrt"] = Field(
        "none", description="Factor for the global batch: (global_size / base_batch), or its square root."
    )
    base_batch: PositiveInt = Field(
        128, description="Global batch that `optimizer.learning_rate` is meant for.", examples=[256]
    )
    warmup_epochs: NonNegativeFloat = Field(
        0.0, description="Epochs in which the rate rises from the unscaled one.", examples=[5.0]
    )
    keep_updates: bool = Field(
        False,
        description="As many updates as at `base_batch`: an epoch of the run, of its warm-up and milestones, has the "
        "updates that it would have there (Hoffer et al., arXiv 1705.08741).",
    )
    decay: Literal["constant", "step", "cosine", "poly", "exponential"] | PluginName = Field(
        "constant",
        description="How the rate falls after the warm-up. step: by `factor` at `milestones`. cosine: to 0. poly: as "
        "(1 - x)^`power`, x the fraction of the time after warm-up. exponential: as `final_fraction`^x.",
    )
    options: Options = options_of("schedule.decay")
    milestones: tuple[PositiveFloat, ...] = Field(
        (), description="Epochs at which a step decay applies `factor`.", examples=[[150, 225]]
    )
    factor: Fraction = Field(0.1, description="Factor of a step decay.", examples=[0.2])
    power: PositiveFloat = Field(2.0, description="Exponent of a polynomial decay.", examples=[1.0])
    final_fraction: PositiveFloat = Field(
        0.01,
        description="Where an exponential decay ends, as a fraction of the peak; above 1 the rate rises.",
        examples=[0.001],
    )


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
        description="Only kernels that give the same bits each time; auto: on a GPU, unless comm.reduction is float.",
        examples=[True],
    )
    threads: PositiveInt | Literal["auto"] = Field(
        "auto",
        description="CPU threads of a rank; auto: OMP_NUM_THREADS, else the cores shared out.",
        examples=[2],
    )


Engine = Literal["auto", "horovod", "torch"]


class CommSettings(Section):
    """What the ranks say to each other."""

    engine: Engine = Field(
        "auto",
        description="What carries the ranks. auto: Horovod under horovodrun and mpirun, and under srun where it is "
        "installed; else torch.distributed.",
    )
    reduction: Literal["exact", "exact32", "float"] = Field(
        "exact",
        description="exact: gradients summed as 64-bit integers, the same bits on any number of ranks. exact32: as "
        "32-bit integers, likewise, at float's bytes.",
        examples=["exact32"],
    )
    compression: Literal["none", "fp16"] = Field("none", description="Gradients sent as float16 (float only).")
    op: Literal["average", "adasum"] = Field(
        "average", description="How ranks' gradients combine (adasum: float only)."
    )
    verify_every: NonNegativeInt = Field(100, description="Steps between agreement checks; 0: none.", examples=[10])
    timeout: Annotated[float, Field(ge=5)] = Field(
        60.0,
        description="Seconds within which the run ends when a rank does not answer.",
        examples=[300.0],
    )

    @property
    def is_exact(self) -> bool:
        """Whether gradients are summed as integers."""
        return self.reduction != "float"


class LaunchSettings(Section):
    """How `dist-train launch` treats lost ranks; its options win, and under other launchers none of it counts."""

    min_ranks: PositiveInt | None = Field(
        None,
        description="Continue without lost ranks while so many are left; none: all that the run begins with.",
        examples=[2],
    )
    max_ranks: PositiveInt | None = Field(
        None, description="Take so many ranks at most; none: as many as the run begins with.", examples=[8]
    )
    restarts: NonNegativeInt = Field(
        0, description="Start the process of a lost rank anew, up to so many times each.", examples=[3]
    )


class EvaluationSettings(Section):
    """When and how the model is evaluated."""

    every_epochs: NonNegativeInt = Field(1, description="Epochs between evaluations; 0: at the end only.", examples=[5])
    batch_size: PositiveInt = Field(500, description="Samples of one forward pass.", examples=[1000])
    train_samples: NonNegativeInt = Field(
        10000, description="Training samples evaluated beside the test set.", examples=[0]
    )


class CheckpointSettings(Section):
    """When the run is saved, and what is kept."""

    every_epochs: NonNegativeInt = Field(
        1, description="Epochs between checkpoints; 0: at the end only.", examples=[10]
    )
    every_steps: PositiveInt | None = Field(None, description="Also after every so many updates.", examples=[500])
    keep: PositiveInt = Field(3, description="Checkpoints kept, the last ones.", examples=[1])
    keep_best: bool = Field(
        True, description="Also keep the one with the best accuracy on the validation split, else on the test split."
    )
    background: bool = Field(True, description="Write while training continues.")
    fallback_directory: Path | None = Field(
        None,
        description="Folder on another disk for the last checkpoint that the run directory's disk refuses; "
        "a resume takes it from there.",
        examples=["/scratch/me"],
    )


class LoggerSettings(Section):
    """A logger of the run's records."""

    name: Literal["tensorboard", "trackio", "wandb", "mlflow"] | PluginName = Field(
        description="A library, or an `Observer` of your own: `package.module:name`, `FILE.py:name`."
    )
    options: Options = Field(
        default_factory=dict, description="Its own settings.", examples=[{"project": "large-batch"}]
    )


class MetricsSettings(Section):
    """The Prometheus exporter and the pace of reports. Secrets are named as files: settings are saved with the run."""

    enabled: bool = Field(True, description="Serve metrics to Prometheus while the run lasts.")
    host: str = Field(
        "127.0.0.1",
        description="Address to serve at; 0.0.0.0: every address of the node.",
        examples=["0.0.0.0"],  # nosec B104
    )
    port: Annotated[int, Field(ge=0, le=65535)] = Field(
        9810,
        description="The next free one from here; 0: any free port.",
        examples=[0],
    )
    ranks: Literal["first", "all"] = Field(
        "first", description="Who serves metrics. first: rank 0, those of the run. all: every rank its own too."
    )
    every_steps: PositiveInt = Field(1, description="Steps between training records.", examples=[10])
    token_file: Path | None = Field(
        None, description="File with the bearer token that a scrape must bring.", examples=["/home/me/metrics.token"]
    )
    password_file: Path | None = Field(
        None, description="File with user:password that a scrape must bring.", examples=["/home/me/metrics.password"]
    )
    certificate_file: Path | None = Field(
        None, description="TLS certificate (PEM), with its chain; none: plain HTTP.", examples=["/home/me/metrics.crt"]
    )
    key_file: Path | None = Field(
        None, description="Private key (PEM) of the TLS certificate.", examples=["/home/me/metrics.key"]
    )
    targets_directory: Path | None = Field(
        None,
        description="Folder where Prometheus looks for targets (file_sd); lists the run, and for a day how it ended.",
        examples=["/shared/targets"],
    )
    advertised_host: str | None = Field(
        None,
        description="Host in the target file; none: the node's name, or `host` where that is one address.",
        examples=["node7.example.org"],
    )
    pushgateway: str | None = Field(
        None,
        pattern=r"^https?://",
        description="URL of a Pushgateway that takes the last values, for short runs.",
        examples=["http://pushgateway:9091"],
    )
    last_scrape_seconds: NonNegativeFloat = Field(
        20.0,
        description="Longest wait, at the end of a run that is being scraped, for a scrape of the last values.",
        examples=[60.0],
    )
    tensorboard: bool = Field(False, description="Write TensorBoard's event files into the run directory too.")
    loggers: tuple[LoggerSettings, ...] = Field(
        (), description="Where records go besides, from rank 0.", examples=[[{"name": "trackio"}]]
    )

    @property
    def writes_tensorboard(self) -> bool:
        """Whether TensorBoard's event files are written."""
        return self.tensorboard or any(logger.name == "tensorboard" for logger in self.loggers)


class Config(Section):
    """All settings of a run, by section; frozen, and checked as a whole by `load_config`.

    docs/settings.md lists every setting with its range, default and meaning.

    Examples:
        >>> config = dist_train.load_config("dist_train:configs/demo.yaml")
        >>> config.noise.method, config.run_directory.name
        ('smoothout', 'demo')
    """

    run: RunSettings = Field(default_factory=RunSettings)
    data: DataSettings = Field(default_factory=DataSettings)
    model: ModelSettings = Field(default_factory=ModelSettings)
    batch: BatchSettings = Field(default_factory=BatchSettings)
    noise: NoiseSettings = Field(default_factory=NoiseSettings)
    optimizer: OptimizerSettings = Field(default_factory=OptimizerSettings)
    schedule: ScheduleSettings = Field(default_factory=ScheduleSettings)
    regularization: RegularizationSettings = Field(default_factory=RegularizationSettings)
    averaging: AveragingSettings = Field(default_factory=AveragingSettings)
    precision: PrecisionSettings = Field(default_factory=PrecisionSettings)
    comm: CommSettings = Field(default_factory=CommSettings)
    launch: LaunchSettings = Field(default_factory=LaunchSettings)
    evaluation: EvaluationSettings = Field(default_factory=EvaluationSettings)
    early_stopping: EarlyStoppingSettings = Field(default_factory=EarlyStoppingSettings)
    checkpoint: CheckpointSettings = Field(default_factory=CheckpointSettings)
    metrics: MetricsSettings = Field(default_factory=MetricsSettings)

    @property
    def run_directory(self) -> Path:
        """The run's own directory, unless the command names another."""
        return self.run.directory / self.run.name

    @property
    def stopping_metric(self) -> str:
        """What early stopping looks at, as SPLIT.accuracy or SPLIT.loss."""
        default = "test.accuracy" if self.data.validation_size is None else "validation.accuracy"
        return self.early_stopping.metric or default

    def measures(self, metric: str) -> bool:
        """Whether evaluations of the run measure `metric`, SPLIT.accuracy or SPLIT.loss."""
        split, _, _ = metric.partition(".")
        measured = {
            "train": self.evaluation.train_samples > 0,
            "validation": self.data.validation_size is not None,
            "test": True,
        }
        is_averaged = split.endswith("-averaged")
        return measured[split.removesuffix("-averaged")] and not (is_averaged and self.averaging.kind == "none")

    @property
    def recomputes_statistics(self) -> bool:
        """Whether norm statistics for evaluation are recomputed from training data."""
        if self.model.norm in ("group", "none"):
            return False
        if self.model.norm_statistics == "auto":
            return self.noise.method != "none"
        return self.model.norm_statistics == "recomputed"
