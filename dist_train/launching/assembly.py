"""Builds everything that a run needs, in order: device, data, model, noise, reduction, trainer."""

from __future__ import annotations

import logging
import os
import traceback
from collections.abc import Callable, Collection, Iterator
from contextlib import ExitStack, contextmanager, nullcontext
from functools import partial
from pathlib import Path

import torch
from torch import nn

import dist_train
from dist_train.checkpoint.state import (
    InitialWeights,
    Progress,
    TrainState,
    load_model,
    read_initial,
    restored_progress,
)
from dist_train.checkpoint.writer import CheckpointWriter
from dist_train.cluster.communicator import (
    Communicator,
    Generation,
    SingleProcess,
    broadcast_value,
    gather_int,
    run_long_on_all_ranks,
    run_on_all_ranks,
)
from dist_train.cluster.devices import assign_devices
from dist_train.config import Config
from dist_train.config.plugins import is_plugin, plugin_files
from dist_train.config.resuming import with_device, with_setting
from dist_train.data.augmentation import build_mix
from dist_train.data.loader import SampleSource, open_splits
from dist_train.data.plan import BatchPlan, check_shared_micro_batches
from dist_train.launching.preflight import ResumePoint
from dist_train.launching.session import Session
from dist_train.models import Loss, build_loss, build_model, check_training, restoring_buffers, runs_sequentials_whole
from dist_train.models.norms import BatchStatistics, fuse_relus, norm_modules, restoring_parameters
from dist_train.optim.averaging import Averaging
from dist_train.optim.flat_weights import FlatWeights, check_memory
from dist_train.optim.noise import Noise, SmoothOut, build_noise
from dist_train.optim.optimizers import PluginUpdates, build_optimizer
from dist_train.optim.schedules import LearningRate
from dist_train.outcome import CodedError, UsageError
from dist_train.reproducible import LayerRng
from dist_train.rundir.epochs import Epochs
from dist_train.rundir.metrics_file import digest_of_initial_weights
from dist_train.rundir.paths import RunDirectory
from dist_train.training.compute import (
    Compute,
    LossScale,
    compiled,
    fitting_memory,
    is_out_of_memory,
    set_up_compute,
)
from dist_train.training.consistency import check_same_data, setup_digests
from dist_train.training.graphs import CudaGraphRecorder, GraphRecorder
from dist_train.training.measuring import Measuring, Profiler, StepClock, WeightNorms, usage_reader
from dist_train.training.micro_batches import (
    fewest_samples,
    find_micro_size,
    forward_and_backward,
    sum_for_sync_norm,
    sums_floats,
)
from dist_train.training.recovery import ElasticTrainer
from dist_train.training.reduction import Tally, set_up_reduction
from dist_train.training.step import TrainingStep
from dist_train.training.stopping import StopRequests, job_time_limit, why_stop_early
from dist_train.training.trainer import Trainer

_logger = logging.getLogger("dist_train.training")

_LOST_NOISE = 0.01  # a run warns if more than this share of the weights is left without noise
_TRIED_STEPS = 100  # of a run, to find where the noise is strongest
_OLD_SHARE = 0.01  # a run warns if its average consists of its first weights to more than this share
_LACKING_SHARE = 0.1  # a run warns if more than this share of its training images is of classes that it never evaluates


def assemble(
    resume_point: ResumePoint,
    session: Session,
    stop: StopRequests,
    *,
    given: Config | None = None,
    regroup: Callable[[ElasticTrainer, Generation], None] = lambda trainer, generation: None,
    stack: ExitStack | None = None,
) -> Trainer:
    """Build the trainer of a run, at the beginning or where the checkpoint of rank 0's `resume_point` left off.

    `resume_point`: with the same settings on all ranks.
    `given`: the settings before any was decided, by which ranks that join are compared, and `auto` may shrink.
    `stack`: closes the data also if no trainer is built, since a notebook lives on.

    Raises UsageError if the device, the data, the model or the batch do not fit, or the checkpoint is from another
    model or from a run that cannot be lengthened yet.
    """
    directory, comm = session.directory, session.comm
    config, compute = _set_up_device(resume_point.config, comm)
    open_data = partial(open_splits, config.data, config.run.seed, compute.device, config.precision.channels_last)
    splits = run_long_on_all_ranks(comm, open_data, "load the data")
    check_same_data(comm, splits.identity, config.data.name)
    if stack is not None:
        stack.callback(splits.close)
    epochs, scheduled = run_on_all_ranks(comm, partial(_plan_epochs, config, len(splits.train)), "plan the batches")

    is_measured = config.metrics.enabled or bool(config.metrics.loggers)
    is_measured = is_measured or any(gather_int(comm, len(session.more_observers), "observers"))
    measured_run = directory if is_measured and comm.rank == 0 else None
    state, progress, initial = _build_state(config, resume_point, comm, compute.device, epochs, scheduled, measured_run)
    has_clock = is_measured or config.batch.dealing == "measured"

    model: nn.Module = state.network
    if config.precision.compile:
        model = compiled(state.network, sizes=2 * len(config.batch.sizes))  # a batch's last micro-batch may be smaller
    loss = run_on_all_ranks(comm, partial(build_loss, config, compute.device), "build the loss")
    config = _with_micro_size(config, comm, model, loss, state, compute)
    may_shrink = given is not None and given.batch.micro_size == "auto"
    # With torch.compile any pass may compile again for minutes: no progress is reported then.
    clock = StepClock(
        SingleProcess() if config.precision.compile else comm, on_gpu=has_clock and compute.device.type == "cuda"
    )
    graph_recorder = CudaGraphRecorder() if config.precision.cuda_graphs else None
    step = build_step(config, model, loss, state, splits.train, comm, compute, progress, clock, graph_recorder)
    step.fails_alone = comm.is_elastic and not may_shrink
    base_rate, profile_steps = config.optimizer.learning_rate, config.run.profile_steps
    build: Callable[..., Trainer] = Trainer
    if comm.is_elastic:
        identity = (*setup_digests(given, splits.identity), is_measured) if given else ()
        build = partial(ElasticTrainer, regroup=regroup, identity=identity)
    trainer = build(
        config=config,
        comm=comm,
        splits=splits,
        state=state,
        training_step=step,
        directory=directory,
        learning_rate=LearningRate(config.schedule, base_rate, config.batch.global_size, config.run.epochs, scheduled),
        epochs=epochs,
        observers=session.observers,
        stop=stop,
        progress=progress,
        profiler=Profiler(profile_steps, directory.profile, comm) if profile_steps else None,
        measuring=Measuring(comm, usage_reader(compute.device)) if is_measured else None,
        may_shrink=may_shrink,
    )

    run_on_all_ranks(comm, partial(_begin_writing, trainer, session, initial), "write the run directory")
    return trainer


def _set_up_device(config: Config, comm: Communicator) -> tuple[Config, Compute]:
    """Return `config` with the device that it leaves to `auto`, and what this rank computes with. Raises UsageError."""
    if sums_floats(config) and with_device(config, "cuda").precision.deterministic:
        # NVLink's switches add floats in any order. Torch leaves them out, but not from groups made before it is told.
        os.environ.setdefault("NCCL_ALGO", "^NVLS,NVLSTree")
    device = assign_devices(comm, config.run.device, config.comm.timeout)
    config = with_device(config, "cuda" if device.type == "cuda" else "cpu")

    def set_up() -> Compute:
        if config.batch.dealing == "dynamic" and device.type != "cpu":
            raise UsageError(
                "batch.dealing=dynamic works on CPUs: a process queues its GPU's work long before the GPU is ready for "
                "it, so it cannot tell when to take the next micro-batch; set batch.dealing to measured",
                code="dealing-device",
            )
        return set_up_compute(config.precision, device)

    return config, run_on_all_ranks(comm, set_up, "set up its device")


def _begin_writing(trainer: Trainer, session: Session, initial: torch.Tensor | None) -> None:
    """Save the settings on rank 0, call `set_up_writing`, and warn of settings that fit the weights badly."""
    if trainer.comm.rank != 0:
        return
    # A run that has finished, and is longer than run.max_steps, is one of the earlier settings.
    is_longer = trainer.progress.step > trainer.last_step
    if not (is_longer and session.was_finished and trainer.directory.config.exists()):
        trainer.directory.save_config(trainer.config)
    set_up_writing(trainer, session, initial)
    _warn_of_lost_noise(trainer.state.noise, trainer.training_step.compute, trainer.progress.step)
    _warn_of_old_average(trainer.state.averaging, trainer.total_steps)
    _warn_of_sorted_images(trainer.splits.train.labels, trainer.config)


def set_up_writing(trainer: Trainer, session: Session, initial: torch.Tensor | None = None) -> None:
    """Let `trainer`, of rank 0, write checkpoints, and what `session` reports.

    `initial`: the weights that its run began with; None: they are built again, if they are needed.
    """
    config, directory = trainer.config, trainer.directory
    other_disk = config.checkpoint.fallback_directory
    fallback = directory.fallback(other_disk) if other_disk else None
    writer = CheckpointWriter(
        directory.checkpoints, config.checkpoint, session.before_publishing, fallback, session.waiting_records
    )
    norms = None
    if trainer.measuring:
        values = trainer.state.weights.values
        initial = _initial_values(config, directory).to(values.device) if initial is None else initial
        norms = WeightNorms(values, initial)
    trainer.become_writer(session.observers, session.status, writer, job_time_limit(), norms)


def build_step(
    config: Config,
    model: nn.Module,
    loss: Loss,
    state: TrainState,
    samples: SampleSource,
    comm: Communicator,
    compute: Compute,
    progress: Progress,
    clock: StepClock,
    graph_recorder: GraphRecorder | None,
) -> TrainingStep:
    """Return the step by which `config` trains `state`; `model` is its network, maybe compiled. Raises UsageError."""
    plugins = (config.model.name, config.loss.name)
    passes = max(size for _, size in config.batch.sizes) * len(state.noise.points(0))
    statistics = BatchStatistics(norm_modules(model), compute.device, passes)
    plugin_rng = LayerRng(config.run.seed, compute.device, of_plugin=True)
    updates = PluginUpdates(state.optimizer, config.optimizer.name, plugin_rng.seeded_for_update)
    return TrainingStep(
        model=model,
        weights=state.weights,
        statistics=statistics,
        samples=samples,
        noise=state.noise,
        reduction=set_up_reduction(config, state.weights, state.noise, comm, progress),
        optimizer=state.optimizer,
        tally=Tally(comm, statistics),
        loss=loss,
        compute=compute,
        layer_rng=LayerRng(config.run.seed, compute.device, of_plugin=any(map(is_plugin, plugins))),
        clip_norm=config.optimizer.clip_norm,
        averaging=state.averaging,
        optimizer_draws=updates if is_plugin(config.optimizer.name) else nullcontext,
        mix=build_mix(config.regularization, config.run.seed, len(samples)),
        loss_scale=LossScale(progress if compute.precision == torch.float16 else None),
        sum_over_ranks=sum_for_sync_norm(config.model, comm, clock),
        clock=clock,
        share_buffers=partial(state.share_changing, comm),
        graph_recorder=graph_recorder,
    )


def _plan_epochs(config: Config, samples: int) -> tuple[Epochs, Epochs]:
    """Return the passes over `samples` training samples, and the epochs of the schedules. Raises UsageError."""

    def steps_of(batch_size: int) -> int:
        return BatchPlan(batch_size, 1).steps_per_epoch(samples)

    passes = Epochs.of(config.batch.sizes, steps_of)
    return passes, Epochs.of([(0, config.schedule.base_batch)], steps_of) if config.schedule.keep_updates else passes


def _build_network(config: Config, device: torch.device) -> tuple[nn.Module, FlatWeights, tuple[str, ...]]:
    """Return the network of `config` on `device`, its weights, and the names of `TrainState.changing`.

    Raises UsageError if they do not fit the memory.
    """
    with fitting_memory("the model", "set a smaller model.width"):
        network = build_model(config)
        changing = check_training(network, config)
        check_memory(network)
        network = network.to(device)
        if runs_sequentials_whole(config.model.name):
            fuse_relus(network)
        return network, FlatWeights(network), changing


def _build_state(
    config: Config,
    resume_point: ResumePoint,
    comm: Communicator,
    device: torch.device,
    epochs: Epochs,
    scheduled: Epochs,
    measured_run: RunDirectory | None,
) -> tuple[TrainState, Progress, torch.Tensor | None]:
    """Return the state and progress with which training begins, and the weights with which `measured_run` began.

    State and progress are those of rank 0, unless this rank is joining. The distance is measured from those weights,
    which take memory that `batch.micro_size: auto` must not count on; they are None without a `measured_run`.
    """
    network, weights, changing = run_on_all_ranks(comm, partial(_build_network, config, device), "build the model")
    steps = scheduled.steps(config.run.epochs)

    def build_rest() -> TrainState:
        return TrainState(
            network,
            weights,
            build_optimizer(config.optimizer, weights),
            Averaging(config.averaging, weights, epochs.stages[0].steps_per_epoch),
            build_noise(config.noise, weights, seed=config.run.seed, total_steps=steps, rank=comm.rank),
            changing,
        )

    state = run_on_all_ranks(comm, build_rest, "build the optimizer and the noise")

    def restore() -> tuple[Progress, torch.Tensor | None]:
        is_seeded = config.run.init_from is None
        initial = weights.values.clone() if measured_run and is_seeded else None  # which a checkpoint overwrites
        progress = _restore(resume_point, scheduled, state)
        if measured_run and not is_seeded:
            is_new = resume_point.contents is None
            initial = weights.values.clone() if is_new else _initial_values(config, measured_run).to(device)
        return progress, initial

    progress, initial = run_on_all_ranks(comm, restore, "restore the checkpoint")
    if not comm.is_joining:
        progress = broadcast_value(comm, progress, "progress")
        state.broadcast(comm)
    return state, progress, initial


def _restore(resume_point: ResumePoint, scheduled: Epochs, state: TrainState) -> Progress:
    """Load the checkpoint or the initial weights of `resume_point`, if any, and return the progress."""
    contents, initial = resume_point.contents, resume_point.initial
    if contents is None:
        if initial is not None:
            _load_initial(initial, state.network, resume_point.config)
        return Progress()
    config, progress = resume_point.config, restored_progress(contents)
    epochs_before = resume_point.epochs_before or 0
    ends_early = why_stop_early(config, progress)
    if contents.step < (planned := scheduled.steps(epochs_before)):
        limits = {"run.max_steps": (config.run.max_steps or planned) < planned, "early_stopping.patience": ends_early}
        lifted = "".join(f" {name}=null" for name, is_in_force in limits.items() if is_in_force)
        others = "" if config.run.resume == "auto" else "; to start a new run from these weights: run.init_from"
        raise UsageError(
            f"the run has done {contents.step} of the {planned} updates of its {epochs_before} epochs: "
            f"finish it with run.epochs={epochs_before}{lifted}, then lengthen it{others}",
            code="run-unfinished",
        )
    total = scheduled.steps(config.run.epochs)
    if resume_point.source and (ends_early or contents.step >= min(total, config.run.max_steps or total)):
        raise UsageError(
            f"{resume_point.source} leaves nothing to train: raise run.epochs, or what else ends the run "
            f"(run.max_steps, early_stopping.patience); to start a new run from these weights: run.init_from",
            code="nothing-to-train",
        )
    state.load(contents)
    return progress


def _load_initial(initial: InitialWeights, network: nn.Module, config: Config) -> None:
    load_model(initial.fitted(network.state_dict(), config.data.image_format.classes), network, str(initial.path))


def _warn_of_lost_noise(noise: Noise, compute: Compute, step: int) -> None:
    """Warn if the precision of forward passes is too coarse for some of the noise."""
    is_float32 = compute.precision == torch.float32
    if (is_float32 and not compute.uses_tf32) or not isinstance(noise, SmoothOut):
        return
    # where it is strongest: a schedule that rises is meant to begin with little noise
    steps = range(step, noise.total_steps, max(1, (noise.total_steps - step) // _TRIED_STEPS))
    step = max(steps, key=noise.amplitude, default=step)
    lost = noise.rounded_away(compute.rounded, step)
    if lost > _LOST_NOISE:
        what = "tf32" if is_float32 else f"compute: {str(compute.precision).removeprefix('torch.')}"
        _logger.warning(
            f"precision.{what} rounds the noise away on {100 * lost:.0f} % of the weights (amplitude "
            f"{noise.amplitude(step):g} at step {step}); float32 without TF32 keeps it, or raise noise.amplitude"
        )


def _warn_of_old_average(averaging: Averaging, steps: int) -> None:
    """Warn if the first weights still count in the average after all `steps` updates of the run."""
    share = averaging.share_of_first(steps)
    if share > _OLD_SHARE:
        _logger.warning(
            f"averaging.decay: after the run's {steps} updates, {100 * share:.0f} % of the average are still its first "
            f"weights: choose a smaller one"
        )


def _warn_of_sorted_images(labels: torch.Tensor | None, config: Config) -> None:
    """Warn if the evaluated training images, the first ones, lack classes: the whole set is then sorted by class."""
    count, classes = config.evaluation.train_samples, config.data.image_format.classes
    if labels is None or not 10 * classes <= count < len(labels):  # of fewer images some classes lack by chance
        return
    whole, first = (torch.bincount(each, minlength=classes) for each in (labels, labels[:count]))
    if float(whole[first == 0].sum()) > _LACKING_SHARE * len(labels):
        _logger.warning(
            f"evaluation.train_samples: the first {count} training images are of {int((first > 0).sum())} of the "
            f"{int((whole > 0).sum())} classes, so that train loss and accuracy are of these alone: shuffle them, or "
            f"set evaluation.train_samples to {len(labels)}, for all"
        )


def _initial_values(config: Config, directory: RunDirectory) -> torch.Tensor:
    """Build again the weights that the run in `directory` began with; NaN if their file is gone or has changed."""
    network = build_model(config)
    values = FlatWeights(network).values
    if config.run.init_from is not None:
        try:
            initial = read_initial(config.run.init_from, config.model.name)
            if initial.sha256 != digest_of_initial_weights(directory.metrics):
                raise UsageError(f"{initial.path} is no longer the file that the run began with", code="target-missing")
            _load_initial(initial, network, config)
        except (OSError, CodedError) as error:
            _logger.warning("the distance from the initial weights is not measured: %s", error)
            return torch.full_like(values, torch.nan)
    return values


def _with_micro_size(
    config: Config, comm: Communicator, model: nn.Module, loss: Loss, state: TrainState, compute: Compute
) -> Config:
    """Return `config` with a micro-batch size that fits every rank's device, if it is `auto`."""
    if config.batch.micro_size != "auto":
        # It may be of an earlier launch with fewer ranks. This raises now, and not only when the last rank joins.
        run_on_all_ranks(comm, partial(check_shared_micro_batches, config, comm.most_ranks), "divide the batch")
        return config
    # The layout of training: the kernels and their memory depend on it.
    layout = torch.channels_last if config.precision.channels_last else torch.contiguous_format
    run_passes = partial(forward_and_backward, model, loss, config.data.image_format, compute, layout)
    # The graphs of a rank's micro-batches keep their memory, beside that of its last one, which is not replayed.
    kept = 2 if config.precision.cuda_graphs else 1
    # a model may fail on a GPU alone, as with a tensor that is no buffer and so stays on the host
    plugins = () if comm.is_elastic else plugin_files(config.model_dump(mode="json"))

    def try_size(size: int) -> None:
        try:
            with naming_plugins(plugins):
                run_passes(kept * size)
        finally:
            if config.precision.compile:
                torch.compiler.reset()  # a size that is tried counts towards torch's limits

    of_plugin = is_plugin(config.model.name) or is_plugin(config.loss.name)
    layer_rng = LayerRng(config.run.seed, compute.device, of_plugin=of_plugin)
    with layer_rng.preserved(), restoring_buffers(model), restoring_parameters(state.network, state.changing):
        size = find_micro_size(
            try_size,
            global_sizes=[size for _, size in config.batch.sizes],
            device=compute.device,
            comm=comm,
            fewest=fewest_samples(config.model, comm.most_ranks),
        )
    state.weights.gradients.zero_()
    return with_setting(config, "batch.micro_size", size)


@contextmanager
def naming_plugins(files: Collection[str]) -> Iterator[None]:
    """Turn an error raised by one of the plug-ins' `files` into a UsageError that says where.

    The file is that of the innermost call that is a plug-in's or this package's, which plug-ins call in turn. Faults of
    a GPU or of a disk, after which a restart may succeed, are left as they are: they appear in a plug-in's calls, too.
    """
    try:
        yield
    except Exception as error:
        if isinstance(error, CodedError | OSError) or is_out_of_memory(error) or "CUDA error" in str(error):
            raise
        for frame in reversed(traceback.extract_tb(error.__traceback__)):
            if Path(frame.filename).is_relative_to(_PACKAGE):
                break
            if any(frame.filename.endswith(f"/{file}") for file in files):
                place = f"{Path(frame.filename).name}:{frame.lineno}"
                reason = f"{type(error).__name__}: {' '.join(str(error).split())}"
                raise UsageError(f"the plug-in failed at {place}: {reason}", code="plugin-failed") from error
        raise


_PACKAGE = Path(dist_train.__file__).parent
