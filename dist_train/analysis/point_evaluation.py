"""Loss and accuracy of one network at many places of weight space, its data in memory.

A batch is computed by one thread, and several threads take batches in turn, each with a copy of the network: that is
faster than threads within an operation, and the result's bits do not depend on how many there are.
"""

from __future__ import annotations

import copy
import math
from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from itertools import count
from typing import NamedTuple

import torch
from torch import nn
from torch.nn import functional

from dist_train.analysis.landscape_points import Place
from dist_train.models.batch_statistics import BatchStatistics
from dist_train.models.norms import norm_modules
from dist_train.optim.flat_weights import FlatWeights
from dist_train.training.compute import Compute

Batch = tuple[torch.Tensor, torch.Tensor]
"""Inputs [n, ...] and labels [n] on the device."""
LossSum = Callable[[torch.Tensor, torch.Tensor], torch.Tensor]
"""(outputs, labels) -> the sum of the samples' losses."""


class Measured(NamedTuple):
    """Mean loss and accuracy over a split; NaN where they cannot be computed."""

    loss: float
    accuracy: float


def cross_entropy_sum(outputs: torch.Tensor, labels: torch.Tensor) -> torch.Tensor:
    """Return the sum of the samples' cross entropies."""
    return functional.cross_entropy(outputs.float(), labels, reduction="sum")


class PointEvaluator:
    """Evaluates a network anywhere, on the same batches each time. To be closed: it keeps threads."""

    def __init__(
        self,
        model: nn.Module,
        splits: Sequence[Sequence[Batch]],
        statistics_batches: Sequence[Batch],
        compute: Compute,
        *,
        threads: int = 1,
        loss_sum: LossSum = cross_entropy_sum,
    ) -> None:
        """Evaluate copies of `model` on `splits`.

        Running statistics are recomputed from `statistics_batches`; where there are none, they are the place's.
        """
        self._splits = [list(split) for split in splits]
        self._statistics_batches = list(statistics_batches)
        self._compute = compute
        self._loss_sum = loss_sum
        batches = max(sum(map(len, self._splits)), len(self._statistics_batches))
        lanes = 1 if compute.device.type == "cuda" else max(1, min(threads, batches))
        self._lanes = [_Lane(model, compute.device) for _ in range(lanes)]
        self._pool = ThreadPoolExecutor(lanes) if lanes > 1 else None

    def evaluate(self, place: Place) -> list[Measured]:
        """Return what each split gives at `place`."""
        for lane in self._lanes:
            lane.move(place)
        if self._statistics_batches and not self._recompute_statistics():
            return [Measured(math.nan, math.nan)] * len(self._splits)
        batches = [batch for split in self._splits for batch in split]
        sums = torch.stack(self._spread(batches, self._measure)).tolist()
        measured, start = [], 0
        for split in self._splits:
            stop = start + len(split)
            samples = sum(len(labels) for _, labels in split)
            # Batch by batch, and in order: the sum is the same whichever thread took which.
            losses, correct = zip(*sums[start:stop], strict=True)
            measured.append(Measured(sum(losses) / samples, sum(correct) / samples))
            start = stop
        return measured

    def close(self) -> None:
        """End the threads."""
        if self._pool is not None:
            self._pool.shutdown(cancel_futures=True)

    def _recompute_statistics(self) -> bool:
        """Take the statistics of the place's weights from training data; False where they are out of range."""
        for lane in self._lanes:
            lane.model.train()
            lane.statistics.clear()
        self._spread(self._statistics_batches, _see)
        samples = sum(len(labels) for _, labels in self._statistics_batches)
        sums = torch.stack([lane.statistics.sums for lane in self._lanes]).sum(dim=0)
        for lane in self._lanes:
            lane.statistics.absorb(sums, samples, momentum=1.0)
            lane.model.eval()
        return not any(bool(lane.statistics.out_of_range) for lane in self._lanes)

    def _measure(self, lane: _Lane, batch: Batch) -> torch.Tensor:
        inputs, labels = batch
        outputs = lane.model(inputs)
        correct = (outputs.argmax(dim=1) == labels).sum()
        return torch.stack([self._loss_sum(outputs, labels).double(), correct.double()])

    def _spread(self, batches: Sequence[Batch], work: Callable[[_Lane, Batch], torch.Tensor]) -> list[torch.Tensor]:
        """Return what `work` gives for each batch, in order; each lane takes the next one that nobody has."""
        results: list[torch.Tensor] = [torch.empty(0)] * len(batches)
        turn = count()

        def run(lane: _Lane) -> None:
            with torch.inference_mode(), self._compute.autocast():
                while (index := next(turn)) < len(batches):
                    results[index] = work(lane, batches[index])

        if self._pool is None:
            run(self._lanes[0])
        else:
            for done in [self._pool.submit(run, lane) for lane in self._lanes]:
                done.result()
        return results


class _Lane:
    """A copy of the network that one thread computes with."""

    def __init__(self, model: nn.Module, device: torch.device) -> None:
        self.model = copy.deepcopy(model).to(device).eval()
        self.weights = FlatWeights(self.model)
        self.norms = norm_modules(self.model)
        self.statistics = BatchStatistics(self.norms, device)

    def move(self, place: Place) -> None:
        """Take the state of `place`."""
        self.weights.values.copy_(place.weights)
        start = 0
        for norm in self.norms:
            for statistic in (norm.running_mean, norm.running_var):
                statistic.copy_(place.statistics[start : start + len(statistic)])
                start += len(statistic)


def _see(lane: _Lane, batch: Batch) -> torch.Tensor:
    lane.model(batch[0])
    lane.statistics.collect()
    return batch[1]


def place_of(model: nn.Module) -> Place:
    """Return where `model` is: copies of its weights and statistics, on the CPU."""
    weights = FlatWeights(copy.deepcopy(model)).values.detach().cpu()
    statistics = [statistic for norm in norm_modules(model) for statistic in (norm.running_mean, norm.running_var)]
    return Place(weights, torch.cat([*statistics, torch.zeros(0)]).detach().cpu())


def variances_of(model: nn.Module) -> torch.Tensor:
    """Return which of the statistics of `place_of` are variances, bool [m]."""
    channels = [len(norm.running_var) for norm in norm_modules(model)]
    return torch.tensor([is_variance for many in channels for is_variance in (False,) * many + (True,) * many]).bool()
