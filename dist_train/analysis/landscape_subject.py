"""What a landscape is of: checkpoints that are verified, their network, and the data in memory."""

from __future__ import annotations

import hashlib
import logging
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import nn

from dist_train.analysis.landscape_files import MeasureSettings
from dist_train.analysis.landscape_points import Batch, Place, place_of
from dist_train.checkpoint.files import Stored
from dist_train.cluster.devices import choose_device
from dist_train.config import Config
from dist_train.data.images import BatchRequest, SampleSource
from dist_train.data.loader import open_splits
from dist_train.data.plan import BatchPlan
from dist_train.models.norms import norm_modules
from dist_train.outcome import UsageError
from dist_train.randomness import generator
from dist_train.training.compute import Compute, set_up_compute
from dist_train.training.evaluation import statistics_samples, stored_config, stored_model

_logger = logging.getLogger("dist_train.analysis")
_BATCH_SIZES = {"cpu": 100, "cuda": 1000}
"""Samples of a pass where none are asked for. On a CPU the activations of a small batch stay in its cache."""


@dataclass(frozen=True)
class Subject:
    """A checkpoint's network and its place, and its data: batches on the device."""

    config: Config
    model: nn.Module
    place: Place
    compute: Compute
    channels_last: bool
    batch_size: int
    train: list[Batch]
    test: list[Batch]
    statistics: list[Batch]
    """What the norms' statistics are recomputed from; empty: they are not."""

    def record(self) -> dict[str, Any]:
        """Return what the numbers depend on beside the checkpoints and what was asked for."""
        recomputed = sum(len(labels) for _, labels in self.statistics)
        return {
            "samples": sum(len(labels) for _, labels in self.train),
            "test_samples": sum(len(labels) for _, labels in self.test),
            "statistics": "recomputed" if recomputed else "interpolated" if norm_modules(self.model) else "none",
            "statistics_samples": recomputed,
            "statistics_batch": len(self.statistics[0][1]) if recomputed else 0,
            "compute": str(self.compute.precision).removeprefix("torch."),
            "channels_last": self.channels_last,
            "batch_size": self.batch_size,
            "device": self.compute.device.type,
            "data_digest": _digest([*self.train, *self.test, *self.statistics]),
        }


def open_subject(stored: Stored, overrides: Sequence[str], measure: MeasureSettings, *, local_rank: int) -> Subject:
    """Build the network of `stored` and load its data.

    Raises:
        UsageError: the settings do not fit, or data are missing.
    """
    config = stored_config(stored.contents, overrides)
    # One thread an operation: bits that do not depend on how many cores a rank has.
    changes = {"threads": 1} if measure.precision == "run" else {"threads": 1, "compute": "float32", "tf32": False}
    device = choose_device(config.run.device, local_rank=local_rank)
    compute = set_up_compute(config.precision.model_copy(update=changes), device)
    # On a CPU this layout takes half the time, whatever the run used.
    channels_last = config.precision.channels_last or compute.device.type == "cpu"
    layout = torch.channels_last if channels_last else torch.contiguous_format
    batch_size = measure.batch_size or _BATCH_SIZES[compute.device.type]
    model = stored_model(stored.contents, config)
    splits = open_splits(config.data, config.run.seed, compute.device, layout)
    try:
        train, test = (
            _batches(samples, _subset(samples, wanted, measure.subset_seed), batch_size)
            for samples, wanted in ((splits.train, measure.samples), (splits.test, measure.test_samples))
        )
        statistics: list[Batch] = []
        if measure.statistics == "recomputed" and norm_modules(model):
            wanted, micro_size = measure.statistics_samples or config.model.norm_samples, config.batch.micro_size
            assert micro_size != "auto", "a run decides it before it saves"
            chosen = statistics_samples(len(splits.train), wanted, micro_size, config.run.seed)
            statistics = _batches(splits.train, chosen, micro_size)
    finally:
        splits.close()
    return Subject(config, model, place_of(model), compute, channels_last, batch_size, train, test, statistics)


def place_in(other: Stored, subject: Subject) -> Place:
    """Return where `other` lies in the weight space of `subject`.

    Raises:
        UsageError: it is another network, or of other data.
    """
    config = stored_config(other.contents, [])
    ours = {name: tensor.shape for name, tensor in subject.model.state_dict().items()}
    theirs = {name: tensor.shape for name, tensor in other.contents.model.items()}
    if ours != theirs or config.model.name != subject.config.model.name:
        raise UsageError(
            f"{other.path} holds another network: only networks of the same shape have a line between them",
            code="another-network",
        )
    _check_data(other, subject.config, config)
    return place_of(stored_model(other.contents, config))


def _check_data(other: Stored, ours: Config, theirs: Config) -> None:
    """Refuse a checkpoint of other data; say where it has seen another part of the same."""
    names = ["data.name", "data.normalize"]
    if ours.data.name == "synthetic":
        names += ["run.seed", "data.synthetic_shape", "data.synthetic_classes", "data.synthetic_samples"]
    for name in names:
        section, key = name.split(".")
        first, second = getattr(getattr(ours, section), key), getattr(getattr(theirs, section), key)
        if first != second:
            raise UsageError(f"{other.path} is of other data: its {name} is {second}, not {first}", code="other-data")
    seeds = (ours.run.seed, theirs.run.seed)
    sizes = (ours.data.train_size, theirs.data.train_size)
    if sizes[0] != sizes[1] or (sizes[0] is not None and seeds[0] != seeds[1]):
        _logger.warning(
            "%s was trained on another part of the training images than the first checkpoint, whose part is used",
            other.path,
        )


def _subset(samples: SampleSource, wanted: int | None, seed: int) -> torch.Tensor:
    """Return which samples are evaluated: all, or a choice of the seed in their old order; int64."""
    if wanted is None or wanted >= len(samples):
        return torch.arange(len(samples))
    order = torch.randperm(len(samples), generator=generator(seed, "landscape samples"))
    return order[:wanted].sort().values


def _batches(samples: SampleSource, indices: torch.Tensor, batch_size: int) -> list[Batch]:
    cut = BatchPlan(len(indices), batch_size).micro_batches
    requests = [BatchRequest(indices[batch.start : batch.stop]) for batch in cut]
    samples.prefetch(requests)
    return [samples.read(request) for request in requests]


def _digest(batches: Iterable[Batch]) -> str:
    hashed = hashlib.blake2b(digest_size=8)
    for inputs, labels in batches:
        hashed.update(inputs.cpu().contiguous().numpy().tobytes())
        hashed.update(labels.cpu().numpy().tobytes())
    return hashed.hexdigest()
