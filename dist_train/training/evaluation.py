"""Loss and accuracy over a split, and norm statistics recomputed from training data, over all ranks."""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import nn
from torch.nn import functional

from dist_train.cluster.communicator import Communicator
from dist_train.data.images import BatchRequest, SampleSource
from dist_train.data.plan import BatchPlan
from dist_train.models.norms import BatchStatistics, norm_modules
from dist_train.outcome import DivergedError
from dist_train.randomness import generator
from dist_train.training.compute import Compute
from dist_train.training.reduction import Tally


@dataclass(frozen=True)
class Evaluation:
    """Mean loss and accuracy of `samples` samples; the loss is NaN or infinite where a sample's is."""

    loss: float
    accuracy: float
    samples: int


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


def statistics_samples(training_samples: int, wanted: int, micro_size: int, seed: int) -> torch.Tensor:
    """Return the training samples that statistics are taken from: a fixed random choice, int64 [about `wanted`].

    One fewer where the last micro-batch would hold a single sample, which has no variance.
    """
    order = torch.randperm(training_samples, generator=generator(seed, "norm statistics"))
    count = min(wanted, training_samples)
    return order[: count - 1 if count % micro_size == 1 and count > 1 else count]


def recompute_statistics(
    model: nn.Module,
    samples: SampleSource,
    indices: torch.Tensor,
    *,
    micro_size: int,
    compute: Compute,
    comm: Communicator,
) -> None:
    """Replace the running statistics of the norms of `model` by those of the training samples `indices`, not augmented.

    They are cut into micro-batches as in training, shared out, and summed as integers.

    Raises:
        DivergedError: the statistics are not finite, or out of range; on all ranks alike.
    """
    statistics = BatchStatistics(norm_modules(model), compute.device)
    tally = Tally(comm, statistics, compute.device)
    was_training = model.training
    model.train()
    share = BatchPlan(len(indices), micro_size).share(comm.rank, comm.size)
    samples.prefetch(BatchRequest(indices[batch.start : batch.stop], None) for batch in share)
    with torch.no_grad(), compute.autocast():
        for batch in share:
            model(samples.unaugmented(indices[batch.start : batch.stop])[0])
            statistics.collect()
    model.train(was_training)
    tally.send()
    total = tally.result()
    if total.out_of_range:
        raise DivergedError("the norms' statistics are not finite or out of range", code="statistics-not-finite")
    statistics.absorb(total.statistics, len(indices), momentum=1.0)
