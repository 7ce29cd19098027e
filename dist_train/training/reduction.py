"""From the gradients of micro-batches to the gradient of the global batch, over all ranks.

The flat gradient is cut into buckets. While the last micro-batch of a rank is still in its backward
pass, each bucket is sent as soon as its gradients are complete, so that the allreduce overlaps it.
"""

from __future__ import annotations

import struct
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from functools import partial
from itertools import accumulate, groupby, takewhile
from typing import Literal, get_args

import torch
from torch import nn

from dist_train.checkpoint.state import Progress
from dist_train.cluster.communicator import Communicator, Pending, run_on_all_ranks
from dist_train.config import Config
from dist_train.data.plan import BatchPlan
from dist_train.models.norms import BatchStatistics
from dist_train.optim.flat_weights import FlatWeights
from dist_train.optim.noise import Noise
from dist_train.outcome import UsageError
from dist_train.reproducible import LOSSES
from dist_train.training.accumulators import (
    AdasumAccumulator,
    Bucket,
    ExactAccumulator,
    FloatAccumulator,
    GradientAccumulator,
    GridAccumulator,
    HalfAccumulator,
)
from dist_train.training.micro_batches import shares_micro_batches

_BUCKET = 1 << 20
"""Fewest gradients in a bucket. No backward pass hides the allreduce of the last bucket."""
_MOST_IN_16_BITS = 256
"""Most gradients of micro-batches that are summed in 16 bits, of which each then has about six."""


class GradientReduction:
    """One step: `start`, then each micro-batch's backward pass within `micro_batch`, then `send` and `finish`."""

    def __init__(self, weights: FlatWeights, accumulator: GradientAccumulator, buckets: Sequence[Bucket]) -> None:
        self._weights = weights
        self.accumulator = accumulator
        """Its `out_of_range` is valid after `send`."""
        self._buckets = tuple(buckets)
        self._loss_scale = 1.0
        self._missing: dict[int, int] = {}
        self._pending: dict[int, Pending] = {}
        # The last bucket needs no hooks: it is complete when the backward pass is.
        self._hooks = [
            parameter.register_post_accumulate_grad_hook(partial(self._note_gradient, bucket))
            for bucket in self._buckets[:-1]
            for parameter in weights.parameters[bucket.first : bucket.last]
        ]

    def close(self) -> None:
        """Remove the hooks from the parameters."""
        for hook in self._hooks:
            hook.remove()

    def start(self, loss_scale: float = 1.0, *, at_zero: bool = False) -> None:
        """Begin a step, in which losses are multiplied by `loss_scale`, a power of two, and gradients divided by it.

        With `at_zero`, sums begin at zero: every micro-batch then runs the same operations, as a CUDA graph needs.
        """
        self._loss_scale = loss_scale
        self.accumulator.clear()
        self._pending.clear()
        self._missing.clear()
        for bucket in self._buckets if at_zero else ():
            self.accumulator.begin(bucket)

    @contextmanager
    def micro_batch(self) -> Iterator[None]:
        """Take the gradients of the backward pass within the block."""
        self._weights.detach_gradients()
        try:
            yield
            for bucket in self._buckets:
                if self._missing.get(bucket.index) != 0:  # else a hook has added it
                    self._add(bucket)
        finally:
            # Nothing is left to gather unless the pass failed.
            self._weights.gather_gradients(0, len(self._weights.parameters))

    @contextmanager
    def last_micro_batch(self) -> Iterator[None]:
        """Take the gradients of the backward pass within the block, and send each bucket once it is complete."""
        self._missing = {bucket.index: bucket.last - bucket.first for bucket in self._buckets}
        with self.micro_batch():
            yield

    def send(self) -> None:
        """Start the sums that are not under way yet: all of them, on a rank that had no micro-batch."""
        self._send_before(len(self._buckets))

    def finish(self) -> None:
        """Return when the gradients of `weights` are those of the global batch."""
        for bucket in self._buckets:
            self._pending[bucket.index].wait()
            self.accumulator.receive(bucket)

    def _note_gradient(self, bucket: Bucket, parameter: nn.Parameter) -> None:
        """Note that the gradient of `parameter`, in `bucket`, is complete, and send the buckets that are."""
        if bucket.index not in self._missing:
            return
        self._missing[bucket.index] -= 1
        if self._missing[bucket.index] == 0:
            self._add(bucket)
            complete = takewhile(lambda each: self._missing[each.index] == 0, self._buckets)
            self._send_before(len(list(complete)))

    def _send_before(self, stop: int) -> None:
        """Start the sums of the buckets before `stop`, in order: torch.distributed matches operations by order."""
        for bucket in self._buckets[len(self._pending) : stop]:
            self._pending[bucket.index] = self.accumulator.send(bucket, f"gradient.{bucket.index}")

    def _add(self, bucket: Bucket) -> None:
        self._weights.gather_gradients(bucket.first, bucket.last)
        if self._loss_scale != 1.0:
            self._weights.gradients[bucket.part].mul_(1.0 / self._loss_scale)
        self.accumulator.add(bucket)


def set_up_reduction(
    config: Config, weights: FlatWeights, noise: Noise, comm: Communicator, progress: Progress
) -> GradientReduction:
    """Return the reduction over the ranks of `comm` for the largest global batch of the run. All ranks call it.

    `progress` keeps what a reduction carries from one update to the next.

    Raises UsageError if Adasum cannot work with this group, or 16 bits are too few for so many micro-batches.
    """
    build = partial(_build_accumulator, config, weights, len(noise.points(0)), comm, progress)
    accumulator = run_on_all_ranks(comm, build, "set up the reduction")
    # Only once all ranks have one: if another rank failed, the hooks of a reduction would remain.
    smallest_bucket = 1 if config.comm.op == "adasum" else _BUCKET  # Adasum combines each parameter by itself
    return GradientReduction(weights, accumulator, buckets_of(weights, smallest_bucket))


def _build_accumulator(
    config: Config, weights: FlatWeights, points: int, comm: Communicator, progress: Progress
) -> GradientAccumulator:
    settings, micro_size = config.comm, config.batch.micro_size
    assert micro_size != "auto", "decided before"
    plan = BatchPlan(max(size for _, size in config.batch.sizes), micro_size)
    if settings.op == "adasum":
        share = sum(micro_batch.size for micro_batch in plan.share(comm.rank, comm.size)) / plan.global_size
        _check_adasum(comm, share)
        return AdasumAccumulator(weights, comm, share)
    if settings.reduction == "float":
        if settings.compression == "fp16":
            return HalfAccumulator(weights, comm, progress)
        return FloatAccumulator(weights, comm)
    gradients = len(plan.micro_batches) * points * (comm.size if shares_micro_batches(config.model) else 1)
    if settings.reduction == "exact":
        return ExactAccumulator(weights, comm, gradients)
    if settings.reduction == "exact16" and gradients > _MOST_IN_16_BITS:
        raise UsageError(
            f"exact16 is too inaccurate for {gradients} gradients of micro-batches, more than {_MOST_IN_16_BITS}: set "
            f"a larger batch.micro_size, or comm.reduction=exact32",
            code="exact16-micro-batches",
        )
    return GridAccumulator(weights, comm, gradients, progress, bits=16 if settings.reduction == "exact16" else 32)


def buckets_of(weights: FlatWeights, size: int) -> list[Bucket]:
    """Return buckets of at least `size` gradients, if there are as many; the last parameters' come first."""
    buckets: list[Bucket] = []
    last = len(weights.segments)
    stop = len(weights.gradients)
    for first in range(last - 1, -1, -1):
        start = weights.segments[first].start
        if stop - start >= size or first == 0:
            buckets.append(Bucket(len(buckets), first, last, start, stop))
            last, stop = first, start
    return buckets


def _check_adasum(comm: Communicator, share: float) -> None:
    if comm.backend.startswith("torch"):
        raise UsageError(
            "torch.distributed has no Adasum: set comm.engine=horovod, or comm.op=average", code="adasum-engine"
        )
    if comm.size & (comm.size - 1):
        raise UsageError(
            f"adasum needs a power of two of ranks, not {comm.size}: set comm.op to average", code="adasum-rank-count"
        )
    if comm.backend == "gloo":
        raise UsageError("adasum needs MPI: start with mpirun, or set comm.op to average", code="adasum-without-mpi")
    if share == 0:
        raise UsageError(
            "adasum needs a micro-batch on every rank: set a smaller batch.micro_size", code="adasum-idle-rank"
        )


_Count = Literal[
    "loss",
    "correct",
    "samples",
    "gradients",
    "rise",
    "rise_samples",
    "out_of_range",
    "out_of_memory",
    "stop",
    "rendezvous",
]

_TERM_LIMIT = LOSSES.limit / 4096
"""A micro-batch whose losses add up to more is out of range."""


@dataclass(frozen=True)
class TallyResult:
    """The sum over all ranks: mean loss and accuracy of `samples` samples, and how many ranks report each condition.

    A sample counts once for each point at which its gradient was taken.
    """

    loss: float
    accuracy: float
    samples: int
    rise: float
    """Mean over samples of the loss with noise minus the loss without; 0 if not measured."""
    out_of_range: int
    out_of_memory: int
    stop: int
    gradients: int
    """How many gradients were summed: one for each micro-batch, or part of one, at each point."""
    largest: list[int] = field(compare=False)
    """Upper bound of each filter's integer sum, from which the next grids are chosen; empty without grids."""
    paces: tuple[int, ...] = field(compare=False, repr=False)
    """Microseconds per micro-batch, by rank; 0 where not reported."""
    rendezvous: int
    """How many ranks know of others that wait to join."""
    statistics: torch.Tensor = field(compare=False, repr=False)
    """The sums of `BatchStatistics`."""
    gradient_norm: float
    """The norm that `Tally.result` was given: of the global gradient, before clipping; 0 if none was."""


class Tally:
    """Counts on the device, and waits for it only in `result`."""

    def __init__(self, comm: Communicator, statistics: BatchStatistics) -> None:
        self._comm = comm
        self._statistics = statistics
        # However many micro-batches there are, sums of losses stay in range if every mean loss is below it.
        self._mean_limit = LOSSES.limit / statistics.samples
        self._slots = statistics.sums.new_zeros(len(get_args(_Count)))
        self._counts: dict[_Count, torch.Tensor] = dict(zip(get_args(_Count), self._slots.unbind(), strict=True))
        self._noted: list[tuple[torch.Tensor, torch.Tensor, int]] = []
        """The summed loss of each micro-batch since the last `count`, which labels were right, and how many it has."""
        self._largest = self._slots[:0]
        self._sent = self._slots
        self._pending: Pending | None = None

    def clear(self) -> None:
        """Set the counts and the norms' statistics to zero."""
        self._slots.zero_()
        self._noted.clear()
        self._statistics.clear()

    def add(self, loss_sum: torch.Tensor, logits: torch.Tensor, labels: torch.Tensor) -> None:
        """Count a micro-batch: the sum of its losses, and how many of its `labels` the `logits` get right."""
        self._noted.append((loss_sum.detach(), logits.argmax(dim=1) == labels, len(labels)))

    def add_rise(self, loss_sum: torch.Tensor, clean_loss_sum: torch.Tensor, samples: int) -> None:
        """Count by how much the summed loss of `samples` samples is larger with the noise than without."""
        rise = (loss_sum.detach() - clean_loss_sum).to(torch.float64)
        self._counts["rise"] += LOSSES.encode(torch.where(rise.abs() < _TERM_LIMIT, rise, 0.0))
        self._counts["rise_samples"] += samples

    def count(self, out_of_range: torch.Tensor | None = None) -> None:
        """Add to the counts on the device what was noted since the last call, and whether a gradient was out of range.

        Recorded in a CUDA graph, it adds the counts of each replay's micro-batch.
        """
        if self._noted:
            sums, correct, samples = zip(*self._noted, strict=True)
            losses = torch.stack(sums).to(torch.float64)
            limits = [
                losses.new_full((len(list(equal)),), min(_TERM_LIMIT, self._mean_limit * size))
                for size, equal in groupby(samples)
            ]
            finite = losses.abs() < torch.cat(limits)
            self._counts["loss"] += LOSSES.encode(torch.where(finite, losses, 0.0)).sum()
            self._counts["out_of_range"] += (~finite).sum()
            self._counts["correct"] += torch.cat(correct).sum()
            self._counts["samples"] += sum(samples)
            self._counts["gradients"] += len(samples)
        if out_of_range is not None:
            self._counts["out_of_range"] += out_of_range
        self._noted.clear()

    def send(
        self,
        *,
        out_of_range: torch.Tensor | None = None,
        out_of_memory: bool = False,
        stop: bool = False,
        largest: torch.Tensor | None = None,
        pace: int = 0,
    ) -> None:
        """Start the sum over the ranks, of this rank's counts and of the arguments."""
        self._largest = self._slots[:0] if largest is None else largest
        self.count(out_of_range)
        self._counts["out_of_range"] += self._statistics.out_of_range
        # By `fill_`: an assignment to an element would copy the number from host memory, for which CUDA waits.
        self._counts["out_of_memory"].fill_(int(out_of_memory))
        self._counts["stop"].fill_(int(stop))
        self._counts["rendezvous"].fill_(int(self._comm.wants_rendezvous))
        paces = self._slots.new_zeros(self._comm.size)
        if pace:
            paces[self._comm.rank].fill_(pace)
        self._sent = torch.cat([self._slots, paces, self._largest, self._statistics.sums])
        self._pending = self._comm.allreduce_async(self._sent, "tally")

    def result(self, gradient_norm: torch.Tensor | None = None) -> TallyResult:
        """Wait for the sum and return it, together with `gradient_norm`, a float32: the host waits only once."""
        assert self._pending is not None, "nothing was sent"
        self._pending.wait_on_host()
        # Where these parts of what was sent begin.
        paces, largest, statistics = accumulate((len(self._slots), self._comm.size, len(self._largest)))
        read = self._sent[:statistics]
        if gradient_norm is not None:
            read = torch.cat([read, gradient_norm.view(1).view(torch.int32)])
        numbers: list[int] = read.tolist()
        counts = dict(zip(self._counts, numbers, strict=False))
        samples = counts["samples"]
        return TallyResult(
            loss=counts["loss"] * 2.0**-LOSSES.bits / samples if samples else 0.0,
            accuracy=counts["correct"] / samples if samples else 0.0,
            samples=samples,
            rise=counts["rise"] * 2.0**-LOSSES.bits / max(counts["rise_samples"], 1),
            out_of_range=counts["out_of_range"],
            out_of_memory=counts["out_of_memory"],
            stop=counts["stop"],
            rendezvous=counts["rendezvous"],
            gradients=counts["gradients"],
            largest=numbers[largest:statistics],
            paces=tuple(numbers[paces:largest]),
            statistics=self._sent[statistics:],
            gradient_norm=struct.unpack("f", struct.pack("i", numbers[-1]))[0] if gradient_norm is not None else 0.0,
        )
