"""The loss of a fixed set of samples as a function of all trainable weights, and its derivatives."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from typing import TypeVar

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor, nn
from torch.nn import functional

from dist_train.models.norms import norm_modules
from dist_train.optim.flat_weights import FlatWeights

Result = TypeVar("Result")

Vector = NDArray[np.float64]
"""All trainable weights one after the other, or a direction among them: [count], no padding."""

Batch = tuple[Tensor, Tensor]
"""Inputs [n, ...] and labels int64 [n], on the model's device."""


def cross_entropy(outputs: Tensor, labels: Tensor) -> Tensor:
    """Return the sum of the samples' cross entropies, in float64.

    The logits are float32, but a sample that the network is sure of has a loss that float32 rounds to zero.
    """
    return functional.cross_entropy(outputs.double(), labels, reduction="sum")


class SubsetLoss:
    """The mean loss of `batches` as a function of the weights of `model`: passes in float32, vectors in float64.

    Whether norms use their running statistics or each batch's own is the model's own mode, eval or train.
    Between calls the model holds its clean weights, those it came with bit-identically.

    Several threads take batches in turn, and sums go by the batches' order: with one thread an operation (which is
    for the caller to set) the result's bits do not depend on how many there are.
    """

    def __init__(
        self,
        model: nn.Module,
        batches: Sequence[Batch],
        summed_loss: Callable[[Tensor, Tensor], Tensor] = cross_entropy,
        threads: int = 1,
    ) -> None:
        """Take `model`, float32, whose weights move into one buffer; `summed_loss` gives a batch's sum."""
        self.weights = FlatWeights(model)
        self._model = model
        self._norms = norm_modules(model)
        self._batches = tuple(batches)
        self._samples = sum(len(labels) for _, labels in self._batches)
        self._summed_loss = summed_loss
        self._threads = threads
        self._positions = self.weights.mask(()).nonzero().flatten()
        self._clean = self.weights.values.clone()

    @property
    def count(self) -> int:
        """Number of trainable weights."""
        return len(self._positions)

    @property
    def device(self) -> torch.device:
        """The model's device."""
        return self._clean.device

    @property
    def clean(self) -> Tensor:
        """The clean weights as the flat buffer has them, padding included; not to be written to."""
        return self._clean

    def point(self) -> Vector:
        """Return the clean weights."""
        return self._vector(self._clean)

    def value_at_flat(self, values: Tensor) -> float:
        """Return the loss where the flat buffer is `values`, padding included."""

        def work(batch: Batch) -> float:
            with torch.no_grad():
                return float(self._loss_of(batch))

        with self._at(values):
            return sum(self._spread(work))

    def value_and_gradient(self, point: Vector) -> tuple[float, Vector]:
        """Return the loss at `point` and its gradient."""

        def work(batch: Batch) -> tuple[float, Tensor]:
            loss = self._loss_of(batch)
            gradients = torch.autograd.grad(loss, self.weights.parameters, materialize_grads=True)
            return float(loss.detach()), _joined(gradients)

        with self._at(self._flat(point)):
            values, gradients = zip(*self._spread(work), strict=True)
        return sum(values), self._summed(gradients)

    def hessian_product(self, direction: Vector) -> Vector:
        """Return the Hessian at the clean weights times `direction`."""
        flat = self._flat(direction)
        parts = [flat[segment.start : segment.stop].view(segment.shape) for segment in self.weights.segments]
        weights = self.weights.parameters

        def work(batch: Batch) -> Tensor:
            loss = self._loss_of(batch)
            gradients = torch.autograd.grad(loss, weights, create_graph=True, materialize_grads=True)
            return _joined(torch.autograd.grad(gradients, weights, parts, materialize_grads=True))

        with self._at(self._clean):
            return self._summed(self._spread(work))

    def accuracy(self) -> float:
        """Return the fraction of the samples that the clean weights classify rightly."""

        def work(batch: Batch) -> int:
            with torch.no_grad():
                return int((self._model(batch[0]).argmax(1) == batch[1]).sum())

        with self._at(self._clean):
            return sum(self._spread(work)) / self._samples

    def _spread(self, work: Callable[[Batch], Result]) -> list[Result]:
        """Return what `work` gives for each batch, in order."""
        if self._threads == 1:
            return [work(batch) for batch in self._batches]
        with ThreadPoolExecutor(self._threads) as pool:
            return list(pool.map(work, self._batches))

    @contextmanager
    def _at(self, values: Tensor) -> Iterator[None]:
        """Be at flat `values` within the block; after it the clean weights are back bit-identically."""
        try:
            self.weights.values.copy_(values)
            yield
        finally:
            self.weights.values.copy_(self._clean)
            for norm in self._norms:
                norm.seen.clear()

    def _loss_of(self, batch: Batch) -> Tensor:
        inputs, labels = batch
        return self._summed_loss(self._model(inputs), labels) / self._samples

    def _flat(self, vector: Vector) -> Tensor:
        flat = torch.zeros_like(self._clean)
        flat[self._positions] = torch.from_numpy(vector).to(self.device, torch.float32)
        return flat

    def _vector(self, flat: Tensor) -> Vector:
        vector: Vector = flat[self._positions].double().cpu().numpy()
        return vector

    def _summed(self, parts: Sequence[Tensor]) -> Vector:
        total = torch.zeros(self.count, dtype=torch.float64, device=self.device)
        for part in parts:
            total += part
        summed: Vector = total.cpu().numpy()
        return summed


def _joined(tensors: Sequence[Tensor]) -> Tensor:
    return torch.cat([tensor.detach().reshape(-1) for tensor in tensors]).double()
