"""Batch norm over groups of samples on CPUs, by the compiled kernels of `_cpu.c`; `norms.py` is the same for GPUs."""

from __future__ import annotations

import torch
from torch import Tensor

from dist_train.kernels import _cpu

_FEW_VALUES = 32768  # one thread computes them sooner than several share them; torch's own limit


def normalize(
    inputs: Tensor, weight: Tensor, bias: Tensor, epsilon: float, size: int, groups: int, rectify: bool
) -> tuple[Tensor, Tensor]:
    """Return the outputs, and the means, unbiased variances and 1/deviations [3, groups, C] of `groups` groups.

    `inputs` are [n, C], or [n, C, H, W] in channels-last layout, float32 or bfloat16. A group has `size` samples, the
    last all remaining.
    """
    outputs, moments = torch.empty_like(inputs), weight.new_empty(3, groups, len(weight))
    weight, bias = weight.contiguous(), bias.contiguous()
    tensors = _addresses(inputs, weight, bias, outputs, moments)
    _cpu.normalize(tensors, epsilon, _geometry(inputs, size, groups), rectify, _threads(inputs))
    return outputs, moments


def gradients(
    upstream: Tensor, inputs: Tensor, weight: Tensor, bias: Tensor, moments: Tensor, size: int, rectify: bool
) -> tuple[Tensor, Tensor]:
    """Return the gradient of the inputs, and those of weight and bias for each group [2, groups, C].

    `upstream` has the type and layout of `inputs`; `moments` is what `normalize` returned.
    """
    grad_inputs, grad_groups = torch.empty_like(inputs), moments.new_empty(2, *moments.shape[1:])
    weight, bias = weight.contiguous(), bias.contiguous()
    tensors = _addresses(upstream, inputs, weight, bias, moments, grad_inputs, grad_groups)
    _cpu.gradients(tensors, _geometry(inputs, size, moments.shape[1]), rectify, _threads(inputs))
    return grad_inputs, grad_groups


def _addresses(*tensors: Tensor) -> tuple[int, ...]:
    return tuple(tensor.data_ptr() for tensor in tensors)


def _geometry(inputs: Tensor, size: int, groups: int) -> _cpu.Geometry:
    """Return the rows of a group and of all groups, the groups, the channels, and whether values are bfloat16."""
    positions = inputs[0, 0].numel()
    return size * positions, len(inputs) * positions, groups, inputs.shape[1], inputs.dtype == torch.bfloat16


def _threads(inputs: Tensor) -> int:
    return torch.get_num_threads() if inputs.numel() > _FEW_VALUES else 1
