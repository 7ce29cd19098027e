"""A checkpoint's network, and the training images that its loss is taken over, on this rank's device."""

from __future__ import annotations

import hashlib
from collections.abc import Sequence
from contextlib import ExitStack
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from dist_train.analysis.landscape_subject import Stored, model_of
from dist_train.analysis.sharpness_record import MeasuredCheckpoint, MeasuredData, SharpnessSettings
from dist_train.analysis.subset_loss import Batch
from dist_train.cluster.alone import Alone
from dist_train.config import Config
from dist_train.data.catalog import load_images
from dist_train.data.image_folder import list_split, training_subset
from dist_train.data.loader import open_splits
from dist_train.data.source import BatchRequest, SampleSource
from dist_train.data.subset import balanced_choice
from dist_train.models.norms import norm_modules
from dist_train.outcome import DivergedError, UsageError
from dist_train.randomness import generator
from dist_train.training.compute import Compute, set_up_compute, share_of_threads
from dist_train.training.devices import choose_device
from dist_train.training.norm_statistics import recompute_statistics, statistics_samples
from dist_train.training.stored import stored_config


@dataclass(frozen=True)
class StoredSubset:
    """What is measured: the network, float32, in evaluation mode unless norms take each batch's own statistics."""

    model: nn.Module
    batches: tuple[Batch, ...]
    checkpoint: MeasuredCheckpoint
    data: MeasuredData
    threads: int
    """How many may compute at once, each on a batch of its own."""


def open_stored_subset(stored: Stored, settings: SharpnessSettings, overrides: Sequence[str]) -> StoredSubset:
    """Return the network of `stored` and the batches that `settings` choose of its training images.

    Raises:
        UsageError: the settings do not fit, or data are missing, or fewer than asked for.
    """
    config = stored_config(stored.contents, overrides)
    precision = config.precision
    # TF32's errors would pass for curvature.
    exactly = precision.model_copy(update={"compute": "float32", "tf32": False, "threads": 1})
    compute = set_up_compute(exactly, choose_device(config.run.device, local_rank=0))
    layout = torch.channels_last if precision.channels_last else torch.contiguous_format
    chosen = choose_samples(_training_labels(config), config.data.image_format.classes, settings)
    model = model_of(stored, config).to(compute.device)
    with ExitStack() as stack:
        splits = open_splits(config.data, config.run.seed, compute.device, layout)
        stack.callback(splits.close)
        if settings.statistics == "recomputed":
            _recompute(model, splits.train, config, compute)
        parts = cut(chosen, settings.batch_size)
        splits.train.prefetch(BatchRequest(part, None) for part in parts)
        batches = tuple(map(splits.train.unaugmented, parts))
    model.train(settings.statistics == "batch")
    checkpoint = MeasuredCheckpoint(path=str(stored.path), sha256=stored.sha256, step=stored.contents.step)
    data = MeasuredData(
        samples=len(chosen),
        sha256=_digest(batches),
        layout="channels_last" if precision.channels_last else "contiguous",
        compute="float32",
    )
    threads = share_of_threads(1) if precision.threads == "auto" else precision.threads
    # A GPU is kept busy by one.
    return StoredSubset(model, batches, checkpoint, data, threads if compute.device.type == "cpu" else 1)


def choose_samples(labels: Tensor, classes: int, settings: SharpnessSettings) -> Tensor:
    """Return which training samples are taken, int64 [samples]: chosen and shuffled by the seed, balanced by class.

    Raises:
        UsageError: there are fewer.
    """
    if settings.samples > len(labels):
        raise UsageError(f"--samples {settings.samples}: there are {len(labels)} training images")
    chosen = balanced_choice(labels, settings.samples, classes, settings.seed)
    return chosen[torch.randperm(len(chosen), generator=generator(settings.seed, "sharpness batches"))]


def cut(chosen: Tensor, batch_size: int) -> tuple[Tensor, ...]:
    """Return `chosen` in parts of `batch_size`; what is left over joins the last, as in ghost norm's groups.

    A small last batch would have statistics of its own, and a single sample has none.
    """
    whole = max(1, len(chosen) // batch_size)
    return torch.tensor_split(chosen, [part * batch_size for part in range(1, whole)])


def _training_labels(config: Config) -> Tensor:
    data, seed = config.data, config.run.seed
    if data.name == "imagefolder":
        if data.root is None or data.classes is None:
            raise UsageError("an image folder needs data.root and data.classes")
        return training_subset(list_split(data.root, "train", data.classes, seed), data.train_size, seed).labels
    return load_images(data, "train", seed).labels


def _recompute(model: nn.Module, samples: SampleSource, config: Config, compute: Compute) -> None:
    if not norm_modules(model):
        return
    size = config.batch.micro_size
    assert size != "auto", "a run decides it before it saves"
    indices = statistics_samples(len(samples), config.model.norm_samples, size, config.run.seed)
    try:
        recompute_statistics(model, samples, indices, micro_size=size, compute=compute, comm=Alone())
    except DivergedError as error:
        raise DivergedError(f"there is nothing to measure: {error}") from error


def _digest(batches: Sequence[Batch]) -> str:
    digest = hashlib.sha256()
    for inputs, labels in batches:
        digest.update(inputs.cpu().contiguous().numpy().tobytes())
        digest.update(labels.cpu().numpy().tobytes())
    return digest.hexdigest()
