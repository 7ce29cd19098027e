"""The accuracy of integer sums along runs: 32 bits at least as accurate as float32, 16 bits as documented.

`python -m tests.longer.test_training_exact32_error` prints the errors that docs/exact_sums.md states.
"""

from __future__ import annotations

from dataclasses import dataclass, replace
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any, Literal

import pytest
import torch
from torch import Tensor

from dist_train.cluster.communicator import SingleProcess
from dist_train.training.accumulators import Bucket, GridAccumulator
from dist_train.training.reduction import GradientReduction, buckets_of
from dist_train.training.trainer import Trainer
from tests.unit.small_trainers import build_trainer, small_config

UPDATES = (2, 5, 9, 14, 20)
MICRO_BATCHES = 64
MAX_ERROR_OF_16_BITS = 0.02


class RecordingAccumulator(GridAccumulator):
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
    """Norms of the errors of sums, relative to the norm of the sum in float64.

    `integers` are the run's own sums, `in_order` float32 added in order; `fp16` and `bfloat16` add the sums of `RANKS`
    ranks in that type.
    """

    integers: float
    in_order: float
    fp16: float
    bfloat16: float


RANKS = 8


def errors_along(trainer: Trainer, updates: tuple[int, ...], bits: Literal[16, 32] = 32) -> list[Errors]:
    """Train, and return the errors of the gradients of `updates`."""
    step = trainer.training_step
    step.reduction.close()
    accumulator = RecordingAccumulator(step.weights, trainer.comm, MICRO_BATCHES, trainer.progress, bits)
    # With one bucket each gradient is kept in one piece.
    whole = GradientReduction(step.weights, accumulator, buckets_of(step.weights, len(step.weights.values)))
    trainer.training_step = replace(step, reduction=whole)
    found = []
    while trainer.progress.step < updates[-1]:
        trainer.advance()
        if trainer.progress.step in updates:
            found.append(errors_of(accumulator.seen, step.weights.gradients))
    return found


def errors_of(gradients: list[Tensor], summed: Tensor) -> Errors:
    """Return the errors of `summed`, and of other sums of `gradients`."""
    assert len(gradients) == MICRO_BATCHES
    true = torch.stack(gradients).double().sum(0)
    of_ranks = [in_order(gradients[rank::RANKS]) for rank in range(RANKS)]
    sums = (
        summed,
        in_order(gradients),
        in_order([each.half() for each in of_ranks]),
        in_order([each.bfloat16() for each in of_ranks]),
    )
    return Errors(*(float((each.double() - true).norm() / true.norm()) for each in sums))


def in_order(gradients: list[Tensor]) -> Tensor:
    """Return the sum of `gradients` in their own type, one after the other."""
    total = torch.zeros_like(gradients[0])
    for gradient in gradients:
        total += gradient
    return total


def tiny_trainer(folder: Path, model: str, reduction: str) -> Trainer:
    """Return the trainer of 20 updates of `MICRO_BATCHES` micro-batches of 4 samples."""
    sections: dict[str, Any] = {
        "run": {"epochs": 30},
        "data": {"synthetic_samples": 4 * MICRO_BATCHES},
        "model": {"name": model},
        "batch": {"global_size": 4 * MICRO_BATCHES, "micro_size": 4},
        "comm": {"reduction": reduction},
    }
    return build_trainer(small_config(**sections), folder, SingleProcess())


@pytest.mark.parametrize("model", ["vgg9", pytest.param("resnet18", marks=pytest.mark.lengthy)])
def test_exact32_is_at_least_as_accurate_as_float32_in_order(tmp_path: Path, model: str) -> None:
    errors = errors_along(tiny_trainer(tmp_path, model, "exact32"), UPDATES)
    assert len(errors) == len(UPDATES)
    assert all(0 < each.integers <= each.in_order for each in errors), errors


@pytest.mark.parametrize("model", ["vgg9", pytest.param("resnet18", marks=pytest.mark.lengthy)])
def test_exact16_has_the_documented_error(tmp_path: Path, model: str) -> None:
    errors = errors_along(tiny_trainer(tmp_path, model, "exact16"), UPDATES, bits=16)
    assert len(errors) == len(UPDATES)
    assert all(each.fp16 < each.integers < MAX_ERROR_OF_16_BITS for each in errors), errors


if __name__ == "__main__":
    for model in ("vgg9", "resnet18"):
        for bits in (32, 16):
            with TemporaryDirectory(ignore_cleanup_errors=True) as folder:
                for error in errors_along(tiny_trainer(Path(folder), model, f"exact{bits}"), UPDATES, bits):
                    print(model, bits, error)
