"""The loss on a fixed set of samples as a function of all trainable weights, and its derivatives."""

from __future__ import annotations

import hashlib
import re
from collections.abc import Callable, Sequence
from contextlib import closing

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor, nn
from torch.nn.attention import SDPBackend, sdpa_kernel

from dist_train.analysis.landscape_points import (
    Batch,
    Replicas,
    Result,
    cross_entropy_sum,
    digest,
    refuse_precision,
    warn_of_kept_statistics,
)
from dist_train.analysis.sharpness_record import MeasuredCheckpoint, MeasuredData, SharpnessSettings
from dist_train.checkpoint.files import Stored
from dist_train.cluster.communicator import SingleProcess
from dist_train.cluster.devices import choose_device
from dist_train.config import Config
from dist_train.data.loader import SampleSource, open_splits, training_labels
from dist_train.data.plan import balanced_choice, stratified_choice
from dist_train.models.norms import collect_statistics, norm_modules
from dist_train.optim.flat_weights import FlatWeights
from dist_train.outcome import DivergedError, UsageError, refuse_nondeterministic
from dist_train.reproducible import generator
from dist_train.training.compute import Compute, set_up_compute, share_of_threads
from dist_train.training.evaluation import (
    recompute_statistics,
    statistics_samples,
    stored_config,
    stored_model,
    stored_normalization,
    warn_of_edited_plugins,
    warn_of_other_data,
)

Vector = NDArray[np.float64]
"""All trainable weights concatenated, or a direction in their space: [count], without padding."""


class SubsetLoss:
    """The mean loss on `batches` as a function of the weights of `model`: passes in float32, vectors in float64.

    The mode of the model's norms, eval or train, decides whether they use running or batch statistics. Between calls
    the model holds its original (clean) weights, bit-identically.

    Several threads take batches in turn, and sums are taken in the order of the batches: if the caller sets one
    intra-op thread, results are bit-identical for any number of threads.
    """

    def __init__(
        self,
        model: nn.Module,
        batches: Sequence[Batch],
        summed_loss: Callable[[Tensor, Tensor], Tensor] = cross_entropy_sum,
        threads: int = 1,
    ) -> None:
        """Move the weights of `model`, float32, into one flat buffer; `summed_loss` returns a batch's summed loss."""
        self.weights = FlatWeights(model)
        self._replicas = Replicas(model, threads)
        self._batches = tuple(batches)
        self._samples = sum(len(labels) for _, labels in self._batches)
        self._summed_loss = summed_loss
        self._positions = self.weights.mask(()).nonzero().flatten()
        self.count = len(self._positions)  # number of trainable weights
        self.clean = self.weights.values.clone()
        """The clean weights in the flat buffer's layout, padding included; read-only."""

    def point(self) -> Vector:
        """Return the clean weights."""
        point: Vector = self.clean[self._positions].double().cpu().numpy()
        return point

    def value_at_flat(self, values: Tensor) -> float:
        """Return the loss at the weights `values`, in the flat buffer's layout, padding included."""

        def work(model: nn.Module, batch: Batch) -> float:
            with torch.no_grad():
                return float(self._loss_of(model, batch))

        return sum(self._map_batches(work, values))

    def value_and_gradient(self, point: Vector) -> tuple[float, Vector]:
        """Return the loss at `point` and its gradient."""

        def work(model: nn.Module, batch: Batch) -> tuple[float, Tensor]:
            loss = self._loss_of(model, batch)
            return float(loss.detach()), self._gradient(loss)

        values, gradients = zip(*self._map_batches(work, self._flat(point)), strict=True)
        return sum(values), self._sum(gradients)

    def batch_gradients(self) -> tuple[list[Vector], list[int]]:
        """Return the mean gradient of each batch at the clean weights, and the batches' sizes."""

        def work(model: nn.Module, batch: Batch) -> Vector:
            mean = self._loss_of(model, batch) * (self._samples / len(batch[1]))
            gradient: Vector = self._gradient(mean).cpu().numpy()
            return gradient

        return self._map_batches(work, self.clean), [len(labels) for _, labels in self._batches]

    def hessian_product(self, direction: Vector) -> Vector:
        """Return the product of `direction` and the Hessian at the clean weights."""
        flat = self._flat(direction)
        parts = [flat[segment.start : segment.stop].view(segment.shape) for segment in self.weights.segments]

        def work(model: nn.Module, batch: Batch) -> Tensor:
            loss, weights = self._loss_of(model, batch), self.weights.parameters
            gradients = torch.autograd.grad(loss, weights, create_graph=True, materialize_grads=True)
            # Not torch's `grad_outputs`, which gives the same bits but imports SymPy, which takes most of a second.
            products = [(gradient * part).sum() for gradient, part in zip(gradients, parts, strict=True)]
            return self._gradient(torch.stack(products).sum())

        # torch's other kernels of attention have no second derivative
        with sdpa_kernel(SDPBackend.MATH):
            return self._sum(self._map_batches(work, self.clean))

    def accuracy(self) -> float:
        """Return the fraction of the samples that the clean weights classify correctly."""

        def work(model: nn.Module, batch: Batch) -> int:
            with torch.no_grad():
                return int((self._logits(model, batch[0]).argmax(1) == batch[1]).sum())

        return sum(self._map_batches(work, self.clean)) / self._samples

    def _map_batches(self, work: Callable[[nn.Module, Batch], Result], values: Tensor) -> list[Result]:
        """Return the result of `work` for each batch, in order, at the flat weights `values`; restore the clean ones.

        Raises UsageError if this device cannot do it.
        """
        self.weights.values.copy_(values)
        try:
            return self._replicas.map(work, self._batches)
        except RuntimeError as error:
            # For a second derivative, which training does not need.
            refuse_nondeterministic(error, "measure on another device, for example with run.device=cpu")
            if missing := re.search(r"derivative for (\S+) is not implemented", str(error)):
                raise UsageError(
                    f"torch has no second derivative of {missing[1]}: measure without the Hessian, for example "
                    f"with --only keskar,rise",
                    code="derivative-missing",
                ) from error
            raise
        finally:
            self.weights.values.copy_(self.clean)

    def _logits(self, model: nn.Module, inputs: Tensor) -> Tensor:
        logits: Tensor = model(inputs)
        for norm in norm_modules(model):
            norm.seen.clear()
        return logits

    def _loss_of(self, model: nn.Module, batch: Batch) -> Tensor:
        return self._summed_loss(self._logits(model, batch[0]), batch[1]) / self._samples

    def _gradient(self, value: Tensor) -> Tensor:
        """Return the gradient of `value`, float64 [count]."""
        gradients = torch.autograd.grad(value, self.weights.parameters, materialize_grads=True)
        return torch.cat([gradient.detach().reshape(-1) for gradient in gradients]).double()

    def _flat(self, vector: Vector) -> Tensor:
        flat = torch.zeros_like(self.clean)
        flat[self._positions] = torch.from_numpy(vector).to(self.clean.device, torch.float32)
        return flat

    def _sum(self, parts: Sequence[Tensor]) -> Vector:
        summed: Vector = sum(parts, torch.zeros_like(parts[0])).cpu().numpy()
        return summed


def open_stored_subset(
    stored: Stored, settings: SharpnessSettings, overrides: Sequence[str]
) -> tuple[SubsetLoss, MeasuredCheckpoint, MeasuredData]:
    """Return the loss of `stored` on the training images that `settings` choose, and records of checkpoint and data.

    The model is in eval mode, except for its norms if `settings.statistics` is "batch".

    Raises UsageError if the settings do not fit, or there are no data, or too few.
    """
    config = stored_config(stored.contents, overrides)
    warn_of_edited_plugins(stored.contents, config)
    precision = config.precision
    refuse_precision(stored, config, "sharpness is measured in float32: leave them out")
    # TF32's errors would look like curvature.
    exact = precision.model_copy(update={"compute": "float32", "tf32": False, "threads": 1})
    compute = set_up_compute(exact, choose_device(config.run.device, local_rank=0))
    chosen = choose_samples(training_labels(config.data, config.run.seed), config.data.image_format.classes, settings)
    model = stored_model(stored.contents, config).to(compute.device)
    if settings.statistics != "checkpoint":
        warn_of_kept_statistics(model)
    layout, normalization = precision.channels_last, stored_normalization(stored.contents)
    with closing(open_splits(config.data, config.run.seed, compute.device, layout, normalization)) as splits:
        warn_of_other_data(stored, splits)
        if settings.statistics == "recomputed":
            _recompute(model, splits.train, config, compute)
        batches = tuple(splits.train.read_all(cut(chosen, settings.batch_size)))
    model.eval()
    if settings.statistics == "batch":
        collect_statistics(model)
    checkpoint = MeasuredCheckpoint(path=str(stored.path), sha256=stored.sha256, step=stored.contents.step)
    data = MeasuredData(
        samples=len(chosen),
        sha256=digest(batches, hashlib.sha256()),
        layout="channels_last" if precision.channels_last else "contiguous",
        compute="float32",
    )
    threads = share_of_threads(SingleProcess()) if precision.threads == "auto" else precision.threads
    # One thread keeps a GPU busy.
    loss = SubsetLoss(model, batches, threads=threads if compute.device.type == "cpu" else 1)
    return loss, checkpoint, data


def choose_samples(labels: Tensor, classes: int, settings: SharpnessSettings) -> Tensor:
    """Return the indices of a seeded, shuffled choice in the proportions of the classes, int64: all if there are fewer
    than the default.

    Raises UsageError if there are fewer than `settings.samples` was set to.
    """
    samples = settings.samples if "samples" in settings.model_fields_set else min(settings.samples, len(labels))
    if samples > len(labels):
        raise UsageError(
            f"--samples is {samples}: choose at most {len(labels)}, the number of training images",
            code="option-range",
        )
    counts = torch.bincount(labels, minlength=classes)
    are_equal = samples == len(labels) or int(counts.max() - counts.min()) <= 1
    choose = balanced_choice if are_equal else stratified_choice
    chosen = choose(labels, samples, classes, settings.seed)
    return chosen[torch.randperm(len(chosen), generator=generator(settings.seed, "sharpness batches"))]


def cut(chosen: Tensor, batch_size: int) -> tuple[Tensor, ...]:
    """Split `chosen` into batches of `batch_size`; the remainder joins the last one, as in ghost norm's groups.

    A small last batch would have noisy statistics, and a single sample has none.
    """
    whole = max(1, len(chosen) // batch_size)
    return torch.tensor_split(chosen, [part * batch_size for part in range(1, whole)])


def _recompute(model: nn.Module, samples: SampleSource, config: Config, compute: Compute) -> None:
    if not norm_modules(model):
        return
    size = config.batch.micro_size
    assert size != "auto", "a run resolves it before it saves"
    indices = statistics_samples(len(samples), config.model.norm_samples, size, config.run.seed)
    try:
        recompute_statistics(model, samples, indices, micro_size=size, compute=compute, comm=SingleProcess())
    except DivergedError as error:
        raise DivergedError(f"there is nothing to measure: {error}", code="statistics-not-finite") from error
