"""The network and data of a landscape, its points in weight space, and loss and accuracy at them.

The data are held in memory. Several threads take batches in turn, each with its own copy of the network: that is faster
than intra-op threads, and the results are bit-identical for any number of threads.
"""

from __future__ import annotations

import copy
import hashlib
import logging
import math
from collections.abc import Callable, Iterable, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import closing
from dataclasses import dataclass, replace
from functools import lru_cache
from itertools import chain, islice
from queue import SimpleQueue
from typing import Any, TypeVar

import torch
from torch import nn
from torch.nn import functional

from dist_train.analysis.landscape_files import LandscapeSettings, Measured, Point
from dist_train.checkpoint.files import Stored
from dist_train.cluster.devices import choose_device
from dist_train.config import Config
from dist_train.config.plugins import with_places_of
from dist_train.data.loader import SampleSource, open_splits
from dist_train.models.norms import (
    BatchStatistics,
    GroupedBatchNorm,
    collect_statistics,
    norm_modules,
    norms_of_torch,
)
from dist_train.optim.flat_weights import FlatWeights
from dist_train.outcome import UsageError
from dist_train.reproducible import LayerRng, generator
from dist_train.training.compute import Compute, fitting_memory, set_up_compute
from dist_train.training.evaluation import (
    statistics_samples,
    stored_config,
    stored_model,
    stored_normalization,
    warn_of_edited_plugins,
    warn_of_other_data,
)


@dataclass(frozen=True)
class Place:
    """A model state: trainable weights [n] and running statistics [m] (means and variances), both flat."""

    weights: torch.Tensor
    statistics: torch.Tensor


Walk = Callable[[Point], Place]  # maps a point to the model state there, float32


def axis(start: float, stop: float, points: int) -> tuple[float, ...]:
    """Return `points` evenly spaced numbers from `start` to `stop`; 0 and 1, if among them, are exact."""
    assert points >= 2
    return tuple(round(start + (stop - start) * index / (points - 1), 12) + 0.0 for index in range(points))


def line_points(alphas: tuple[float, ...], directions: int) -> tuple[Point, ...]:
    """Return the points of `directions` lines, one line after the other."""
    return tuple(Point(direction, alpha) for direction in range(directions) for alpha in alphas)


def plane_points(alphas: tuple[float, ...], betas: tuple[float, ...]) -> tuple[Point, ...]:
    """Return the points of a plane, row by row of equal beta."""
    return tuple(Point(0, alpha, beta) for beta in betas for alpha in alphas)


def interpolation(first: Place, second: Place, is_variance: torch.Tensor) -> Walk:
    """Return the walk (1 - alpha) `first` + alpha `second`, for running statistics too; variances are clamped at 0.

    `is_variance` marks the statistics that are variances, bool [m].
    """
    weights = first.weights.double(), second.weights.double()
    statistics = first.statistics.double(), second.statistics.double()

    def walk(point: Point) -> Place:
        moved, means = ((1.0 - point.alpha) * one + point.alpha * other for one, other in (weights, statistics))
        return Place(moved.float(), torch.where(is_variance, means.clamp(min=0.0), means).float())

    return walk


def along(origin: Place, directions: Callable[[int], Sequence[torch.Tensor]]) -> Walk:
    """Return the walk `origin` + alpha d1 (+ beta d2); running statistics stay those of `origin`.

    `directions` maps a point's direction number to d1, and in a plane d2, float64 [n].
    """
    # Points come line by line, so the latest directions are usually the next ones too.
    cached = lru_cache(1)(directions)

    def walk(point: Point) -> Place:
        moved = origin.weights.double()
        for direction, distance in zip(cached(point.direction), (point.alpha, point.beta), strict=False):
            moved.add_(direction, alpha=distance)
        return Place(moved.float(), origin.statistics)

    return walk


Result = TypeVar("Result")
Batch = tuple[torch.Tensor, torch.Tensor]  # inputs [n, ...] and labels [n] on the device


def cross_entropy_sum(outputs: torch.Tensor, labels: torch.Tensor) -> torch.Tensor:
    """Return the summed cross entropies in float64, as evaluations do: in float32 a confident sample's is zero."""
    return functional.cross_entropy(outputs.double(), labels, reduction="sum")


class Replicas:
    """Copies of a network, one per thread, that share its tensors: a forward pass may store something in a module.

    A network that draws random numbers, as Monte Carlo dropout does in evaluations, draws the same for a batch in every
    pass over it: threads share the global generators, so that a single one computes then.
    """

    def __init__(self, model: nn.Module, threads: int) -> None:
        shared = {id(tensor): tensor for tensor in chain(model.parameters(), model.buffers())}
        self.models = (model, *(copy.deepcopy(model, dict(shared)) for _ in range(threads - 1)))
        self._free = SimpleQueue[nn.Module]()
        for each in self.models:
            self._free.put(each)
        self._rng = LayerRng(0, next(model.parameters()).device, of_plugin=True)
        self._draws: bool | None = None  # unknown before the first pass

    def map(self, work: Callable[[nn.Module, Batch], Result], batches: Sequence[Batch]) -> list[Result]:
        """Return the result of `work` for each batch, in order; each replica takes the next untaken batch."""

        def run(batch: Batch) -> Result:
            model = self._free.get()
            try:
                return work(model, batch)
            finally:
                self._free.put(model)

        def run_seeded(number: int) -> Result:
            self._rng.seed(0, number)
            return run(batches[number])

        with fitting_memory("a batch", "set a smaller --batch-size"), self._rng.preserved():
            results: list[Result] = []
            if self._draws is None:
                results.append(run_seeded(0))
                self._draws = self._rng.has_drawn(0, 0)
            if self._draws or len(self.models) == 1:
                return results + [run_seeded(number) for number in range(len(results), len(batches))]
            with ThreadPoolExecutor(len(self.models)) as pool:
                return results + list(pool.map(run, batches[len(results) :]))


class PointEvaluator:
    """Evaluates a network at any place on the same batches."""

    def __init__(
        self,
        model: nn.Module,
        splits: Sequence[Sequence[Batch]],
        statistics_batches: Sequence[Batch],
        compute: Compute,
        *,
        threads: int = 1,
    ) -> None:
        """Evaluate a copy of `model` on `splits`; statistics are recomputed from `statistics_batches`, if any."""
        self._splits = [list(split) for split in splits]
        self._statistics_batches = statistics_batches
        self._compute = compute
        model = copy.deepcopy(model).to(compute.device)
        model.eval()
        self._weights = FlatWeights(model)
        self._statistics = _running(model)
        batches = max(sum(map(len, self._splits)), len(statistics_batches))
        self._replicas = Replicas(model, 1 if compute.device.type == "cuda" else max(1, min(threads, batches)))

    def evaluate(self, place: Place) -> list[Measured]:
        """Return loss and accuracy of each split at `place`."""
        self._weights.values.copy_(place.weights)
        parts = place.statistics.split([len(statistic) for statistic in self._statistics])
        for statistic, part in zip(self._statistics, parts, strict=True):
            statistic.copy_(part)
        if self._statistics_batches and not self._recompute_statistics():
            return [Measured(math.nan, math.nan)] * len(self._splits)
        batches = [batch for split in self._splits for batch in split]
        sums = iter(torch.stack(self._replicas.map(self._measure, batches)).tolist())
        measured = []
        for split in self._splits:
            samples = sum(len(labels) for _, labels in split)
            # Summed in the order of the batches, so the threads' order does not show in the bits.
            losses, correct = zip(*islice(sums, len(split)), strict=True)
            measured.append(Measured(sum(losses) / samples, sum(correct) / samples))
        return measured

    def _recompute_statistics(self) -> bool:
        """Recompute running statistics from training data; return False if they are out of range."""

        samples = sum(len(labels) for _, labels in self._statistics_batches)

        def collect(model: nn.Module, batch: Batch) -> BatchStatistics:
            statistics = BatchStatistics(norm_modules(model), self._compute.device, samples)
            with torch.inference_mode(), self._compute.autocast():
                model(batch[0])
                statistics.collect(len(batch[0]))
            return statistics

        for model in self._replicas.models:
            collect_statistics(model)
        found = self._replicas.map(collect, self._statistics_batches)
        found[0].absorb(torch.stack([each.sums for each in found]).sum(dim=0), samples, momentum=1.0)
        for model in self._replicas.models:
            model.eval()
        return not any(bool(each.out_of_range) for each in found)

    def _measure(self, model: nn.Module, batch: Batch) -> torch.Tensor:
        inputs, labels = batch
        with torch.inference_mode(), self._compute.autocast():
            outputs = model(inputs)
            # as in evaluations, a sample whose loss is not finite counts as misclassified
            is_finite = functional.cross_entropy(outputs.double(), labels, reduction="none").isfinite()
            correct = ((outputs.argmax(dim=1) == labels) & is_finite).sum()
            return torch.stack([cross_entropy_sum(outputs, labels), correct.double()])


def _running(model: nn.Module) -> list[torch.Tensor]:
    return [statistic for norm in norm_modules(model) for statistic in (norm.running_mean, norm.running_var)]


def place_of(model: nn.Module) -> Place:
    """Return copies of `model`'s weights and statistics, on the CPU."""
    weights = FlatWeights(copy.deepcopy(model)).values.detach().cpu()
    return Place(weights, torch.cat([*_running(model), torch.zeros(0)]).detach().cpu())


def variances_of(model: nn.Module) -> torch.Tensor:
    """Return a mask of the variances among the statistics of `place_of`, bool [m]."""
    channels = [len(norm.running_var) for norm in norm_modules(model)]
    return torch.tensor([is_variance for many in channels for is_variance in (False,) * many + (True,) * many]).bool()


_logger = logging.getLogger("dist_train.analysis")
_BATCH_SIZES = {"cpu": 100, "cuda": 1000}
"""Default samples per pass. On a CPU the activations of a small batch stay in cache."""


@dataclass(frozen=True)
class Subject:
    """A checkpoint's network, its place, and its data as batches on the device."""

    config: Config
    model: nn.Module
    place: Place
    compute: Compute
    channels_last: bool
    batch_size: int
    train: list[Batch]
    test: list[Batch]
    statistics: list[Batch]  # batches that the norms' statistics are recomputed from; empty: they are not recomputed
    data: str  # identifies the data set of its training (`Splits.identity`); empty if unknown

    def record(self) -> dict[str, Any]:
        """Return everything else that the numbers depend on, beside the checkpoints and `LandscapeSettings`."""
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
            "data_digest": digest([*self.train, *self.test, *self.statistics], hashlib.blake2b(digest_size=8)),
        }


def open_subject(stored: Stored, overrides: Sequence[str], settings: LandscapeSettings, *, local_rank: int) -> Subject:
    """Build the network of `stored` and load its data. Raises UsageError if they do not fit."""
    config = stored_config(stored.contents, overrides)
    if settings.precision == "float32":
        refuse_precision(stored, config, "landscapes are computed in float32: add --precision run")
    # One thread per operation, so that the bits do not depend on a rank's number of cores.
    changes = {"threads": 1} if settings.precision == "run" else {"threads": 1, "compute": "float32", "tf32": False}
    device = choose_device(config.run.device, local_rank=local_rank)
    compute = set_up_compute(config.precision.model_copy(update=changes), device)
    # On a CPU channels_last takes half the time, whatever the run used.
    channels_last = config.precision.channels_last or compute.device.type == "cpu"
    batch_size = settings.batch_size or _BATCH_SIZES[compute.device.type]
    if local_rank == 0:
        warn_of_edited_plugins(stored.contents, config)
    model = stored_model(stored.contents, config)
    if local_rank == 0 and settings.statistics == "recomputed":
        warn_of_kept_statistics(model)
    normalization = stored_normalization(stored.contents)
    with closing(open_splits(config.data, config.run.seed, compute.device, channels_last, normalization)) as splits:
        if local_rank == 0:
            warn_of_other_data(stored, splits)
        train, test = (
            list(samples.read_all(_subset(samples, wanted, settings.subset_seed).split(batch_size)))
            for samples, wanted in ((splits.train, settings.samples), (splits.test, settings.test_samples))
        )
        statistics: list[Batch] = []
        if settings.statistics == "recomputed" and norm_modules(model):
            wanted, micro_size = settings.statistics_samples or config.model.norm_samples, config.batch.micro_size
            assert micro_size != "auto", "a run resolves it before it saves"
            chosen = statistics_samples(len(splits.train), wanted, micro_size, config.run.seed)
            statistics = list(splits.train.read_all(chosen.split(micro_size)))
    place, data = place_of(model), stored.contents.data
    return Subject(config, model, place, compute, channels_last, batch_size, train, test, statistics, data)


def refuse_precision(stored: Stored, config: Config, message: str) -> None:
    """Raise UsageError with `message` if an override asks in vain for less precision than the run had."""
    before, now = stored.contents.config.get("precision", {}), config.precision
    if now.compute not in ("float32", before.get("compute")) or (now.tf32 and not before.get("tf32")):
        raise UsageError(f"precision.compute and precision.tf32 have no effect here: {message}", code="option-alone")


def warn_of_kept_statistics(model: nn.Module) -> None:
    """Warn if `model` has norms that only keep the checkpoint's statistics."""
    if names := norms_of_torch(model):
        _logger.warning(
            "the statistics of torch's own norms (%s) stay the checkpoint's: build norms by norm(channels)",
            ", ".join(names),
        )


def place_in(other: Stored, subject: Subject) -> Place:
    """Return the place of `other` in the space of `subject`. Raises UsageError if its network or its data differ."""
    places = subject.config.model_dump(mode="json")  # where plug-ins are by now
    contents = replace(other.contents, config=with_places_of(other.contents.config, places, Config))
    config = stored_config(contents, [])
    warn_of_edited_plugins(other.contents, config)  # a file of the same name may hold another network
    ours = {name: tensor.shape for name, tensor in subject.model.state_dict().items()}
    theirs = {name: tensor.shape for name, tensor in other.contents.model.items()}
    if ours != theirs or config.model.name != subject.config.model.name:
        raise UsageError(
            f"{other.path} holds another network: only networks of the same shape have a line between them",
            code="another-network",
        )
    _check_data(other, subject, config)
    # Built as the subject is, so that the same weights are trainable.
    return place_of(stored_model(other.contents, subject.config))


def check_fixed(other: Stored, model: nn.Module) -> None:
    """Raise UsageError if `other` differs from `model` in what a line between them does not move.

    That is all but trainable weights and the norms' running statistics: frozen weights and other buffers. Counters of
    batches are ignored, since no evaluation reads them.
    """
    moved = {name for name, weights in model.named_parameters(remove_duplicate=False) if weights.requires_grad}
    for prefix, module in model.named_modules(remove_duplicate=False):
        if isinstance(module, GroupedBatchNorm):
            moved |= {f"{prefix}.{name}".lstrip(".") for name in ("running_mean", "running_var")}
    differing = [
        name
        for name, tensor in model.state_dict().items()
        if name not in moved
        and not name.endswith("num_batches_tracked")
        and not torch.equal(tensor.cpu(), other.contents.model[name].cpu())
    ]
    if differing:
        raise UsageError(
            f"{other.path} differs in weights or buffers that are not trained ({', '.join(differing)}), which a line "
            f"would keep as in the first checkpoint: choose checkpoints that share them, or, if they are statistics of "
            f"norms, train a model that builds its norms by norm(channels)",
            code="another-network",
        )


def _check_data(other: Stored, subject: Subject, theirs: Config) -> None:
    """Raise UsageError if the checkpoint's data differ; warn if other files, or another part of them, trained it."""
    ours, digests = subject.config, {subject.data, other.contents.data} - {""}
    names = ["data.name", "data.normalize"]
    if ours.data.name == "synthetic":
        names += ["run.seed", "data.synthetic_shape", "data.synthetic_classes", "data.synthetic_samples"]
    for name in names:
        first, second = ours.value(name), theirs.value(name)
        if first != second:
            raise UsageError(f"{other.path} has other data: its {name} is {second}, not {first}", code="other-data")
    seeds = (ours.run.seed, theirs.run.seed)
    sizes = [(data.train_size, data.validation_size) for data in (ours.data, theirs.data)]
    # The seed chooses the training subset and the images that are held out.
    if len(digests) > 1 or sizes[0] != sizes[1] or (sizes[0] != (None, None) and seeds[0] != seeds[1]):
        _logger.warning(
            "%s was trained on other training images than the first checkpoint, whose images are used", other.path
        )


def _subset(samples: SampleSource, wanted: int | None, seed: int) -> torch.Tensor:
    """Return the indices of the samples to evaluate, int64: all, or a seeded choice in ascending order."""
    if wanted is None or wanted >= len(samples):
        return torch.arange(len(samples))
    order = torch.randperm(len(samples), generator=generator(seed, "landscape samples"))
    return order[:wanted].sort().values


def digest(batches: Iterable[Batch], hashed: hashlib._Hash | hashlib.blake2b) -> str:
    """Return the digest by `hashed` of inputs and labels as the network reads them, in hexadecimal digits."""
    for inputs, labels in batches:
        hashed.update(inputs.cpu().contiguous().numpy().tobytes())
        hashed.update(labels.cpu().numpy().tobytes())
    return hashed.hexdigest()
