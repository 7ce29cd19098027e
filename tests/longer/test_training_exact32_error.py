"""How accurate a sum of 32-bit integers is, along runs: at least as much as one of float32, added up in order."""

from __future__ import annotations

from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from dist_train.cluster.communicator import Alone
from dist_train.training.accumulators import Bucket, Exact32Accumulator
from dist_train.training.reduction import GradientReduction, buckets_of
from dist_train.training.trainer import Trainer
from tests.unit.small_trainers import build_trainer, small_config

MOMENTS = (2, 5, 9, 14, 20)
MICRO_BATCHES = 64


class Keeping(Exact32Accumulator):
    """Keeps the gradient of each micro-batch."""

    seen: list[Tensor]

    def clear(self) -> None:
        super().clear()
        self.seen = []

    def add(self, bucket: Bucket) -> None:
        self.seen.append(self._gradients[bucket.part].clone())
        super().add(bucket)


@dataclass(frozen=True)
class Errors:
    """Euclidean norms of the errors of two sums, over that of the sum in float64."""

    exact32: float
    in_order: float


def errors_along(trainer: Trainer, moments: tuple[int, ...]) -> list[Errors]:
    """Train, and return the errors of the gradient in the updates `moments`."""
    step = trainer.take_step
    step.reduction.close()
    keeping = Keeping(step.weights, trainer.comm, MICRO_BATCHES, trainer.progress)
    # One bucket, so that each gradient is kept as a whole.
    whole = GradientReduction(step.weights, keeping, buckets_of(step.weights, len(step.weights.values)))
    trainer.take_step = replace(step, reduction=whole)
    found = []
    while trainer.progress.step < moments[-1]:
        trainer.advance()
        if trainer.progress.step in moments:
            found.append(errors_of(keeping.seen, step.weights.gradients))
    return found


def errors_of(gradients: list[Tensor], summed: Tensor) -> Errors:
    """Return the errors of `summed`, and of adding up `gradients` in order."""
    assert len(gradients) == MICRO_BATCHES
    true = torch.stack(gradients).double().sum(0)
    in_order = torch.zeros_like(summed)
    for gradient in gradients:
        in_order += gradient
    return Errors(*(float((each.double() - true).norm() / true.norm()) for each in (summed, in_order)))


@pytest.mark.parametrize("model", ["vgg9", pytest.param("resnet18", marks=pytest.mark.lengthy)])
def test_the_sum_is_as_accurate_as_one_of_float32_in_order_all_along_a_run(tmp_path: Path, model: str) -> None:
    sections: dict[str, Any] = {
        "run": {"epochs": 30},
        "data": {"synthetic_samples": 4 * MICRO_BATCHES},
        "model": {"name": model},
        "batch": {"global_size": 4 * MICRO_BATCHES, "micro_size": 4},
        "comm": {"reduction": "exact32"},
    }
    trainer = build_trainer(small_config(**sections), tmp_path, Alone())
    errors = errors_along(trainer, MOMENTS)
    assert len(errors) == len(MOMENTS)
    assert all(0 < each.exact32 <= each.in_order for each in errors), errors
