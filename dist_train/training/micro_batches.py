"""Which micro-batches a rank computes, and their size with `batch.micro_size: auto`."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from functools import partial

import torch

from dist_train.cluster.communicator import Communicator, gather_int, run_on_all_ranks
from dist_train.config import Config, ImageFormat, ModelSettings
from dist_train.models import Loss
from dist_train.models.norm_arithmetic import SumOverRanks
from dist_train.outcome import OutOfMemoryError, UsageError
from dist_train.training.compute import Compute, free_device_memory, runs_in_memory
from dist_train.training.measuring import StepClock


def shares_micro_batches(settings: ModelSettings) -> bool:
    """Whether each rank computes a part of every micro-batch, because sync norm normalizes its samples together."""
    return settings.norm == "sync"


def sums_floats(config: Config) -> bool:
    """Whether ranks sum floats, gradients or sync norm's statistics: their bits depend on the order of the ranks."""
    return not config.comm.is_exact or shares_micro_batches(config.model)


def fewest_samples(settings: ModelSettings, ranks: int) -> int:
    """Return how many samples a micro-batch needs: two for statistics, and with sync norm one on each of the ranks."""
    if settings.norm in ("group", "none"):
        return 1
    return max(2, ranks) if shares_micro_batches(settings) else 2


def sum_for_sync_norm(settings: ModelSettings, comm: Communicator, clock: StepClock) -> SumOverRanks | None:
    """Return the sum over ranks that sync norm needs; None without sync norm or with one rank.

    `clock` counts its time as waiting for the allreduce.
    """
    if not shares_micro_batches(settings) or comm.size == 1:
        return None

    def sum_over_ranks(tensor: torch.Tensor, name: str) -> None:
        with clock.part("allreduce_wait"):
            comm.allreduce_async(tensor, name).wait()

    return sum_over_ranks


_LARGEST_SIZES = {"cpu": 128, "cuda": 2048}
"""By device type. On a CPU, larger micro-batches are no faster: they do not fit its caches."""


def find_micro_size(
    try_size: Callable[[int], None],
    *,
    global_sizes: Sequence[int],
    device: torch.device,
    comm: Communicator,
    fewest: int = 2,
) -> int:
    """Return the largest size that fits on every rank; `try_size` runs a forward and backward pass of a given size.

    Sizes are powers of two, up to a rank's even share of the first of `global_sizes` (the sizes of the batch schedule)
    or, if that is larger, the first that is at least `fewest`. The result may be a little smaller, so that every
    micro-batch has `fewest` samples or more.

    Raises UsageError if not even the smallest size fits, or none leaves every micro-batch enough samples.
    """
    enough = 1 << (fewest - 1).bit_length()
    largest = min(max(_LARGEST_SIZES[device.type], enough), global_sizes[0], max(enough, global_sizes[0] // comm.size))
    fits = run_on_all_ranks(comm, lambda: _largest_that_fits(try_size, largest), "fit a micro-batch")
    smallest = min(gather_int(comm, fits, "micro_size"))

    def choose_size() -> int:
        size = avoid_short_last_micro_batch(smallest, global_sizes, fewest)
        if size is None:
            raise UsageError(
                f"micro-batches of at most {smallest} samples leave one of fewer than {fewest}, which the norm cannot "
                f"normalize: set batch.micro_size, another batch.global_size, or fewer ranks (--max-ranks)",
                code="one-sample-left",
            )
        return size

    return run_on_all_ranks(comm, choose_size, "divide the batch")


def _largest_that_fits(try_size: Callable[[int], None], largest: int) -> int:
    """Try powers of two from 2 up to `largest`; if that is 1, try 1."""
    fits, size = 0, min(2, largest)
    while size <= largest and runs_in_memory(partial(try_size, size)):
        torch.cuda.empty_cache()  # the blocks of this trial do not fit the next size
        fits, size = size, 2 * size
    free_device_memory()  # of the trial that failed
    if fits == 0:
        raise UsageError(
            "not even the smallest micro-batch fits the device's memory: set a smaller model.width",
            code="out-of-memory",
        )
    return fits


def avoid_short_last_micro_batch(micro_size: int, global_sizes: Sequence[int], fewest: int) -> int | None:
    """Return `micro_size`, or less, so that every micro-batch has `fewest` samples or more; None if no size does."""
    sizes = range(micro_size, fewest - 1, -1)
    return next((size for size in sizes if not any(0 < each % size < fewest for each in global_sizes)), None)


def halve(micro_size: int, global_sizes: Sequence[int], fewest: int) -> int:
    """Return about half of `micro_size`, with which memory ran out.

    Raises OutOfMemoryError if no smaller size leaves every micro-batch `fewest` samples.
    """
    smaller = avoid_short_last_micro_batch(-(-micro_size // 2), global_sizes, fewest)
    if smaller is None or smaller == micro_size:
        raise OutOfMemoryError(
            f"a micro-batch of {micro_size} does not fit the device's memory, and no smaller one is possible: set a "
            f"smaller model.width"
        )
    return smaller


def forward_and_backward(
    model: torch.nn.Module, loss: Loss, images: ImageFormat, compute: Compute, layout: torch.memory_format, size: int
) -> None:
    """Run a forward and a backward pass of `model` and `loss` on a blank micro-batch of `size` images in `layout`."""
    inputs = torch.empty(size, *images.shape, device=compute.device, memory_format=layout).zero_()
    labels = torch.arange(size, device=compute.device) % images.classes
    with compute.autocast():
        logits = model(inputs)
    torch.autograd.backward(loss(logits.float(), labels, reduction="sum"))
    if compute.device.type == "cuda":
        torch.cuda.synchronize(compute.device)
