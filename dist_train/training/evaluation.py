"""Loss and accuracy over a split, of the training's or a stored model, and recomputed norm statistics; on all ranks."""

from __future__ import annotations

import logging
import math
from collections.abc import Callable, Mapping, Sequence
from contextlib import ExitStack, suppress
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import TypedDict

import torch
from torch import nn
from torch.nn import functional

from dist_train.checkpoint.files import Contents, Stored, find_checkpoint, read_same
from dist_train.checkpoint.state import Weights, load_model, stored_state
from dist_train.cluster.communicator import Communicator, run_long_on_all_ranks, run_on_all_ranks
from dist_train.cluster.devices import assign_devices, device_type
from dist_train.cluster.rendezvous import join_to_measure
from dist_train.config import Config, differences, parse_config
from dist_train.config.loading import with_overrides
from dist_train.config.plugins import by_content, plugin_files, with_places_of
from dist_train.config.resuming import SAVED, with_setting
from dist_train.data.augmentation import ChannelStatistics
from dist_train.data.images import Split
from dist_train.data.loader import SampleSource, Splits, open_splits
from dist_train.data.plan import BatchPlan
from dist_train.models import build_model
from dist_train.models.norms import BatchStatistics, collect_statistics, norm_modules
from dist_train.outcome import DivergedError, OutOfMemoryError, UsageError, check_choice
from dist_train.reproducible import LayerRng, generator
from dist_train.rundir.atomic import finite
from dist_train.training.compute import (
    Compute,
    fitting_memory,
    restoring_torch,
    runs_in_memory,
    set_up_compute,
    share_of_threads,
)
from dist_train.training.reduction import Tally

_logger = logging.getLogger("dist_train.training")

_MAY_CHANGE = frozenset(
    {"run.device", *(f"precision.{name}" for name in ("compute", "channels_last", "compile", "threads", "tf32"))}
)


@dataclass(frozen=True)
class Evaluation:
    """Mean loss and accuracy of `samples` samples; the loss is NaN or infinite if a sample's loss is."""

    loss: float
    accuracy: float
    samples: int


def evaluate(
    model: nn.Module,
    samples: SampleSource,
    count: int,
    *,
    batch_size: int,
    compute: Compute,
    comm: Communicator,
    after_batch: Callable[[], None] = lambda: None,
) -> Evaluation:
    """Return loss and accuracy of `model` on the first `count` of `samples`, the same on all ranks.

    The result does not depend on the number of ranks: the split is cut into batches in order, and each batch has its
    own slot in the sums. Losses are float64, so that all finite float32 logits have a finite loss. A sample whose loss
    is not finite counts as misclassified. `after_batch` is called after each batch of this rank.

    Raises OutOfMemoryError on all ranks if a batch does not fit the device of one. In an elastic launch, whose other
    ranks continue, that rank alone raises UsageError.
    """
    plan = BatchPlan(count, batch_size)
    # Losses, samples classified correctly, and whether a rank ran out of memory, by batch.
    sums = torch.zeros(3, len(plan.micro_batches), dtype=torch.float64, device=compute.device)
    was_training = model.training
    model.eval()
    share = plan.share(comm.rank, comm.size)
    layer_rng = LayerRng(0, compute.device, of_plugin=True)  # a model may draw in evaluation mode, too

    def add_up() -> None:
        batches = samples.read_all(torch.arange(batch.start, batch.stop) for batch in share)
        # Not inference mode: a model may keep a tensor that it then needs in the next update's backward pass.
        with torch.no_grad(), compute.autocast(), layer_rng.preserved():
            for batch, (inputs, labels) in zip(share, batches, strict=True):
                layer_rng.seed(0, batch.start)
                logits = model(inputs).double()
                losses = functional.cross_entropy(logits, labels, reduction="none")
                sums[0, batch.index] = losses.sum()
                sums[1, batch.index] = ((logits.argmax(dim=1) == labels) & losses.isfinite()).sum()
                after_batch()

    if not runs_in_memory(add_up):
        if comm.is_elastic:  # the others continue without this rank
            alone = "the evaluation does not fit this rank's memory: set a smaller evaluation.batch_size"
            raise UsageError(alone, code="out-of-memory")
        sums[2, share[0].index] = 1.0
    model.train(was_training)
    # Each slot is zero on all ranks but one, so the float sum over the ranks is exact.
    comm.allreduce_async(sums, "evaluation").wait_on_host()
    losses_of_batches, correct, out_of_memory = sums.tolist()
    if short := sum(out_of_memory):
        raise OutOfMemoryError(
            f"{short:g} of the ranks ran out of memory in the evaluation: set a smaller evaluation.batch_size"
        )
    return Evaluation(math.fsum(losses_of_batches) / count, sum(correct) / count, count)


def statistics_samples(training_samples: int, wanted: int, micro_size: int, seed: int) -> torch.Tensor:
    """Return the training samples for norm statistics: a fixed random choice of `wanted`, or all if there are fewer.

    It is int64, and one shorter if the last micro-batch would have a single sample, which has no variance.
    """
    order = torch.randperm(training_samples, generator=generator(seed, "norm statistics"))
    count = min(wanted, training_samples)
    return order[: count - 1 if count % micro_size == 1 and count > 1 else count]


def recompute_statistics(
    model: nn.Module,
    samples: SampleSource,
    indices: torch.Tensor,
    *,
    micro_size: int,
    compute: Compute,
    comm: Communicator,
    after_batch: Callable[[], None] = lambda: None,
) -> None:
    """Replace the running statistics in the norms of `model` by those of the training samples `indices`.

    As in training, the samples are cut into micro-batches and dealt to ranks, and statistics are summed as integers.
    `after_batch` is called after each micro-batch of this rank.

    Raises, on all ranks:
        DivergedError: the statistics are not finite, or out of range.
        OutOfMemoryError: a micro-batch does not fit the device of some rank (in an elastic launch: UsageError, there).
    """
    statistics = BatchStatistics(norm_modules(model), compute.device, len(indices))
    tally = Tally(comm, statistics)
    was_training = model.training
    collect_statistics(model)
    share = BatchPlan(len(indices), micro_size).share(comm.rank, comm.size)
    layer_rng = LayerRng(0, compute.device, of_plugin=True)  # a model may draw in evaluation mode, too

    def collect() -> None:
        batches = samples.read_all(indices[batch.start : batch.stop] for batch in share)
        with torch.no_grad(), compute.autocast(), layer_rng.preserved():
            for batch, (inputs, _) in zip(share, batches, strict=True):
                layer_rng.seed(0, batch.start)
                model(inputs)
                statistics.collect(len(inputs))
                after_batch()

    fits = runs_in_memory(collect)
    if comm.is_elastic and not fits:  # the others continue without this rank
        alone = "computing the norms' statistics does not fit this rank's memory: begin with a smaller batch.micro_size"
        raise UsageError(alone, code="out-of-memory")
    model.train(was_training)
    tally.send(out_of_memory=not fits)
    total = tally.result()
    if total.out_of_memory:
        raise OutOfMemoryError(
            f"{total.out_of_memory} of the ranks ran out of memory in computing the norms' statistics: begin with a "
            f"smaller batch.micro_size"
        )
    if total.out_of_range:
        raise DivergedError("the norms' statistics are not finite or out of range", code="statistics-not-finite")
    statistics.absorb(total.statistics, len(indices), momentum=1.0)


class StoredEvaluation(TypedDict):
    """Loss and accuracy of a checkpoint's model on the whole of a split."""

    checkpoint: str
    step: int
    epoch: float
    split: Split
    weights: Weights
    loss: float | None
    """None if it is not finite."""
    accuracy: float
    samples: int


def evaluate_stored(target: Path, split: Split, overrides: Sequence[str], weights: Weights = "raw") -> StoredEvaluation:
    """Return step, loss and accuracy of a stored model on the whole of `split`, on all ranks.

    Norm statistics are the checkpoint's, computed at its clean or averaged weights.
    """
    check_choice("split", split, Split)
    with restoring_torch(), ExitStack() as stack:
        timeout = 60.0
        comm = join_to_measure(timeout=timeout, device_type=device_type())
        stack.push(lambda kind, error, traceback: comm.close(error))
        [stored] = read_same(comm, lambda: [find_checkpoint(target)])
        contents = stored.contents
        config = run_on_all_ranks(comm, partial(stored_config, contents, overrides), "read the checkpoint's settings")
        if config.precision.threads == "auto":
            config = with_setting(config, "precision.threads", share_of_threads(comm))
        device = assign_devices(comm, config.run.device, timeout)
        compute = run_on_all_ranks(comm, partial(set_up_compute, config.precision, device), "set up its device")
        layout, statistics = config.precision.channels_last, stored_normalization(contents)
        open_data = partial(open_splits, config.data, config.run.seed, compute.device, layout, statistics)
        splits = run_long_on_all_ranks(comm, open_data, "load the data")
        stack.callback(splits.close)
        if comm.rank == 0:
            warn_of_other_data(stored, splits)
            warn_of_edited_plugins(contents, config)

        def build() -> nn.Module:
            with fitting_memory("the model", "free some, or set run.device=cpu"):
                return stored_model(contents, config, weights).to(compute.device)

        model = run_on_all_ranks(comm, build, "build the model")
        samples = run_on_all_ranks(comm, partial(splits.of, split), f"find its {split} split")
        batch_size = config.evaluation.batch_size
        result = evaluate(model, samples, len(samples), batch_size=batch_size, compute=compute, comm=comm)
        comm.barrier()
    return {
        "checkpoint": str(stored.path),
        "step": contents.step,
        "epoch": contents.epoch,
        "split": split,
        "weights": weights,
        "loss": finite(result.loss),
        "accuracy": result.accuracy,
        "samples": result.samples,
    }


def stored_model(contents: Contents, config: Config, weights: Weights = "raw") -> nn.Module:
    """Return the network of `config` with a checkpoint's raw or averaged `weights`, on the CPU."""
    model = build_model(config)
    state = stored_state(contents, weights)
    load_model(state, model, "the checkpoint")
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            # An average has only the first of a tied parameter's names.
            parameter.copy_(state[name])
    return model


def stored_normalization(contents: Contents) -> ChannelStatistics | None:
    """Return how a checkpoint's model was trained to have its inputs normalized, whatever the data are now.

    None without `data.normalize`, or if an older version wrote the checkpoint.
    """
    stored = contents.normalization
    return ChannelStatistics(tuple(stored["mean"]), tuple(stored["deviation"])) if stored else None


def warn_of_other_data(stored: Stored, splits: Splits) -> None:
    """Warn if `splits` are not the data of training, or one of their classes has another name than it had then.

    Its images then count as those of that class.
    """
    if splits.differ_from(stored.contents.data):
        _logger.warning("the data set is not that with which %s was trained: files or labels differ", stored.path)
    for label, (trained, here) in enumerate(zip(stored.contents.class_names, splits.class_names, strict=False)):
        if trained != here:
            _logger.warning("label %d is the class %s here, but was %s in training", label, here, trained)
            return


def warn_of_edited_plugins(contents: Contents, config: Config) -> None:
    """Warn if the code of plug-ins that `config` names is not that with which the checkpoint was saved."""
    with suppress(UsageError):  # a module that a plug-in imported has been replaced by another plug-in's
        saved, now = by_content(contents.plugins), by_content(plugin_files(config.model_dump(mode="json")))
        known = {name for name, _ in saved}
        if edited := sorted(now[each] for each in now.keys() - saved.keys() if each[0] in known):
            _logger.warning(
                "plug-ins have changed since the checkpoint of step %d was saved: %s", contents.step, ", ".join(edited)
            )


def stored_config(contents: Contents, overrides: Sequence[str]) -> Config:
    """Return a checkpoint's configuration with overrides, the device set to `auto`, and no CUDA graphs.

    Overrides may say where plug-ins are now. Raises UsageError if an override would change the model or its data.
    """
    given = dict(contents.config)
    if isinstance(given.get("metrics"), Mapping):
        given["metrics"] = {**given["metrics"], "loggers": []}  # whose code may be gone
    stored = parse_config(with_places_of(given, with_overrides(given, overrides), Config), source=SAVED)
    settings = stored.model_dump(mode="json")
    settings["run"]["device"] = "auto"
    settings["precision"]["cuda_graphs"] = False  # they are for training, and refused on a CPU
    config = parse_config(with_overrides(settings, overrides), source="the checkpoint")
    changed = [difference for difference in differences(stored, config) if difference.path not in _MAY_CHANGE]
    if changed:
        raise UsageError(
            "an evaluation accepts only settings that do not change the model or its data, not "
            + ", ".join(difference.path for difference in changed),
            code="settings-changed",
        )
    return config
