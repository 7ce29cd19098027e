"""How gradients are summed: over the micro-batches of a rank, and over the ranks on the way.

Sums of integers give the same bits in any order, and so on any number of ranks; sums of floats do not.
"""

from __future__ import annotations

import math
from abc import ABC, abstractmethod
from collections.abc import Sequence
from dataclasses import dataclass

import torch

from dist_train.checkpoint.state import Progress
from dist_train.cluster.communicator import Communicator, Pending
from dist_train.fixed_point import GRADIENTS
from dist_train.optim.flat_weights import FlatWeights


@dataclass(frozen=True)
class Bucket:
    """The parameters `first` to `last` (exclusive), which lie at [start, stop) of the flat gradient."""

    index: int
    first: int
    last: int
    start: int
    stop: int

    @property
    def part(self) -> slice:
        """Where they lie."""
        return slice(self.start, self.stop)


class GradientAccumulator(ABC):
    """How the gradients of `weights` are summed: over micro-batches here, over ranks on the way."""

    def __init__(self, weights: FlatWeights, comm: Communicator) -> None:
        self._gradients = weights.gradients
        self._comm = comm
        self.out_of_range = torch.zeros((), dtype=torch.bool, device=self._gradients.device)
        """Whether this rank met a gradient that is not finite or too large; a bool on the device."""
        self.largest = torch.zeros(0, dtype=torch.int64, device=self._gradients.device)
        """What this rank adds to the sums that `fits` takes, int64 on the device; here none are needed."""

    def clear(self) -> None:
        """Begin a step."""
        self.out_of_range.zero_()

    @abstractmethod
    def add(self, bucket: Bucket) -> None:
        """Add the gradients of one micro-batch."""

    @abstractmethod
    def send(self, bucket: Bucket, name: str) -> Pending:
        """Start the sum over the ranks."""

    @abstractmethod
    def receive(self, bucket: Bucket) -> None:
        """Leave the sum where the gradients are."""

    def fits(self, largest: Sequence[int]) -> bool:
        """Whether the gradients are those of the global batch, by the sum of `largest` over all ranks.

        Where they are not, the update must be made again; what has changed for that is the same on all ranks.
        """
        return True


class ExactAccumulator(GradientAccumulator):
    """Sums of 64-bit integers: the same bits for any number of ranks, in any order."""

    def __init__(self, weights: FlatWeights, comm: Communicator, terms: int) -> None:
        """Sum the gradients of `weights`; at most `terms` micro-batches make a global batch."""
        super().__init__(weights, comm)
        self._total = torch.zeros_like(self._gradients, dtype=torch.int64)
        self._begun: set[int] = set()
        # Memory that a single micro-batch never touches is never taken.
        self._scratch = torch.empty_like(self._total)
        self._limit = GRADIENTS.limit / terms

    def clear(self) -> None:
        """Begin a step."""
        super().clear()
        self._begun.clear()

    def add(self, bucket: Bucket) -> None:
        """Add the gradients of one micro-batch as integers."""
        gradients = self._gradients[bucket.part]
        low, high = gradients.aminmax()
        # Written so that a NaN, for which no comparison holds, is out of range.
        self.out_of_range |= ~((low > -self._limit) & (high < self._limit))
        gradients.mul_(2.0**GRADIENTS.bits)
        total = self._total[bucket.part]
        if bucket.index in self._begun:
            total += self._scratch[: len(total)].copy_(gradients)
        else:
            total.copy_(gradients)
            self._begun.add(bucket.index)

    def send(self, bucket: Bucket, name: str) -> Pending:
        """Start the sum over the ranks."""
        total = self._total[bucket.part]
        if bucket.index not in self._begun:
            total.zero_()
        return self._comm.allreduce_async(total, name)

    def receive(self, bucket: Bucket) -> None:
        """Turn the sum back into floats, once."""
        torch.mul(self._total[bucket.part], 2.0**-GRADIENTS.bits, out=self._gradients[bucket.part])


class Grids:
    """The grid of each parameter tensor: its gradients are rounded to multiples of 2^-exponent.

    The exponents follow from the integers of the updates before, which are the same on all ranks; kept in `progress`,
    they are saved.
    """

    def __init__(self, progress: Progress, tensors: int, terms: int) -> None:
        """Fit grids to sums of at most `terms` micro-batches' gradients, of so many `tensors`."""
        self._progress = progress
        self._tensors = tensors
        self._bits = min(_MOST_BITS, _BITS_OF_ONE + terms.bit_length() - 1)

    @property
    def exponents(self) -> Sequence[int] | None:
        """One for each tensor; None where no update has been made yet from which they would follow."""
        exponents = self._progress.grid_exponents
        return exponents if exponents is not None and len(exponents) == self._tensors else None

    def follow(self, largest: Sequence[int]) -> None:
        """Choose the next update's grids, by the sum over this one's micro-batches of each tensor's largest integer.

        A grid becomes coarser at once, and finer by degrees: a tensor whose gradients leap from batch to batch keeps
        room for the next leap.
        """
        begins = self.exponents is None
        rise = int(self._progress.step % _UPDATES_UNTIL_FINER == 0)
        chosen = []
        for now, integer in zip(self.exponents or [GRADIENTS.bits] * self._tensors, largest, strict=True):
            best = min(GRADIENTS.bits, now + self._bits - integer.bit_length())
            chosen.append(best if begins or best <= now else max(min(now + rise, best), best - _UNUSED_BITS))
        self._progress.grid_exponents = chosen


_BITS_OF_ONE = 28
"""Bits of the integers of a single micro-batch, where `_MOST_BITS` are those of the sum of four and more.

The gradients of few samples leap, by a factor of eight or more: 31 bits must hold them. Those of many samples change
little, and need the resolution: with 30 bits the sum of 64 gradients is as accurate as in float32 (a test shows it).
"""
_MOST_BITS = 30
_UNUSED_BITS = 4
"""At most so many bits are left unused above."""
_UPDATES_UNTIL_FINER = 16


class Exact32Accumulator(GradientAccumulator):
    """Sums of 32-bit integers, on a grid for each parameter tensor: exact, and as many bytes as float32.

    A sum of integers is at most the sum of the micro-batches' largest: where that fits 32 bits, so does every sum.
    Where it does not, the update is made again on coarser grids. The first update, without grids yet, takes 64 bits.
    """

    def __init__(self, weights: FlatWeights, comm: Communicator, terms: int, progress: Progress) -> None:
        """Sum the gradients of `weights`; at most `terms` micro-batches make a global batch.

        The grids are kept in `progress`.
        """
        super().__init__(weights, comm)
        self._segments = weights.segments
        self._grids = Grids(progress, len(self._segments), terms)
        self._limit = 2.0**62 / terms
        self.largest = torch.zeros(len(self._segments), dtype=torch.int64, device=self._gradients.device)
        self._exponents: Sequence[int] = ()
        self._total = torch.zeros(0, dtype=torch.int32, device=self._gradients.device)
        self._scratch = self._total
        self._begun: set[int] = set()

    def clear(self) -> None:
        """Begin a step."""
        super().clear()
        self.largest.zero_()
        self._begun.clear()
        exponents = self._grids.exponents
        self._exponents = exponents or [GRADIENTS.bits] * len(self._segments)
        integers = torch.int32 if exponents else torch.int64
        if self._total.dtype != integers or len(self._total) == 0:
            self._total = torch.zeros_like(self._gradients, dtype=integers)
            # Memory that a single micro-batch never touches is never taken.
            self._scratch = torch.empty_like(self._total)

    def add(self, bucket: Bucket) -> None:
        """Add the gradients of one micro-batch as integers."""
        gradients = self._gradients[bucket.part]
        tensors = self._tensors_of(bucket)
        torch._foreach_mul_(tensors, [2.0**exponent for exponent in self._exponents[bucket.first : bucket.last]])
        gradients.round_()
        largest = _largest(tensors)
        # Written so that a NaN, for which no comparison holds, is out of range.
        self.out_of_range |= ~(largest < self._limit).all()
        self.largest[bucket.first : bucket.last].add_(largest.to(torch.int64))
        total = self._total[bucket.part]
        if bucket.index in self._begun:
            total += self._scratch[: len(total)].copy_(gradients)
        else:
            total.copy_(gradients)
            self._begun.add(bucket.index)

    def send(self, bucket: Bucket, name: str) -> Pending:
        """Start the sum over the ranks."""
        total = self._total[bucket.part]
        if bucket.index not in self._begun:
            total.zero_()
        return self._comm.allreduce_async(total, name)

    def receive(self, bucket: Bucket) -> None:
        """Turn the sum back into floats, once."""
        self._gradients[bucket.part].copy_(self._total[bucket.part])
        exponents = self._exponents[bucket.first : bucket.last]
        torch._foreach_mul_(self._tensors_of(bucket), [2.0**-exponent for exponent in exponents])

    def fits(self, largest: Sequence[int]) -> bool:
        """Whether no sum can have left its integers; choose the grids of the update to come, or of this one anew."""
        fits = self._total.dtype == torch.int64 or max(largest) < 2**31
        self._grids.follow(largest)
        return fits

    def _tensors_of(self, bucket: Bucket) -> list[torch.Tensor]:
        return [self._gradients[each.start : each.stop] for each in self._segments[bucket.first : bucket.last]]


def _largest(tensors: list[torch.Tensor]) -> torch.Tensor:
    """Return the largest absolute value of each of `tensors`, NaN where it holds one."""
    if tensors[0].is_cuda:
        return torch.stack(torch._foreach_norm(tensors, math.inf))
    # Several times as fast on a CPU as a norm.
    lowest, highest = zip(*(tensor.aminmax() for tensor in tensors), strict=True)
    return torch.maximum(torch.stack(lowest).neg_(), torch.stack(highest))


class FloatAccumulator(GradientAccumulator):
    """Sums of float32, or of float16 on the way: fast, and rounded differently on each number of ranks."""

    def __init__(self, weights: FlatWeights, comm: Communicator, sent_as: torch.dtype = torch.float32) -> None:
        """Sum the gradients of `weights`, sent between ranks as `sent_as`."""
        super().__init__(weights, comm)
        self._total = torch.zeros_like(self._gradients)
        self._sent = self._total if sent_as == torch.float32 else torch.zeros_like(self._total, dtype=sent_as)

    def clear(self) -> None:
        """Begin a step."""
        super().clear()
        self._total.zero_()

    def add(self, bucket: Bucket) -> None:
        """Add the gradients of one micro-batch."""
        gradients = self._gradients[bucket.part]
        self.out_of_range |= ~gradients.sum().isfinite()
        self._total[bucket.part] += gradients

    def send(self, bucket: Bucket, name: str) -> Pending:
        """Start the sum over the ranks."""
        sent = self._sent[bucket.part]
        if self._sent is not self._total:
            sent.copy_(self._total[bucket.part])
        return self._comm.allreduce_async(sent, name)

    def receive(self, bucket: Bucket) -> None:
        """Leave the sum where the gradients are."""
        self._gradients[bucket.part].copy_(self._sent[bucket.part])


class AdasumAccumulator(FloatAccumulator):
    """Adasum (arXiv 2006.02924) of the ranks' own mean gradients, parameter by parameter."""

    def __init__(self, weights: FlatWeights, comm: Communicator, share: float) -> None:
        """Combine the gradients of `weights`; this rank computes `share` of the global batch."""
        super().__init__(weights, comm)
        self._to_mean = 1.0 / share

    def send(self, bucket: Bucket, name: str) -> Pending:
        """Start the combination over the ranks."""
        return self._comm.adasum_async(self._total[bucket.part].mul_(self._to_mean), name)
