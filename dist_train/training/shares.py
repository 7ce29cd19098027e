"""Which part of a global batch a rank computes, and what the norms of a model say to the other ranks'."""

from __future__ import annotations

import torch

from dist_train.cluster.communicator import Communicator
from dist_train.config import ModelSettings
from dist_train.data.plan import BatchPlan, MicroBatch
from dist_train.models.normalization import SumOverRanks
from dist_train.training.step_clock import StepClock


def shares_micro_batches(settings: ModelSettings) -> bool:
    """Whether all ranks compute a part of every micro-batch, because its samples are normalized together."""
    return settings.norm == "sync"


def share_of(settings: ModelSettings, plan: BatchPlan, rank: int, size: int) -> tuple[MicroBatch, ...]:
    """Return what rank `rank` of `size` computes of a global batch.

    Raises:
        UsageError: a micro-batch that all share has fewer samples than there are ranks.
    """
    return plan.slices(rank, size) if shares_micro_batches(settings) else plan.share(rank, size)


def sum_over(settings: ModelSettings, comm: Communicator, clock: StepClock) -> SumOverRanks | None:
    """Return the sum that passes over shared micro-batches need; None where micro-batches are not shared.

    `clock` counts it as a wait for the others.
    """
    if not shares_micro_batches(settings) or comm.size == 1:
        return None

    def sum_over_ranks(tensor: torch.Tensor, name: str) -> None:
        with clock.part("allreduce_wait"):
            comm.allreduce_async(tensor, name).wait()

    return sum_over_ranks
