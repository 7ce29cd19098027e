"""Loss and accuracy over a whole split, every sample counted once, the split shared out over the ranks."""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import nn
from torch.nn import functional

from dist_train.cluster.communicator import Communicator
from dist_train.data.plan import BatchPlan
from dist_train.data.source import BatchRequest, SampleSource
from dist_train.training.compute import Compute


@dataclass(frozen=True)
class Evaluation:
    """Mean loss and accuracy of `samples` samples; the loss is NaN or infinite where a sample's is."""

    loss: float
    accuracy: float
    samples: int

    @property
    def is_finite(self) -> bool:
        """Whether the loss is a number."""
        return math.isfinite(self.loss)


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

    The split is cut into batches in order, whatever the number of ranks, and each batch's sum has a slot of its
    own: the result does not depend on that number. Losses are float64, so that any finite float32 logits have a
    finite loss. A sample whose loss is not finite counts as classified wrongly. `after_batch` is called after each
    batch of this rank.
    """
    plan = BatchPlan(count, batch_size)
    sums = torch.zeros(2, len(plan.micro_batches), dtype=torch.float64, device=compute.device)
    was_training = model.training
    model.eval()
    share = plan.share(comm.rank, comm.size)
    samples.prefetch(BatchRequest(torch.arange(batch.start, batch.stop), None) for batch in share)
    with torch.inference_mode(), compute.autocast():
        for batch in share:
            inputs, labels = samples.plain(batch.start, batch.stop)
            logits = model(inputs).double()
            losses = functional.cross_entropy(logits, labels, reduction="none")
            sums[0, batch.index] = losses.sum()
            sums[1, batch.index] = ((logits.argmax(dim=1) == labels) & losses.isfinite()).sum()
            after_batch()
    model.train(was_training)
    # Every slot is zero but on one rank: a float sum over the ranks is exact.
    comm.allreduce_async(sums, "evaluation").wait()
    losses_of_batches, correct = sums.tolist()
    return Evaluation(math.fsum(losses_of_batches) / count, sum(correct) / count, count)
