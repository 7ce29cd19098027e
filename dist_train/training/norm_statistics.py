"""Norm statistics recomputed from training data with the clean weights (method.md's soundest choice)."""

from __future__ import annotations

import torch
from torch import nn

from dist_train.cluster.communicator import Communicator
from dist_train.data.plan import BatchPlan
from dist_train.data.source import BatchRequest, SampleSource
from dist_train.models.batch_statistics import BatchStatistics
from dist_train.models.norms import norm_modules
from dist_train.outcome import DivergedError
from dist_train.randomness import generator
from dist_train.training.compute import Compute
from dist_train.training.tally import Tally


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
        raise DivergedError("the norms' statistics are not finite or out of range")
    statistics.absorb(total.statistics, len(indices), momentum=1.0)
