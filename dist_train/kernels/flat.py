"""Kernels over flat weights and gradients: bit-identical to what torch's operators give, in one pass over memory."""

# Triton leaves its functions without types.
# mypy: disable-error-code="no-untyped-def, no-untyped-call, untyped-decorator"

import triton
import triton.language as tl
from torch import Tensor

_BLOCK = 1024


@triton.jit(do_not_specialize=["low", "high"])
def _random_bits(out, count, low, high, block: tl.constexpr):
    place = tl.program_id(0) * block + tl.arange(0, block)
    state = place.to(tl.uint32) * 0x9E3779B9 + low.to(tl.uint32)
    state ^= state >> 16
    state = state * 0x7FEB352D + high.to(tl.uint32)
    state ^= state >> 15
    state *= 0x846CA68B
    state ^= state >> 16
    tl.store(out + place, state.to(tl.int32, bitcast=True), mask=place < count)


@triton.jit(do_not_specialize=["count"])
def _accumulate(gradients, total, largest, count, scale, begun: tl.constexpr, block: tl.constexpr):
    place = tl.program_id(0).to(tl.int64) * block + tl.arange(0, block)
    within = place < count
    gradient = tl.load(gradients + place, mask=within, other=0.0)
    integers = (gradient * scale).to(tl.int64)
    if begun:
        integers += tl.load(total + place, mask=within, other=0)
    tl.store(total + place, integers, mask=within)
    # A maximum would pass over a NaN.
    size = tl.where(gradient == gradient, tl.abs(gradient), float("inf"))
    tl.store(largest + tl.program_id(0), tl.max(size, 0))


@triton.jit(do_not_specialize=["offset"])
def _accumulate_on_grids(
    gradients, total, largest, sizes, places, scales, offset, begun: tl.constexpr, block: tl.constexpr
):
    row = tl.program_id(0)
    start, length = tl.load(places + 3 * row) - offset, tl.load(places + 3 * row + 1)
    scale = tl.load(scales + tl.load(places + 3 * row + 2))
    found = tl.zeros((block,), tl.float32)
    for step in range(tl.cdiv(length, block)):
        place = step * block + tl.arange(0, block)
        within = place < length
        gradient = tl.load(gradients + start + place, mask=within, other=0.0) * scale
        size = tl.where(gradient == gradient, tl.abs(gradient), float("inf"))
        # To the nearest integer, ties to even: from 2^23 on a float32 is one.
        size = tl.where(size < 8388608.0, (size + 8388608.0) - 8388608.0, size)
        found = tl.maximum(found, size)
        integers = tl.where(gradient < 0.0, -size, size).to(total.dtype.element_ty)
        if begun:
            integers += tl.load(total + start + place, mask=within, other=0)
        tl.store(total + start + place, integers, mask=within)
    size = tl.max(found, 0)
    tl.store(sizes + row, size)
    tl.store(largest + row, tl.load(largest + row) + size.to(tl.int64))


def random_bits(out: Tensor, low: int, high: int) -> None:
    """Fill int32 `out` [n] with the hashes of 0, 1, ... for the key of halves `low` and `high`, as `hash_by_torch`."""
    # It computes with integers only, but Triton 3.9 warns if a launch leaves the option out.
    programs = triton.cdiv(len(out), _BLOCK)
    _random_bits[(programs,)](out, len(out), low, high, block=_BLOCK, enable_fp_fusion=False)


def accumulate(gradients: Tensor, total: Tensor, scale: float, begun: bool) -> Tensor:
    """Add `gradients` [n] times `scale`, a power of two, rounded towards zero, to int64 `total` [n].

    Unless `begun`, `total` is overwritten. Return the largest absolute gradient of each block, infinity for a NaN.
    """
    programs = triton.cdiv(len(gradients), _BLOCK)
    largest = gradients.new_empty(programs)
    _accumulate[(programs,)](
        gradients, total, largest, len(gradients), scale, begun=begun, block=_BLOCK, enable_fp_fusion=False
    )
    return largest


def accumulate_on_grids(
    gradients: Tensor, total: Tensor, largest: Tensor, places: Tensor, scales: Tensor, offset: int, begun: bool
) -> Tensor:
    """Add `gradients` [n], each filter's times its scale and rounded to integers, to `total` [n].

    `places` [filters, 3], int64: each filter's start, to be reduced by `offset`, its length, and the index of its scale
    in `scales`, float32. Unless `begun`, `total` is overwritten. Add each filter's largest absolute integer to
    `largest` [filters], int64, and return them as float32, infinity where there is a NaN.
    """
    sizes = gradients.new_empty(len(places))
    _accumulate_on_grids[(len(places),)](
        gradients, total, largest, sizes, places, scales, offset, begun=begun, block=_BLOCK, enable_fp_fusion=False
    )
    return sizes
