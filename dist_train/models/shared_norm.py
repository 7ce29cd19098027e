"""Batch norm over samples that lie on several workers: both passes need two sums over all of them."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable
from torch.nn import functional

SumOverWorkers = Callable[[Tensor, str], None]
"""Replaces a contiguous tensor by its sum over all workers; the text names the operation, alike on all of them."""


def normalize_over_workers(
    inputs: Tensor, weight: Tensor, bias: Tensor, epsilon: float, sum_over_workers: SumOverWorkers, name: str
) -> tuple[Tensor, Tensor, Tensor]:
    """Return `inputs` [n, C, ...] normalized over all workers' samples, and their mean and unbiased variance.

    Mean and variance are float64 [C], and carry no gradient. Every worker must call it, with one sample or more.
    """
    # A compiled graph cannot wait for other workers: it ends here, and another begins behind.
    apply = torch.compiler.disable(_OverWorkers.apply)
    normalized: tuple[Tensor, Tensor, Tensor] = apply(inputs, weight, bias, epsilon, sum_over_workers, name)
    return normalized


class _OverWorkers(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any,
        inputs: Tensor,
        weight: Tensor,
        bias: Tensor,
        epsilon: float,
        sum_over_workers: SumOverWorkers,
        name: str,
    ) -> tuple[Tensor, Tensor, Tensor]:
        channels = inputs.shape[1]
        here = inputs.numel() // channels
        variance, mean = torch.var_mean(inputs.float(), _all_but_channels(inputs), correction=0)
        # In float64 the square of the mean can be taken from the mean of the squares.
        variance, mean = variance.double(), mean.double()
        sums = torch.cat([mean * here, (variance + mean.square()) * here, mean.new_full((1,), here)])
        sum_over_workers(sums, f"{name}.forward")
        count = sums[-1]
        mean = sums[:channels] / count
        variance = (sums[channels:-1] / count - mean.square()).clamp_(min=0.0)
        single_mean, single_variance = mean.float(), variance.float()
        ctx.save_for_backward(inputs, weight, single_mean, (single_variance + epsilon).rsqrt_(), count)
        ctx.sum_over_workers, ctx.name = sum_over_workers, name
        outputs = functional.batch_norm(inputs, single_mean, single_variance, weight, bias, eps=epsilon)
        unbiased = variance * (count / (count - 1))
        ctx.mark_non_differentiable(mean, unbiased)
        return outputs, mean, unbiased

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, upstream: Tensor, *_: Tensor) -> tuple[Tensor | None, ...]:
        inputs, weight, mean, scale, count = ctx.saved_tensors
        channels = inputs.shape[1]
        shape = (1, channels, *(1,) * (inputs.dim() - 2))
        dimensions = _all_but_channels(inputs)
        gradient = upstream.float()
        standard = (inputs.float() - mean.view(shape)) * scale.view(shape)
        of_bias = gradient.sum(dimensions)
        of_weight = (gradient * standard).sum(dimensions)
        sums = torch.cat([of_bias, of_weight]).double()
        ctx.sum_over_workers(sums, f"{ctx.name}.backward")
        mean_gradient, mean_product = (sums / count).float().view(2, *shape)
        of_inputs = (gradient - mean_gradient - standard * mean_product) * (weight.float() * scale).view(shape)
        return of_inputs.to(inputs.dtype), of_weight.to(weight.dtype), of_bias.to(weight.dtype), None, None, None


def _all_but_channels(inputs: Tensor) -> list[int]:
    return [0, *range(2, inputs.dim())]
