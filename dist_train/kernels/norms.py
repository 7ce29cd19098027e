"""Triton kernels for batch norm over groups of samples, fused with ReLU, for channels-last activations.

In this layout, activations are a matrix [rows, C] with a row for each position of each sample. A group is a fixed
number of consecutive rows; the last group has all remaining rows. A program works on a part of a group and on a block
of channels. The forward and the backward pass are two launches each: the first computes the contribution of each part
to the sums of its group; in the second, every program adds up the parts and writes its result. A single launch would
have one program per group and block of channels: in VGG9's first layer, 1 program for a GPU's 132 multiprocessors.

The bits of a group depend on its own rows alone: parts begin at the group's first row and have a fixed length; they are
added up in order, without atomics; if another group has more parts, zeros are added, which change nothing; nothing is
tuned at run time. The gradients of weight and bias are the sums of the groups, added up in the groups' order over a
micro-batch. So the bits of a micro-batch do not depend on which rank computes it, or after which others. As for
everything on GPUs, this holds for one kind of GPU and one version of Triton.
"""

# Triton reads the annotations of a kernel's parameters, and leaves its functions without types.
# mypy: disable-error-code="no-untyped-def, no-untyped-call, untyped-decorator"

from typing import Any

import torch
import triton
import triton.language as tl
from torch import Tensor

_PART = tl.constexpr(1024)
"""Rows of a part."""
_TILE = tl.constexpr(32)
"""Rows, or parts, that a program loads at once."""
_MAX_WIDTH = 64
"""The most channels in a block."""
_launched = triton.jit(do_not_specialize=["rows", "total", "parts"])
"""Decorates the kernels: compiled once for all sizes."""


@triton.jit
def _place(rows, total, width: tl.constexpr):
    """Return the program's group, the group's first row and length, the program's part, and its channels (lanes)."""
    group = tl.program_id(1)
    first = group.to(tl.int64) * rows
    length = tl.where(group == tl.num_programs(1) - 1, total - first, rows).to(tl.int64)
    return group, first, length, tl.program_id(0), tl.program_id(2) * width + tl.arange(0, width)


@triton.jit
def _tile(matrix, first, row, length, lanes, channels):
    """Return the rows `row` [tile], counted from `first`, with zeros from `length` on; their offsets; their mask."""
    places = (first + row)[:, None] * channels + lanes[None, :]
    within = (row < length)[:, None] & (lanes < channels)[None, :]
    return tl.load(matrix + places, mask=within, other=0.0).to(tl.float32), places, within


@triton.jit
def _filled(length, part):
    """Return how many rows of `part` belong to a group of `length` rows."""
    return tl.minimum(tl.maximum(length - part * _PART, 0), _PART)


@_launched
def _part_moments(inputs, means, spreads, rows, total, parts, channels, width: tl.constexpr):
    """Write the means [groups, parts, C] of each part, and the sums of squared distances from them."""
    group, first, length, part, lanes = _place(rows, total, width)
    filled = _filled(length, part)
    row = tl.arange(0, _TILE)
    mean = tl.zeros((_TILE, width), tl.float32)
    spread = tl.zeros((_TILE, width), tl.float32)
    for step in range(tl.cdiv(filled, _TILE)):
        values, _, within = _tile(inputs, first + part * _PART, row + step * _TILE, filled, lanes, channels)
        # Welford's update for each row of the tile: avoids the difference of large sums.
        distance = tl.where(within, values - mean, 0.0)
        mean += distance * (1.0 / (step + 1))
        spread += distance * (values - mean)
    counts = tl.cdiv(tl.maximum(filled - row, 0), _TILE).to(tl.float32)[:, None]
    whole = tl.sum(mean * counts, 0) / tl.maximum(filled, 1).to(tl.float32)
    distance = mean - whole[None, :]
    place = (group * parts + part) * channels + lanes
    tl.store(means + place, whole, mask=lanes < channels)
    tl.store(spreads + place, tl.sum(spread + counts * distance * distance, 0), mask=lanes < channels)


@triton.jit
def _group_moments(means, spreads, group, length, parts, lanes, channels, width: tl.constexpr):
    """Return the means of a group and the sums of squared distances from them, from those of its parts."""
    sums = tl.zeros((_TILE, width), tl.float32)
    squares = tl.zeros((_TILE, width), tl.float32)
    for start in range(0, parts, _TILE):
        part = start + tl.arange(0, _TILE)
        mean, _, _ = _tile(means, group * parts, part, parts, lanes, channels)
        sums += mean * _filled(length, part).to(tl.float32)[:, None]
    whole = tl.sum(sums, 0) / length.to(tl.float32)
    for start in range(0, parts, _TILE):
        part = start + tl.arange(0, _TILE)
        mean, _, _ = _tile(means, group * parts, part, parts, lanes, channels)
        spread, _, _ = _tile(spreads, group * parts, part, parts, lanes, channels)
        distance = mean - whole[None, :]
        squares += spread + _filled(length, part).to(tl.float32)[:, None] * distance * distance
    return whole, tl.sum(squares, 0)


@_launched
def _write_normalized(
    inputs,
    outputs,
    weight,
    bias,
    means,
    spreads,
    moments,
    epsilon,
    rows,
    total,
    parts,
    channels,
    width: tl.constexpr,
    rectify: tl.constexpr,
):
    """Write the outputs, and to `moments` [3, groups, C] the means, unbiased variances and 1/deviations of groups."""
    group, first, length, part, lanes = _place(rows, total, width)
    known = lanes < channels
    mean, squares = _group_moments(means, spreads, group, length, parts, lanes, channels, width)
    count = length.to(tl.float32)
    scale = 1.0 / tl.sqrt_rn(squares / count + epsilon)
    if part == 0:
        place, stride = moments + group * channels + lanes, tl.num_programs(1) * channels
        tl.store(place, mean, mask=known)
        tl.store(place + stride, squares / tl.maximum(count - 1.0, 1.0), mask=known)
        tl.store(place + 2 * stride, scale, mask=known)
    factor = tl.load(weight + lanes, mask=known, other=0.0)
    term = tl.load(bias + lanes, mask=known, other=0.0)
    filled = _filled(length, part)
    for step in range(tl.cdiv(filled, _TILE)):
        row = step * _TILE + tl.arange(0, _TILE)
        values, places, within = _tile(inputs, first + part * _PART, row, filled, lanes, channels)
        result = (values - mean[None, :]) * scale[None, :] * factor[None, :] + term[None, :]
        if rectify:
            result = tl.where(result <= 0.0, 0.0, result)  # keeps NaN
        tl.store(outputs + places, result, mask=within)


@triton.jit
def _per_channel(means, scales, weight, bias, group, lanes, channels):
    """Return mean, 1/deviation, weight and bias of the block's channels."""
    known = lanes < channels
    mean = tl.load(means + group * channels + lanes, mask=known, other=0.0)
    scale = tl.load(scales + group * channels + lanes, mask=known, other=0.0)
    return mean, scale, tl.load(weight + lanes, mask=known, other=0.0), tl.load(bias + lanes, mask=known, other=0.0)


@triton.jit
def _standard_and_upstream(
    upstream, inputs, mean, scale, factor, term, first, row, filled, lanes, channels, rectify: tl.constexpr
):
    """Return the standardized inputs, the upstream gradient before the ReLU, their offsets and their mask."""
    values, places, within = _tile(inputs, first, row, filled, lanes, channels)
    gradient, _, _ = _tile(upstream, first, row, filled, lanes, channels)
    standard = tl.where(within, (values - mean[None, :]) * scale[None, :], 0.0)
    if rectify:
        gradient = tl.where(standard * factor[None, :] + term[None, :] <= 0.0, 0.0, gradient)
    return standard, gradient, places, within


@_launched
def _part_sums(
    upstream,
    inputs,
    weight,
    bias,
    means,
    scales,
    sums,
    rows,
    total,
    parts,
    channels,
    width: tl.constexpr,
    rectify: tl.constexpr,
):
    """Write each part's sums of gradients times standardized inputs, and of gradients: [2, groups, parts, C]."""
    group, first, length, part, lanes = _place(rows, total, width)
    known = lanes < channels
    mean, scale, factor, term = _per_channel(means, scales, weight, bias, group, lanes, channels)
    products = tl.zeros((_TILE, width), tl.float32)
    totals = tl.zeros((_TILE, width), tl.float32)
    filled = _filled(length, part)
    for step in range(tl.cdiv(filled, _TILE)):
        row = step * _TILE + tl.arange(0, _TILE)
        standard, gradient, _, _ = _standard_and_upstream(
            upstream, inputs, mean, scale, factor, term, first + part * _PART, row, filled, lanes, channels, rectify
        )
        products += gradient * standard
        totals += gradient
    place = sums + (group * parts + part) * channels + lanes
    tl.store(place, tl.sum(products, 0), mask=known)
    tl.store(place + tl.num_programs(1) * parts * channels, tl.sum(totals, 0), mask=known)


@_launched
def _write_gradients(
    upstream,
    inputs,
    weight,
    bias,
    means,
    scales,
    sums,
    grad_inputs,
    grad_groups,
    rows,
    total,
    parts,
    channels,
    width: tl.constexpr,
    rectify: tl.constexpr,
):
    """Write the gradient of the inputs, and to `grad_groups` [2, groups, C] the parts' sums added up by group."""
    group, first, length, part, lanes = _place(rows, total, width)
    known = lanes < channels
    groups = tl.num_programs(1)
    products = tl.zeros((_TILE, width), tl.float32)
    totals = tl.zeros((_TILE, width), tl.float32)
    for start in range(0, parts, _TILE):
        which = start + tl.arange(0, _TILE)
        found, _, _ = _tile(sums, group * parts, which, parts, lanes, channels)
        products += found
        found, _, _ = _tile(sums, (groups + group) * parts, which, parts, lanes, channels)
        totals += found
    product, gradients = tl.sum(products, 0), tl.sum(totals, 0)
    if part == 0:
        place = grad_groups + group * channels + lanes
        tl.store(place, product, mask=known)
        tl.store(place + groups * channels, gradients, mask=known)
    count = length.to(tl.float32)
    product, gradients = product / count, gradients / count
    mean, scale, factor, term = _per_channel(means, scales, weight, bias, group, lanes, channels)
    filled = _filled(length, part)
    for step in range(tl.cdiv(filled, _TILE)):
        row = step * _TILE + tl.arange(0, _TILE)
        standard, gradient, places, within = _standard_and_upstream(
            upstream, inputs, mean, scale, factor, term, first + part * _PART, row, filled, lanes, channels, rectify
        )
        result = (gradient - gradients[None, :] - standard * product[None, :]) * (scale * factor)[None, :]
        tl.store(grad_inputs + places, result, mask=within)


def normalize(
    inputs: Tensor, weight: Tensor, bias: Tensor, epsilon: float, size: int, groups: int, rectify: bool
) -> tuple[Tensor, Tensor]:
    """Return the outputs, and the means, unbiased variances and 1/deviations [3, groups, C] of `groups` groups.

    `inputs` are [n, C], or [n, C, H, W] in channels-last layout. A group has `size` samples, the last all remaining.
    """
    grid, geometry = _launch(inputs, size, groups)
    outputs, moments = torch.empty_like(inputs), weight.new_empty(3, groups, len(weight))
    means, spreads = weight.new_empty(2, groups, grid[0], len(weight)).unbind()
    _part_moments[grid](inputs, means, spreads, **geometry)
    _write_normalized[grid](
        inputs, outputs, weight, bias, means, spreads, moments, epsilon, rectify=rectify, **geometry
    )
    return outputs, moments


def gradients(
    upstream: Tensor, inputs: Tensor, weight: Tensor, bias: Tensor, moments: Tensor, size: int, rectify: bool
) -> tuple[Tensor, Tensor]:
    """Return the gradient of the inputs, and those of weight and bias for each group [2, groups, C].

    `upstream` has the layout of `inputs`; `moments` is what `normalize` returned.
    """
    means, _, scales = moments.unbind()
    grid, geometry = _launch(inputs, size, len(means))
    grad_inputs, grad_groups = torch.empty_like(inputs), moments.new_empty(2, *means.shape)
    sums = moments.new_empty(2, len(means), grid[0], len(weight))
    shared = (upstream, inputs, weight, bias, means, scales, sums)
    _part_sums[grid](*shared, rectify=rectify, **geometry)
    _write_gradients[grid](*shared, grad_inputs, grad_groups, rectify=rectify, **geometry)
    return grad_inputs, grad_groups


def _launch(inputs: Tensor, size: int, groups: int) -> tuple[tuple[int, int, int], dict[str, Any]]:
    """Return the grid of a launch (parts, groups, blocks of channels) and the arguments common to all kernels."""
    samples, channels = inputs.shape[:2]
    positions = inputs[0, 0].numel()
    longest = max(size, samples - size * (groups - 1)) * positions
    parts = triton.cdiv(longest, _PART.value)
    width = min(_MAX_WIDTH, triton.next_power_of_2(channels))
    geometry = {"rows": size * positions, "total": samples * positions, "parts": parts, "channels": channels}
    # Set explicitly: Triton's default for fused multiply-add differs between versions.
    options = {"width": width, "num_warps": 4, "enable_fp_fusion": False}
    return (parts, groups, triton.cdiv(channels, width)), {**geometry, **options}
