"""Which micro-batches a rank computes, and their size with `batch.micro_size: auto`."""

from __future__ import annotations

from collections.abc import Callable
from functools import partial

import torch
from torch.nn import functional

from dist_train.cluster.communicator import Communicator, gather, run_on_all_ranks
from dist_train.config import ModelSettings
from dist_train.data.plan import BatchPlan, MicroBatch
from dist_train.models.normalization import SumOverRanks
from dist_train.outcome import OutOfMemoryError, UsageError
from dist_train.training.compute import Compute, fits_memory
from dist_train.training.measuring import StepClock


def shares_micro_batches(settings: ModelSettings) -> bool:
    """Whether each rank computes a part of every micro-batch, because sync norm normalizes its samples together."""
    return settings.norm == "sync"


def share_of(settings: ModelSettings, plan: BatchPlan, rank: int, size: int) -> tuple[MicroBatch, ...]:
    """Return the micro-batches, or parts of them, that rank `rank` of `size` computes.

    Raises UsageError if ranks share every micro-batch, and one has fewer samples than there are ranks.
    """
    return plan.slices(rank, size) if shares_micro_batches(settings) else plan.share(rank, size)


def sum_over(settings: ModelSettings, comm: Communicator, clock: StepClock) -> SumOverRanks | None:
    """Return the sum over ranks that sync norm needs; None without sync norm or with one rank.

    `clock` counts it as time spent waiting for the allreduce.
    """
    if not shares_micro_batches(settings) or comm.size == 1:
        return None

    def sum_over_ranks(tensor: torch.Tensor, name: str) -> None:
        with clock.part("allreduce_wait"):
            comm.allreduce_async(tensor, name).wait()

    return sum_over_ranks


_LARGEST = {"cpu": 128, "cuda": 2048}
"""By device type. On a CPU, larger micro-batches are no faster: they do not fit its caches."""


def find_micro_size(
    try_size: Callable[[int], None], *, global_size: int, device: torch.device, comm: Communicator, fewest: int = 2
) -> int:
    """Return the largest size that fits on every rank; `try_size` runs a forward and backward pass of a given size.

    Sizes are powers of two up to a rank's even share of the global batch. The result may be a little smaller, so that
    no micro-batch has fewer than `fewest` samples.

    Raises UsageError if not even the smallest size fits.
    """
    largest = min(_LARGEST[device.type], max(1, global_size // comm.size))
    fits = run_on_all_ranks(comm, lambda: _largest_that_fits(try_size, largest), "fit a micro-batch")
    smallest = min(size for (size,) in gather(comm, [fits], "micro_size"))
    return avoid_short_last_micro_batch(smallest, global_size, fewest)


def _largest_that_fits(try_size: Callable[[int], None], largest: int) -> int:
    """Try powers of two from 2 up to `largest`; if that is 1, try 1."""
    fits, size = 0, min(2, largest)
    while size <= largest and _fits(try_size, size):
        fits, size = size, 2 * size
    if fits == 0:
        raise UsageError(
            "not even the smallest micro-batch fits the device's memory: set a smaller model.width",
            code="out-of-memory",
        )
    return fits


def _fits(try_size: Callable[[int], None], size: int) -> bool:
    try:
        return fits_memory(partial(try_size, size))
    finally:
        # Free the blocks of this trial, which do not fit the next size. Does nothing if no GPU is in use.
        torch.cuda.empty_cache()


def avoid_short_last_micro_batch(micro_size: int, global_size: int, fewest: int = 2) -> int:
    """Return `micro_size`, or less if the last micro-batch would have fewer than `fewest` samples: norms need two."""
    for size in range(micro_size, fewest - 1, -1):
        if not 0 < global_size % size < fewest:
            return size
    return micro_size


def halve(micro_size: int, global_size: int) -> int:
    """Return about half of `micro_size`, which has run out of memory; raise OutOfMemoryError if it is 1."""
    if micro_size == 1:
        raise OutOfMemoryError("one sample does not fit the device's memory: set a smaller model.width")
    return avoid_short_last_micro_batch(-(-micro_size // 2), global_size)


def forward_and_backward(
    model: torch.nn.Module,
    shape: tuple[int, int, int],
    classes: int,
    compute: Compute,
    layout: torch.memory_format,
    size: int,
) -> None:
    """Run a forward and a backward pass of `model` on a blank micro-batch of `size` images in `layout`."""
    inputs = torch.empty(size, *shape, device=compute.device, memory_format=layout).zero_()
    labels = torch.arange(size, device=compute.device) % classes
    with compute.autocast():
        logits = model(inputs)
    torch.autograd.backward(functional.cross_entropy(logits.float(), labels))
    if compute.device.type == "cuda":
        torch.cuda.synchronize(compute.device)
