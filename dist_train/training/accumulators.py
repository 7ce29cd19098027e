"""Sums of gradients, over the micro-batches of a rank and over the ranks.

Sums of integers give the same bits in any order, and so on any number of ranks; sums of floats do not.
"""

from __future__ import annotations

import math
from abc import ABC, abstractmethod
from collections.abc import Sequence
from dataclasses import dataclass
from itertools import accumulate, pairwise
from typing import Literal

import torch

from dist_train.checkpoint.state import Progress
from dist_train.cluster.communicator import Communicator, Pending
from dist_train.kernels import operators
from dist_train.optim.flat_weights import FlatWeights
from dist_train.reproducible import GRADIENTS


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
    """Sums the gradients of `weights` over this rank's micro-batches, and then over the ranks."""

    def __init__(self, weights: FlatWeights, comm: Communicator, limit: float = math.inf) -> None:
        self._gradients = weights.gradients
        self._comm = comm
        self._limit = limit
        self._total = torch.zeros(0, dtype=torch.int32, device=self._gradients.device)
        self._begun: set[int] = set()
        """The buckets of which `_total` holds a sum."""
        self._range_checks: list[torch.Tensor] = []
        """Scalars whose absolute values are all below `limit` only if those of all gradients so far are."""
        self.largest = torch.zeros(0, dtype=torch.int64, device=self._gradients.device)
        """This rank's summands of what `choose_grids` takes, int64 on the device; empty without grids."""

    def clear(self) -> None:
        """Begin a step."""
        self._range_checks.clear()
        self._begun.clear()

    @property
    def out_of_range(self) -> torch.Tensor:
        """Whether this rank met a gradient that is not finite or too large; a bool on the device."""
        if not self._range_checks:
            return torch.zeros((), dtype=torch.bool, device=self._gradients.device)
        # Written so that a NaN, for which no comparison holds, is out of range.
        return ~(torch.stack(self._range_checks).abs_().amax() < self._limit)

    def take_out_of_range(self) -> torch.Tensor:
        """Return `out_of_range`, which from now on is about later gradients only."""
        out_of_range = self.out_of_range
        self._range_checks.clear()
        return out_of_range

    def begin(self, bucket: Bucket) -> None:
        """Begin the bucket's sum at zero, so that all calls of `add` launch the same kernels, as graphs need."""
        self._total[bucket.part].zero_()
        self._begun.add(bucket.index)

    @property
    def dtype(self) -> torch.dtype:
        """The type of the sums; they stay in the same memory as long as it does not change."""
        return self._total.dtype

    @abstractmethod
    def add(self, bucket: Bucket) -> None:
        """Add the gradients of one micro-batch."""

    def send(self, bucket: Bucket, name: str) -> Pending:
        """Start the sum over the ranks."""
        if bucket.index not in self._begun:
            self.begin(bucket)
        return self._comm.allreduce_async(self._packed(bucket), name)

    def _packed(self, bucket: Bucket) -> torch.Tensor:
        """Return the bucket's sum as it is sent."""
        return self._total[bucket.part]

    @abstractmethod
    def receive(self, bucket: Bucket) -> None:
        """Write the received sum to the gradients."""

    def has_overflowed(self, largest: Sequence[int]) -> bool:
        """Return whether the received sums may have left their bits; `largest`: its sums over all ranks."""
        return False

    def choose_grids(self, largest: Sequence[int], gradients: int) -> None:  # noqa: B027, most have none
        """Choose the grids of the next sums from `largest` of those received, of so many `gradients`; once for each."""


class ExactAccumulator(GradientAccumulator):
    """Sums of 64-bit integers: the same bits for any number of ranks, in any order."""

    def __init__(self, weights: FlatWeights, comm: Communicator, terms: int) -> None:
        """Sum the gradients of `weights`; at most `terms` micro-batches make a global batch."""
        super().__init__(weights, comm, GRADIENTS.limit / terms)
        self._total = torch.zeros_like(self._gradients, dtype=torch.int64)

    def add(self, bucket: Bucket) -> None:
        gradients, total = self._gradients[bucket.part], self._total[bucket.part]
        begun = bucket.index in self._begun
        self._begun.add(bucket.index)
        if gradients.is_cuda and operators.has_triton():
            largest = torch.ops.dist_train.accumulate_(gradients, total, 2.0**GRADIENTS.bits, begun)
            self._range_checks.append(largest.amax())
            return
        self._range_checks += gradients.aminmax()
        gradients.mul_(2.0**GRADIENTS.bits)
        if begun:
            _add_as_integers(gradients, total)
        else:
            total.copy_(gradients)

    def receive(self, bucket: Bucket) -> None:
        torch.mul(self._total[bucket.part], 2.0**-GRADIENTS.bits, out=self._gradients[bucket.part])


_AT_ONCE = 1 << 16
"""Integers that are made at once on a CPU: half a MiB, which stays in a core's cache and takes no memory for long."""


def _add_as_integers(gradients: torch.Tensor, total: torch.Tensor) -> None:
    """Add `gradients` [n], rounded towards zero, to the integers `total` [n]."""
    size = _AT_ONCE if total.device.type == "cpu" else max(1, len(total))
    for part, integers in zip(gradients.split(size), total.split(size), strict=True):
        integers += part.to(integers.dtype)


def _kept_exponents(progress: Progress, tensors: int) -> Sequence[int] | None:
    """Return those of this update, one for each of `tensors`; None before the first one."""
    exponents = progress.grid_exponents
    return exponents if exponents is not None and len(exponents) == tensors else None


def next_exponents(
    before: Sequence[int] | None, bounds: Sequence[int], gradients: int, *, step: int, bits: int
) -> list[int]:
    """Return the exponents of the next update's grids, for sums in integers of `bits` bits, the same on all ranks.

    `before`: those of the update that `step` others preceded; None in the first one. `bounds`: of each tensor's
    integers in it, summed over its `gradients`.

    A grid becomes coarser at once. It becomes finer at once where many micro-batches keep the sums steady, else by
    degrees: a tensor whose gradients leap from batch to batch keeps room for the next leap.
    """
    is_steady = gradients >= _MANY
    headroom = _HEADROOM_OF_MANY if is_steady else _HEADROOM if gradients > 1 else 2 * _HEADROOM
    room = 2 ** (bits - 1) / headroom
    rise = int(step % _UPDATES_UNTIL_FINER == 0)
    chosen = []
    for now, bound in zip(before or [GRADIENTS.bits] * len(bounds), bounds, strict=True):
        # frexp, unlike a logarithm, is exact: the same on every machine
        best = min(GRADIENTS.bits, now + math.frexp(room / max(bound, 1))[1] - 1)
        chosen.append(best if is_steady or best <= now else max(min(now + rise, best), best - _UNUSED_BITS))
    return chosen


_MANY = 16
"""With this many micro-batches, their sum changes little from update to update."""
_HEADROOM_OF_MANY = 1.75
"""Factor by which a bound may grow between updates before the update is repeated, with `_MANY` micro-batches or more;
with 64 of them the sum is then as accurate as in float32, as a test shows."""
_HEADROOM = 4.0
"""That factor with fewer micro-batches; with a single one it is doubled."""
_UNUSED_BITS = 4
"""A grid is refined at once if more than this many bits above the headroom are unused."""
_UPDATES_UNTIL_FINER = 16


class GridAccumulator(GradientAccumulator):
    """Exact sums in the bytes of float32 or float16: of integers of as many bits, on a grid for each parameter tensor.

    The gradients of a tensor are rounded to multiples of 2^-exponent. The exponents are kept in `progress`, which
    checkpoints hold; they follow from the integers of earlier updates.
    No sum of a filter exceeds the sum, over the micro-batches, of its largest integer. If that fits the bits, so do
    all of them, in any order; if not, the update is repeated on coarser grids. The first update has no grids yet, and
    takes 64 bits.
    """

    def __init__(
        self, weights: FlatWeights, comm: Communicator, terms: int, progress: Progress, bits: Literal[16, 32] = 32
    ) -> None:
        """Sum the gradients of `weights`, of at most `terms` micro-batches a batch."""
        super().__init__(weights, comm, 2.0**62 / terms)
        self._progress = progress
        self._bits = bits
        self._tensors = [
            self._gradients[each.start : each.stop].view(each.shape[0] if len(each.shape) > 1 else 1, -1)
            for each in weights.segments
        ]
        """The gradient of each parameter [filters, weights of a filter]; one of a single dimension is one filter."""
        self._filters = [0, *accumulate(len(tensor) for tensor in self._tensors)]
        """The index of each parameter's first filter among all filters; last, their number."""
        self._places = torch.tensor(
            [
                (each.start + filter * tensor.shape[1], tensor.shape[1], index)
                for index, (each, tensor) in enumerate(zip(weights.segments, self._tensors, strict=True))
                for filter in range(len(tensor))
            ],
            device=self._gradients.device,
        )
        """Each filter's start, its length, and the index of its parameter."""
        self._padding = weights.padding
        self.largest = torch.zeros(self._filters[-1], dtype=torch.int64, device=self._gradients.device)
        self._exponents: Sequence[int] = ()
        self._scales = torch.zeros(len(self._tensors), device=self._gradients.device)
        """2^exponent of each tensor: always in the same memory, so that a CUDA graph of `add` sees each step's."""

    def clear(self) -> None:
        super().clear()
        self.largest.zero_()
        exponents = _kept_exponents(self._progress, len(self._tensors))
        self._exponents = exponents or [GRADIENTS.bits] * len(self._tensors)
        scales = torch.tensor([2.0**exponent for exponent in self._exponents])
        # Pinned: otherwise CUDA would first wait for the stream, and so for the previous update.
        self._scales.copy_(scales.pin_memory() if self._scales.is_cuda else scales, non_blocking=True)
        integers = torch.int32 if exponents else torch.int64
        if self._total.dtype != integers or len(self._total) == 0:
            self._total = torch.zeros_like(self._gradients, dtype=integers)
        if self._is_sent_in_pairs:
            # A sum that overflowed, or was never received, has changed the padding that it was paired with.
            for each in (self._total, self._gradients):
                each.index_fill_(0, self._padding, 0)

    def add(self, bucket: Bucket) -> None:
        gradients, total = self._gradients[bucket.part], self._total[bucket.part]
        filters = slice(self._filters[bucket.first], self._filters[bucket.last])
        begun = bucket.index in self._begun
        self._begun.add(bucket.index)
        if gradients.is_cuda and operators.has_triton():
            sizes = torch.ops.dist_train.accumulate_on_grids_(
                gradients, total, self.largest[filters], self._places[filters], self._scales, bucket.start, begun
            )
            self._range_checks.append(sizes.amax())
            return
        tensors = self._tensors[bucket.first : bucket.last]
        torch._foreach_mul_(tensors, self._scales[bucket.first : bucket.last].unbind())
        gradients.round_()
        largest = _largest(tensors)
        self._range_checks.append(largest.amax())
        self.largest[filters].add_(largest.to(torch.int64))
        if begun:
            _add_as_integers(gradients, total)
        else:
            total.copy_(gradients)

    def _packed(self, bucket: Bucket) -> torch.Tensor:
        total = self._total[bucket.part]
        return pack_halves(total) if self._is_sent_in_pairs else total

    def receive(self, bucket: Bucket) -> None:
        total = self._total[bucket.part]
        if self._is_sent_in_pairs:
            unpack_halves(total)
        self._gradients[bucket.part].copy_(total)
        which = slice(bucket.first, bucket.last)
        torch._foreach_mul_(self._tensors[which], [2.0**-exponent for exponent in self._exponents[which]])

    def has_overflowed(self, largest: Sequence[int]) -> bool:
        return self._total.dtype != torch.int64 and max(largest) >= 2 ** (self._bits - 1)

    def choose_grids(self, largest: Sequence[int], gradients: int) -> None:
        bounds = [max(largest[first:last]) for first, last in pairwise(self._filters)]
        step, before = self._progress.step, _kept_exponents(self._progress, len(self._tensors))
        self._progress.grid_exponents = next_exponents(before, bounds, gradients, step=step, bits=self._bits)

    @property
    def _is_sent_in_pairs(self) -> bool:
        return self._bits == 16 and self._total.dtype == torch.int32


def pack_halves(integers: torch.Tensor) -> torch.Tensor:
    """Add 2^16 times the second half of int32 `integers` [n], n even, to the first half, in place, and return that.

    Sums of what it returns, in any order, hold the sums of both halves. Neither Gloo nor NCCL sums 16-bit integers.
    """
    low, high = integers.chunk(2)
    return low.add_(high, alpha=1 << 16)


def unpack_halves(integers: torch.Tensor) -> None:
    """Split the sums in the first half of int32 `integers` [n] into those of both halves, each below 2^15 in size."""
    low, high = integers.chunk(2)
    torch.add(low, 1 << 15, out=high)
    high.bitwise_right_shift_(16)
    low.sub_(high, alpha=1 << 16)


def _largest(tensors: Sequence[torch.Tensor]) -> torch.Tensor:
    """Return the largest absolute value of each filter of `tensors`, NaN where it holds one."""
    # Several times as fast on a CPU as aminmax along a dimension, or a norm.
    highest, lowest = (torch.cat([find(tensor, 1) for tensor in tensors]) for find in (torch.amax, torch.amin))
    return torch.maximum(highest, lowest.neg_())


class FloatAccumulator(GradientAccumulator):
    """Sums of float32: fast, but rounded differently with each number of ranks."""

    def __init__(self, weights: FlatWeights, comm: Communicator) -> None:
        super().__init__(weights, comm)
        self._total = torch.zeros_like(self._gradients)

    def add(self, bucket: Bucket) -> None:
        if bucket.index not in self._begun:
            self.begin(bucket)
        gradients = self._gradients[bucket.part]
        self._range_checks.append(gradients.sum())
        self._total[bucket.part] += gradients

    def receive(self, bucket: Bucket) -> None:
        self._gradients[bucket.part].copy_(self._total[bucket.part])


_BOUND_BITS = 32
"""The largest value of a rank travels as an integer, in units of 2^-32."""
_FIRST_EXPONENT = 8
_LIMIT_EXPONENT = 15
"""Sums stay below 2^15: rounding cannot carry them beyond float16's 65504."""
_ROOM_EXPONENT = 7
"""The largest value may grow by 2^7 between updates; values of 2^-22 of it still have all bits of a float16."""


class HalfAccumulator(FloatAccumulator):
    """Sums of float32, sent as float16 at a power-of-two scale: a rank's share of a gradient may be below its range.

    No sum over ranks exceeds the sum of their largest values. If that leaves the range, the update is repeated at a
    lower scale; else it determines the scale of the next update, kept in `progress` as the exponent of a grid is.
    """

    def __init__(self, weights: FlatWeights, comm: Communicator, progress: Progress) -> None:
        super().__init__(weights, comm)
        self._progress = progress
        self._exponent = _FIRST_EXPONENT
        self._sent = torch.zeros_like(self._total, dtype=torch.float16)
        self.largest = torch.zeros(1, dtype=torch.int64, device=self._total.device)

    def clear(self) -> None:
        super().clear()
        self.largest.zero_()
        [self._exponent] = _kept_exponents(self._progress, tensors=1) or [_FIRST_EXPONENT]

    def _packed(self, bucket: Bucket) -> torch.Tensor:
        total, sent = self._total[bucket.part], self._sent[bucket.part]
        most = 2.0**62 / self._comm.size
        largest = torch.stack(total.aminmax()).abs_().amax().to(torch.float64)  # NaN if one is
        units = largest.mul_(2.0**_BOUND_BITS).nan_to_num_(most).clamp_(max=most).ceil_()
        torch.maximum(self.largest, units.to(torch.int64), out=self.largest)
        return torch.mul(total, 2.0**self._exponent, out=sent)

    def receive(self, bucket: Bucket) -> None:
        # Scaled only as float32: torch would compute the product of a float16 in float16.
        self._gradients[bucket.part].copy_(self._sent[bucket.part]).mul_(2.0**-self._exponent)

    def has_overflowed(self, largest: Sequence[int]) -> bool:
        return math.frexp(largest[0])[1] - _BOUND_BITS + self._exponent > _LIMIT_EXPONENT

    def choose_grids(self, largest: Sequence[int], gradients: int) -> None:
        bound = math.frexp(max(largest[0], 1))[1] - _BOUND_BITS  # it is below 2^bound
        self._progress.grid_exponents = [_LIMIT_EXPONENT - _ROOM_EXPONENT - bound]


class AdasumAccumulator(FloatAccumulator):
    """Adasum (arXiv 2006.02924) of the ranks' own mean gradients, parameter by parameter."""

    def __init__(self, weights: FlatWeights, comm: Communicator, share: float) -> None:
        """Combine the gradients of `weights`; this rank computes `share` of the global batch."""
        super().__init__(weights, comm)
        self._to_mean = 1.0 / share

    def send(self, bucket: Bucket, name: str) -> Pending:
        """Start the combination over the ranks."""
        return self._comm.adasum_async(self._total[bucket.part].mul_(self._to_mean), name)
