"""Loss and accuracy over a whole split, every sample counted once, the split shared out over the workers."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import nn
from torch.nn import functional

from dist_train.cluster.workers import Workers
from dist_train.data.plan import BatchPlan
from dist_train.data.source import SampleSource, Wanted
from dist_train.models.batch_statistics import BatchStatistics
from dist_train.training.compute import Compute
from dist_train.training.tally import Tally


@dataclass(frozen=True)
class Evaluation:
    """Mean loss and accuracy of `samples` samples."""

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
    workers: Workers,
    after_batch: Callable[[], None] = lambda: None,
) -> Evaluation:
    """Return loss and accuracy of `model` on the first `count` of `samples`, the same on all workers.

    The split is cut into batches in order, whatever the number of workers, and summed as integers: the
    result does not depend on that number. A loss that is not finite is NaN. `after_batch` is called after each
    batch of this worker.
    """
    tally = Tally(workers, BatchStatistics((), compute.device), compute.device)
    was_training = model.training
    model.eval()
    share = BatchPlan(count, batch_size).share(workers.rank, workers.size)
    samples.expect(Wanted(torch.arange(batch.start, batch.stop), None) for batch in share)
    with torch.inference_mode(), compute.autocast():
        for batch in share:
            inputs, labels = samples.plain(batch.start, batch.stop)
            logits = model(inputs).float()
            tally.add(functional.cross_entropy(logits, labels, reduction="sum"), logits, labels)
            after_batch()
    model.train(was_training)
    tally.send()
    total = tally.result()
    assert total.samples == count, "every sample is counted once"
    return Evaluation(float("nan") if total.out_of_range else total.loss, total.accuracy, count)
