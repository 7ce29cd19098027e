"""The settings of a run, section by section."""

from __future__ import annotations

import os
from pathlib import Path
from typing import Annotated, Any, Literal

from pydantic import AfterValidator, Field, NonNegativeFloat, NonNegativeInt, PositiveFloat, PositiveInt

from dist_train.config.parts import (
    AtLeastTwo,
    AveragingSettings,
    Beta,
    DataSettings,
    EarlyStoppingSettings,
    Fraction,
    NoiseSettings,
    RegularizationSettings,
    Section,
    UserPath,
    options_of,
)
from dist_train.config.plugins import Options, PluginName

Device = Literal["auto", "cpu", "cuda"]


class RunSettings(Section):
    """The run's name, place and length."""

    name: str = Field("run", pattern=r"^[A-Za-z0-9][A-Za-z0-9._-]*$", examples=["lb-noise"])
    """Name of the run's directory."""
    directory: UserPath = Field(Path("runs"), examples=["/scratch/runs"])
    """Folder that holds the run directories."""
    seed: NonNegativeInt = Field(0, examples=[1])
    """Seed of all randomness."""
    device: Device = "auto"
    """Where the ranks compute. auto: on GPUs if there are any; GPUs that torch cannot use are an error, not a run on
    the CPU. Decided when a run begins, and kept on a resume.
    """
    epochs: PositiveInt = Field(10, le=10**9, examples=[30])
    """Passes over the training data; schedules span all of them. A finished run can be resumed with more epochs:
    schedules then span the new total.
    """
    max_steps: PositiveInt | None = Field(None, le=10**9, examples=[100])
    """End the run after this many updates in all, as finished, with an evaluation and a checkpoint; schedules still
    span `epochs`. A larger number continues it; null: all epochs.
    """
    profile_steps: NonNegativeInt = Field(0, examples=[5])
    """Number of updates to trace with the profiler."""
    stop_signal: Literal["SIGUSR1", "SIGUSR2", "SIGHUP"] = "SIGUSR2"
    """A further signal that makes the run save and stop: SIGTERM, SIGINT, SIGHUP and SIGUSR2 always do."""
    resume: Annotated[str, AfterValidator(os.path.expanduser)] = Field(
        "auto", examples=["runs/other/checkpoints/step-00000040.pt"]
    )
    """auto: resume from the last checkpoint, if any. never: start from the beginning, and refuse a folder that holds
    checkpoints. Or the path of a checkpoint, or of a run, whose last checkpoint is used, or RUN@STEP or RUN@best: of
    another run, since a run resumes from its own last checkpoint only.
    """
    init_from: UserPath | None = Field(None, examples=["runs/other"])
    """Source of a new run's weights and norm statistics: a run (its last checkpoint), RUN@STEP, RUN@best, a checkpoint,
    a .safetensors, .pth or .ckpt file, or torchvision:NAME for torchvision's weights in torch.hub's cache; null: random
    weights from the seed.
    """


class ModelSettings(Section):
    """The network and its norms."""

    name: Literal["vgg9", "vgg16", "vgg19", "resnet18", "resnet50"] | PluginName = "vgg9"
    """vgg9: from Li et al. (arXiv 1712.09913), 2.8 million parameters on CIFAR-10. vgg16, vgg19: without hidden linear
    layers. resnet18, resnet50: torchvision's blocks, with a small stem for images up to 64 pixels. torchvision:NAME,
    timm:NAME: models of those libraries, with their norms replaced by `norm`.
    """
    options: Options = options_of("model.name")
    width: PositiveFloat = Field(1.0, examples=[0.25])
    """Factor on the number of channels."""
    norm: Literal["batch", "ghost", "sync", "group", "none"] = "ghost"
    """batch: over a micro-batch. ghost: over groups of `ghost_size` samples. sync: over a micro-batch that all ranks
    share. group: over groups of channels of each sample.
    """
    ghost_size: AtLeastTwo = Field(128, examples=[64])
    """Samples that ghost norm normalizes together."""
    channel_groups: PositiveInt = Field(32, examples=[16])
    """Maximum number of groups in group norm; the number used divides the channels."""
    norm_statistics: Literal["auto", "running", "recomputed"] = "auto"
    """Norm statistics for evaluation. running: averages collected during training. recomputed: from training data with
    the clean weights. auto: recomputed if noise is on.
    """
    norm_samples: AtLeastTwo = Field(2048, examples=[4096])
    """Training samples from which norm statistics are recomputed."""


class BatchChange(Section):
    """A change of the global batch size."""

    epoch: PositiveInt = Field(examples=[60])
    """Passes over the data before the change."""
    global_size: PositiveInt = Field(examples=[8192])
    """Samples per update from then on."""


class BatchSettings(Section):
    """The global batch and its division into micro-batches."""

    global_size: PositiveInt = Field(8192, examples=[1024])
    """Samples per update, over all ranks."""
    micro_size: PositiveInt | Literal["auto"] = Field("auto", examples=[256])
    """Samples per forward and backward pass. auto: the largest power of two that fits the memory of every rank, at most
    128 on CPUs, 2048 on GPUs, and a rank's even share of the batch; a little less if a norm could not normalize the
    last micro-batch. Decided when a run begins, and halved if an update runs out of memory.
    """
    dealing: Literal["auto", "even", "measured", "dynamic"] = "auto"
    """How micro-batches are distributed over ranks. even: equally. measured: by each rank's measured speed. dynamic:
    each rank takes the next one when it is done with the one before, on CPUs only. auto: dynamic if all ranks are on
    the CPUs of one node, have sixteen micro-batches or more each, and use torch.distributed and exact sums; else even.
    """
    schedule: tuple[BatchChange, ...] = Field((), examples=[[{"epoch": 60, "global_size": 2048}]])
    """Changes of the global batch size during the run, as in Smith et al. (arXiv 1711.00489): each {epoch, global_size}
    takes effect after that many passes. schedule.scaling uses the initial `global_size` alone.
    """

    @property
    def sizes(self) -> tuple[tuple[int, int], ...]:
        """Every global batch size of the run, as pairs of its first epoch and the size."""
        return ((0, self.global_size), *((change.epoch, change.global_size) for change in self.schedule))


class LossSettings(Section):
    """What training minimizes. Evaluations measure cross entropy, whatever it is."""

    name: Literal["cross_entropy"] | PluginName = Field("cross_entropy", examples=["mine.py:focal"])
    """cross_entropy: with `regularization.label_smoothing`. Any other is a plug-in's."""
    options: Options = options_of("loss.name")


class OptimizerSettings(Section):
    """The update rule."""

    name: Literal["sgd", "adam", "adamw", "lars", "lamb"] | PluginName = "sgd"
    """sgd: with momentum. adam: weight decay added to the gradient; adamw: decoupled from it. lars, lamb: timm's, with
    layer-wise adaptive rates for large batches; lamb clips by `clip_norm` alone.
    """
    options: Options = options_of("optimizer.name")
    learning_rate: NonNegativeFloat = Field(0.1, examples=[0.05])
    """Learning rate; `schedule.scaling` multiplies it for larger batches."""
    momentum: Beta = Field(0.9, examples=[0.95])
    """Momentum of sgd and lars."""
    nesterov: bool = True
    """Nesterov momentum (sgd only)."""
    betas: tuple[Beta, Beta] = Field((0.9, 0.999), examples=[[0.9, 0.98]])
    """Decay of the moments of adam, adamw and lamb."""
    epsilon: PositiveFloat = Field(1e-8, examples=[1e-06])
    """Added to denominators by adam, adamw and lamb."""
    trust: PositiveFloat = Field(0.001, examples=[0.01])
    """Trust coefficient of lars."""
    weight_decay: NonNegativeFloat = Field(0.0, examples=[0.0005])
    """Weight decay, except for weights in `exclude`."""
    exclude: tuple[str, ...] = Field(("norm", "bias"), examples=[["norm"]])
    """Weights without weight decay and layer-wise adaptation: norm, bias, or patterns of names."""
    clip_norm: PositiveFloat | None = Field(None, examples=[1.0])
    """Clip the global gradient to this norm; null: no clipping."""


class ScheduleSettings(Section):
    """The learning-rate schedule."""

    scaling: Literal["none", "linear", "sqrt"] = "none"
    """How the learning rate is scaled for the global batch. linear: by global_size / base_batch. sqrt: by its square
    root.
    """
    base_batch: PositiveInt = Field(128, examples=[256])
    """Global batch size for which `optimizer.learning_rate` is meant."""
    warmup_epochs: NonNegativeFloat = Field(0.0, examples=[5.0])
    """Epochs in which the learning rate rises linearly from `optimizer.learning_rate`, not from 0, to the scaled rate.
    With scaling none it stays constant meanwhile; decay begins afterwards.
    """
    keep_updates: bool = False
    """Make as many updates as with a global batch of `base_batch` (Hoffer et al., arXiv 1705.08741): an epoch of
    `run.epochs`, of warm-up and of milestones has the number of updates that it would have at that batch size. An epoch
    of records, evaluations, checkpoints and averaging stays a pass over the data, of which there are then more.
    """
    decay: Literal["constant", "step", "cosine", "poly", "exponential"] | PluginName = "constant"
    """How the learning rate decays after warm-up. step: by `factor` at `milestones`. cosine: to 0. poly: as (1 -
    x)^`power`, where x is the fraction of the time after warm-up. exponential: as `final_fraction`^x.
    """
    options: Options = options_of("schedule.decay")
    milestones: tuple[PositiveFloat, ...] = Field((), examples=[[150, 225]])
    """Epochs at which a step decay applies `factor`."""
    factor: Fraction = Field(0.1, examples=[0.2])
    """Factor of a step decay."""
    power: PositiveFloat = Field(2.0, examples=[1.0])
    """Exponent of a polynomial decay."""
    final_fraction: PositiveFloat = Field(0.01, examples=[0.001])
    """Final learning rate of an exponential decay, as a fraction of the peak; above 1 the rate rises."""


class PrecisionSettings(Section):
    """Number formats and kernels."""

    compute: Literal["float32", "bfloat16", "float16"] = "float32"
    """Precision of forward and backward passes. float16: on GPUs only, with loss scaling."""
    channels_last: bool = True
    """Images in channels-last layout: faster convolutions."""
    compile: bool = False
    """Compile the model with torch.compile."""
    cuda_graphs: bool = Field(False, examples=[True])
    """Replay all micro-batches of a rank but its last as CUDA graphs: bit-identical, with far fewer launches by the
    host, and a second micro-batch's activations in memory.
    """
    tf32: bool = False
    """Allow TF32 in float32 convolutions and matrix products on a GPU."""
    deterministic: bool | Literal["auto"] = Field("auto", examples=[True])
    """Use deterministic kernels only; auto: on a GPU, unless comm.reduction is float."""
    threads: PositiveInt | Literal["auto"] = Field("auto", examples=[2])
    """CPU threads per rank; auto: OMP_NUM_THREADS, or else an equal share of the cores."""


Engine = Literal["auto", "horovod", "torch"]


class CommSettings(Section):
    """Communication between the ranks."""

    engine: Engine = "auto"
    """Communication library. auto: Horovod under horovodrun and mpirun, and under srun if it is installed; otherwise
    torch.distributed.
    """
    reduction: Literal["exact", "exact32", "exact16", "float"] = Field("exact", examples=["exact32"])
    """How gradients are summed. exact: as 64-bit integers, bit-identical on any number of ranks. exact32: likewise as
    32-bit integers, which need no more bytes than float. exact16: an experiment, likewise at the bytes of fp16, with
    errors of about 1 %. float: as floats.
    """
    compression: Literal["none", "fp16"] = "none"
    """Send gradients as float16, at a power-of-two scale that follows their size (only with reduction float)."""
    op: Literal["average", "adasum"] = "average"
    """How the ranks' gradients are combined. adasum: only with reduction float; GPUs of one node are averaged.
    Horovod's DistributedOptimizer combines the optimizer's updates instead.
    """
    verify_every: NonNegativeInt = Field(100, examples=[10])
    """Steps between checks that ranks hold the same weights and noise, also made before each checkpoint; 0: none."""
    timeout: Annotated[float, Field(ge=5)] = Field(60.0, examples=[300.0])
    """Seconds of silence after which a rank counts as lost: the run then ends or, with launch.min_ranks, continues
    without it.
    """

    @property
    def is_exact(self) -> bool:
        """Whether gradients are summed as integers."""
        return self.reduction != "float"


class LaunchSettings(Section):
    """How `dist-train launch` handles lost ranks. Its options take precedence; other launchers ignore this section."""

    min_ranks: PositiveInt | None = Field(None, examples=[2])
    """Continue without lost ranks while at least this many are left; null: as many as the run begins with."""
    max_ranks: PositiveInt | None = Field(None, examples=[8])
    """Maximum number of ranks; null: as many as the run begins with."""
    restarts: NonNegativeInt = Field(0, examples=[3])
    """How often the process of each lost rank is started again."""


class EvaluationSettings(Section):
    """When and how the model is evaluated."""

    every_epochs: NonNegativeInt = Field(1, examples=[5])
    """Epochs between evaluations; 0: at the end only."""
    batch_size: PositiveInt = Field(500, examples=[1000])
    """Samples per forward pass."""
    train_samples: NonNegativeInt = Field(10000, examples=[0])
    """Number of training samples to evaluate besides the test set; 0: none."""


class CheckpointSettings(Section):
    """When checkpoints are saved, and which are kept."""

    every_epochs: NonNegativeInt = Field(1, examples=[10])
    """Epochs between checkpoints; 0: at the end only."""
    every_steps: PositiveInt | None = Field(None, examples=[500])
    """Updates between additional checkpoints; null: none."""
    keep: PositiveInt = Field(3, examples=[1])
    """How many of the latest checkpoints to keep."""
    keep_best: bool = True
    """Also keep the one with the best accuracy on the validation split, or else on the test split."""
    background: bool = True
    """Write checkpoints while training continues."""
    fallback_directory: UserPath | None = Field(None, examples=["/scratch/me"])
    """Folder on another disk, for the last checkpoint and the latest records if the run directory's disk is full or
    fails; a resume reads them from there.
    """


class LoggerSettings(Section):
    """A logger of the run's records."""

    name: Literal["tensorboard", "trackio", "wandb", "mlflow"] | PluginName
    """A library, or an `Observer` of your own: `package.module:name`, `FILE.py:name`."""
    options: Options = Field({}, examples=[{"project": "large-batch"}])
    """Settings of the logger."""


class MetricsSettings(Section):
    """The Prometheus exporter, loggers, and how often records are written. Secrets are given as files, since settings
    are saved with the run.
    """

    enabled: bool = True
    """Serve metrics to Prometheus during the run. If false, and the run has no loggers or callbacks, its ranks are not
    measured: there is no `ranks.json`.
    """
    host: str = Field("127.0.0.1", examples=["0.0.0.0"])  # nosec B104
    """Address to listen at; 0.0.0.0: every address of the node."""
    port: Annotated[int, Field(ge=0, le=65535)] = Field(9810, examples=[0])
    """Port to listen at, or the next free one above it; 0: any free port."""
    ranks: Literal["first", "all"] = "first"
    """Which ranks serve metrics. first: rank 0, for the run. all: every rank, also its own."""
    every_steps: PositiveInt = Field(1, examples=[10])
    """Steps between training records."""
    token_file: UserPath | None = Field(None, examples=["/home/me/metrics.token"])
    """File with the bearer token that a scrape must send."""
    password_file: UserPath | None = Field(None, examples=["/home/me/metrics.password"])
    """File with user:password that a scrape must send."""
    certificate_file: UserPath | None = Field(None, examples=["/home/me/metrics.crt"])
    """TLS certificate (PEM), with its chain; null: plain HTTP."""
    key_file: UserPath | None = Field(None, examples=["/home/me/metrics.key"])
    """Private key (PEM) of the TLS certificate."""
    targets_directory: UserPath | None = Field(None, examples=["/shared/targets"])
    """Folder where Prometheus looks for targets (file_sd): the run is listed there, with its outcome for a day after
    its end.
    """
    advertised_host: str | None = Field(None, examples=["node7.example.org"])
    """Host in the target file; null: the node's name, or `host` if that is a single address."""
    pushgateway: str | None = Field(None, pattern=r"^https?://", examples=["http://pushgateway:9091"])
    """URL of a Pushgateway to which the last values are pushed, for short runs."""
    last_scrape_seconds: float = Field(20.0, ge=0, le=300, examples=[60.0])
    """At the end of a run that is being scraped: longest wait for a scrape of the last values."""
    loggers: tuple[LoggerSettings, ...] = Field((), examples=[[{"name": "trackio"}]])
    """Further loggers of the run's records, on rank 0."""


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
    loss: LossSettings = Field(default_factory=LossSettings)
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
        """The run's directory, unless the command line names another."""
        return self.run.directory / self.run.name

    def value(self, path: str) -> Any:
        """Return the setting at the dotted `path`, section.key."""
        section, name = path.split(".")
        return getattr(getattr(self, section), name)

    @property
    def stopping_metric(self) -> str:
        """The metric of early stopping, as SPLIT.accuracy or SPLIT.loss."""
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
