"""The arithmetic of batch norm (arXiv 1502.03167), over groups of samples and, for sync norm, over ranks.

On CPUs torch's own batch norm adds up a channel of a channels-last tensor in one float32 accumulator: over the 94,080
values of 120 images of 28x28 that loses three to four digits (docs/norms.md). Here each position of the image is
first a channel of its own, so that an accumulator sees one value a sample, and the positions are summed pairwise.
On GPUs our kernels take all groups at once, and the ReLU behind them, where Triton is there; else torch's take each.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from typing import Any, Literal

import torch
from torch import Tensor

from dist_train.kernels import operators

Activation = Literal["none", "relu"]
"""What follows a norm."""

SumOverRanks = Callable[[Tensor, str], None]
"""Replaces a contiguous tensor by its sum over all ranks; the text names the operation, the same on all of them."""

_RUN = 128
"""Samples that one accumulator adds up at the most."""

_FEW_VALUES = 8192
"""Values of a channel up to which torch's backward pass keeps its error, given accurate moments, below 2e-5."""


@dataclass(frozen=True)
class AcrossRanks:
    """Where a group's samples lie on several ranks: how their sums are made, and what the operations are called."""

    sum: SumOverRanks
    name: str


def normalize(
    inputs: Tensor,
    weight: Tensor,
    bias: Tensor,
    epsilon: float,
    group_sizes: Sequence[int],
    across: AcrossRanks | None = None,
    activation: Activation = "none",
) -> tuple[Tensor, Tensor, Tensor]:
    """Return `inputs` [n, C] or [n, C, H, W] normalized group by group, with `activation` applied, and the groups'
    means and variances [g, C].

    Groups are consecutive samples, `group_sizes` of them. `across` makes one group of what all ranks bring; every rank
    must then call it, with one sample or more. Means and unbiased variances, float32, carry no gradient; the variance
    of a single value is 0.
    """
    if torch.compiler.is_compiling() and across is None:
        # The compiler fuses plain operations, and cannot see into a kernel's writes to parts of a tensor.
        groups = inputs.split(list(group_sizes))
        outputs = _activated(_plain_groups(inputs, weight, bias, epsilon, group_sizes), activation)
        moments = [torch.var_mean(group.detach().float(), [0, *range(2, group.dim())]) for group in groups]
        variances, means = (torch.stack(kind) for kind in zip(*moments, strict=True))
        return outputs, means, variances
    if across is None and _kernels_take(inputs, group_sizes):
        kernels: Callable[..., tuple[Tensor, Tensor, Tensor]] = _NormalizeByKernels.apply
        return kernels(inputs, weight, bias, epsilon, tuple(group_sizes), activation)
    operation: Callable[..., tuple[Tensor, Tensor, Tensor]] = _Normalize.apply
    if across is not None:
        # A compiled graph cannot wait for other ranks: it ends here, and another begins behind.
        operation = torch.compiler.disable(operation)
    outputs, means, variances = operation(inputs, weight, bias, epsilon, tuple(group_sizes), across)
    return _activated(outputs, activation), means, variances


def _activated(outputs: Tensor, activation: Activation) -> Tensor:
    return outputs.relu_() if activation == "relu" else outputs


def _kernels_take(inputs: Tensor, group_sizes: Sequence[int]) -> bool:
    """Whether our kernels can compute it: where the layout is another, torch's need no copy."""
    laid_out = inputs.dim() == 2 or inputs.is_contiguous(memory_format=torch.channels_last)
    alike = len({*group_sizes[:-1]}) <= 1
    return inputs.is_cuda and laid_out and alike and inputs.dtype != torch.float64 and operators.has_triton()


class _NormalizeByKernels(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any,
        inputs: Tensor,
        weight: Tensor,
        bias: Tensor,
        epsilon: float,
        group_sizes: tuple[int, ...],
        activation: Activation,
    ) -> tuple[Tensor, Tensor, Tensor]:
        inputs = _channels_last(inputs)
        outputs, moments = torch.ops.dist_train.ghost_norm(
            inputs, weight, bias, epsilon, group_sizes[0], len(group_sizes), activation
        )
        ctx.save_for_backward(inputs, weight, bias, moments)
        ctx.epsilon, ctx.group_sizes, ctx.activation = epsilon, group_sizes, activation
        means, variances, _ = moments.unbind()
        ctx.mark_non_differentiable(means, variances)
        ctx.set_materialize_grads(False)
        return outputs, means, variances

    @staticmethod
    def backward(ctx: Any, upstream: Tensor, *_: Tensor) -> tuple[Tensor | None, ...]:
        inputs, weight, bias, moments = ctx.saved_tensors
        if torch.is_grad_enabled():
            again = _plain_groups(inputs, weight, bias, ctx.epsilon, ctx.group_sizes)
            leaves = (inputs, weight, bias)
            gradients = torch.autograd.grad(_activated(again, ctx.activation), leaves, upstream, create_graph=True)
            return *gradients, None, None, None
        of_inputs, of_groups = torch.ops.dist_train.ghost_norm_backward(
            _channels_last(upstream), inputs, weight, bias, moments, ctx.group_sizes[0], ctx.activation
        )
        of_weight, of_bias = (of_groups.sum(1) if len(ctx.group_sizes) > 1 else of_groups[:, 0]).unbind()
        return of_inputs, of_weight, of_bias, None, None, None


class _Normalize(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any,
        inputs: Tensor,
        weight: Tensor,
        bias: Tensor,
        epsilon: float,
        group_sizes: tuple[int, ...],
        across: AcrossRanks | None,
    ) -> tuple[Tensor, Tensor, Tensor]:
        fused = across is None and _torch_is_accurate(inputs)
        if not fused:
            inputs = _channels_last(inputs)
        outputs = torch.empty_like(inputs)
        groups = zip(inputs.split(group_sizes), outputs.split(group_sizes), strict=True)
        if fused:
            means, variances, scales = _normalize_fused(groups, len(group_sizes), weight, bias, epsilon)
        else:
            moments = [_normalize(group, weight, bias, epsilon, output, across) for group, output in groups]
            means, variances, scales = (torch.stack(of_groups) for of_groups in zip(*moments, strict=True))
        ctx.save_for_backward(inputs, weight, bias, means, scales)
        ctx.epsilon, ctx.group_sizes, ctx.across, ctx.fused = epsilon, group_sizes, across, fused
        ctx.mark_non_differentiable(means, variances)
        ctx.set_materialize_grads(False)
        return outputs, means, variances

    @staticmethod
    def backward(ctx: Any, upstream: Tensor, *_: Tensor) -> tuple[Tensor | None, ...]:
        inputs, weight, bias, means, scales = ctx.saved_tensors
        if torch.is_grad_enabled():
            # The gradient is to be differentiated again, as for a Hessian: by operations that can be.
            assert ctx.across is None, "sync norm has first derivatives only"
            again = _plain_groups(inputs, weight, bias, ctx.epsilon, ctx.group_sizes)
            leaves = (inputs, weight, bias)
            return *torch.autograd.grad(again, leaves, upstream, create_graph=True), None, None, None
        upstream = upstream if ctx.fused else _channels_last(upstream)
        groups = zip(
            inputs.split(ctx.group_sizes), upstream.split(ctx.group_sizes), means.unbind(), scales.unbind(), strict=True
        )
        values = max(ctx.group_sizes) * inputs[0, 0].numel()
        if ctx.fused or (ctx.across is None and values <= _FEW_VALUES):
            of_inputs, of_weight, of_bias = _fused_gradients(weight, ctx.epsilon, groups)
        else:
            of_inputs = torch.empty_like(inputs)
            outputs = of_inputs.split(ctx.group_sizes)
            gradients = [
                _gradients(weight, ctx.across, *group, out) for group, out in zip(groups, outputs, strict=True)
            ]
            of_weight, of_bias = (
                kind[0] if len(kind) == 1 else torch.stack(kind).sum(0) for kind in zip(*gradients, strict=True)
            )
        return of_inputs, of_weight, of_bias, None, None, None


def _plain_groups(inputs: Tensor, weight: Tensor, bias: Tensor, epsilon: float, group_sizes: Sequence[int]) -> Tensor:
    return torch.cat([_plain(group, weight, bias, epsilon) for group in inputs.split(list(group_sizes))])


def _plain(group: Tensor, weight: Tensor, bias: Tensor, epsilon: float) -> Tensor:
    """Return the normalized `group`, by operations that torch can differentiate any number of times."""
    dimensions = [0, *range(2, group.dim())]
    values = group.float()
    centered = values - values.mean(dimensions, keepdim=True)
    scale = (centered.square().mean(dimensions, keepdim=True) + epsilon).rsqrt()
    shape = (-1, *(1,) * (group.dim() - 2))
    return (centered * (scale * weight.view(shape)) + bias.view(shape)).to(group.dtype)


def _torch_is_accurate(inputs: Tensor) -> bool:
    """Whether torch's own batch norm keeps float32's precision for such inputs [n, C] or [n, C, H, W]."""
    if inputs.is_cuda:
        return True
    if inputs.dim() == 2:
        return len(inputs) <= _RUN
    return not inputs.is_contiguous(memory_format=torch.channels_last)


def _channels_last(images: Tensor) -> Tensor:
    return images.contiguous(memory_format=torch.channels_last if images.dim() == 4 else torch.contiguous_format)


def _normalize_fused(
    groups: Iterable[tuple[Tensor, Tensor]], count: int, weight: Tensor, bias: Tensor, epsilon: float
) -> tuple[Tensor, ...]:
    """Write `count` groups, normalized with torch's kernel, each to its output.

    Return means, unbiased variances and 1/deviations [g, C].
    """
    moments = weight.new_zeros(4, count, len(weight))
    for (group, output), own in zip(groups, moments.unbind(1), strict=True):
        mean, variance, scale, again = own.unbind()
        # With momentum 1 the running averages become this group's own statistics.
        torch.native_batch_norm(group, weight, bias, mean, variance, True, 1.0, epsilon, out=(output, again, scale))
    return moments[:3].unbind()


def _fused_gradients(
    weight: Tensor, epsilon: float, groups: Iterable[tuple[Tensor, Tensor, Tensor, Tensor]]
) -> tuple[Tensor, Tensor, Tensor]:
    """Return the gradients of the inputs, and of weight and bias [C], by torch's kernel for each of `groups`.

    A group is its inputs, their upstream gradient, its mean and 1/deviation.
    """
    kernel = torch.ops.aten.native_batch_norm_backward
    gradients = [
        kernel(upstream, group, weight, None, None, mean, scale, True, epsilon, [True, True, True])
        for group, upstream, mean, scale in groups
    ]
    if len(gradients) == 1:
        [(of_inputs, of_weight, of_bias)] = gradients
        return of_inputs, of_weight, of_bias
    parts, of_weights, of_biases = zip(*gradients, strict=True)
    of_weight, of_bias = torch.stack((*of_weights, *of_biases)).view(2, len(parts), -1).sum(1).unbind()
    return torch.cat(parts), of_weight, of_bias


def _normalize(
    group: Tensor, weight: Tensor, bias: Tensor, epsilon: float, output: Tensor, across: AcrossRanks | None
) -> tuple[Tensor, Tensor, Tensor]:
    """Write the normalized `group`; return mean, unbiased variance and 1/deviation [C]."""
    mean, variance = _moments(group)
    values = group.numel() // len(mean)
    if across is None:
        unbiased = variance * (values / max(values - 1, 1))
    else:
        mean, variance, unbiased = _moments_across_ranks(mean, variance, values, across)
    scale = (variance + epsilon).rsqrt_()
    factor = weight * scale
    _multiply_add(group, factor, torch.addcmul(bias, mean, factor, value=-1.0), output)
    return mean, unbiased, scale


def _gradients(
    weight: Tensor,
    across: AcrossRanks | None,
    group: Tensor,
    upstream: Tensor,
    mean: Tensor,
    scale: Tensor,
    of_group: Tensor,
) -> tuple[Tensor, Tensor]:
    """Write the gradient of `group`; return those of weight and bias [C], of the samples that are here."""
    of_weight, of_bias = _gradient_sums(group, upstream, mean, scale)
    if across is None:
        share = len(mean) / group.numel()
        mean_product, mean_gradient = of_weight * share, of_bias * share
    else:
        values = of_bias.new_full((1,), group.numel() // len(mean))
        sums = torch.cat([of_weight, of_bias, values]).double()
        across.sum(sums, f"{across.name}.backward")
        mean_product, mean_gradient = (sums[:-1] / sums[-1]).float().chunk(2)
    factor = weight * scale
    slope = factor * scale * mean_product
    term = torch.addcmul(slope * mean, factor, mean_gradient, value=-1.0)
    _multiply_add(upstream, factor, term, of_group, group, slope.neg_())
    return of_weight, of_bias


def _columns(images: Tensor) -> Tensor:
    """Return `images` [n, C] or, in channels-last layout, [n, C, H, W] as they lie in memory: [n, H W C]."""
    return images.permute(0, 2, 3, 1).flatten(1) if images.dim() == 4 else images


def _moments(group: Tensor) -> tuple[Tensor, Tensor]:
    """Return the mean and the biased variance [C] of `group`."""
    if group.is_cuda:
        variance, mean = torch.var_mean(group.float(), [0, *range(2, group.dim())], correction=0)
        return mean, variance
    if len(group) > _RUN:
        runs = group.split(_RUN)
        means, variances = (torch.stack(kind) for kind in zip(*map(_moments, runs), strict=True))
        shares = torch.tensor([[len(run) / len(group)] for run in runs])
        return _moments_of_parts(means, variances, shares)
    columns = _columns(group)
    # Of half precision the kernel keeps float32 moments only where it is given float32 averages to move.
    averages = None if columns.dtype == torch.float32 else columns.new_zeros(columns.shape[1], dtype=torch.float32)
    means, variances = torch.batch_norm_update_stats(columns, averages, averages, 0.0)
    positions = (-1, group.shape[1])
    return _moments_of_parts(means.view(positions), variances.view(positions), group.shape[1] / len(means))


def _moments_of_parts(means: Tensor, variances: Tensor, shares: Tensor | float) -> tuple[Tensor, Tensor]:
    """Return mean and variance [C] of a whole, from those of its parts [parts, C] and their shares in it."""
    mean = (means * shares).sum(0)
    distances = means - mean
    return mean, (torch.addcmul(variances, distances, distances) * shares).sum(0)


def _gradient_sums(group: Tensor, upstream: Tensor, mean: Tensor, scale: Tensor) -> tuple[Tensor, Tensor]:
    """Return the sums over `group` of `upstream` times the standardized activation, and of `upstream`; [C] each."""
    if group.is_cuda:
        dimensions = [0, *range(2, group.dim())]
        upstream, shape = upstream.float(), (-1, *(1,) * (group.dim() - 2))
        standard = (group.float() - mean.view(shape)) * scale.view(shape)
        return (upstream * standard).sum(dimensions), upstream.sum(dimensions)
    if len(group) > _RUN:
        runs = zip(group.split(_RUN), upstream.split(_RUN), strict=True)
        sums = [_gradient_sums(run, gradient, mean, scale) for run, gradient in runs]
        products, totals = (torch.stack(kind).sum(0) for kind in zip(*sums, strict=True))
        return products, totals
    columns, channels = _columns(group), len(mean)
    positions = columns.shape[1] // channels
    # Of torch's kernel for all gradients only two sums are asked for.
    _, products, totals = torch.ops.aten.native_batch_norm_backward(
        _columns(upstream),
        columns,
        None,
        None,
        None,
        mean.repeat(positions),
        scale.repeat(positions),
        True,
        0.0,
        [False, True, True],
    )
    return products.view(positions, channels).sum(0), totals.view(positions, channels).sum(0)


def _moments_across_ranks(
    mean: Tensor, variance: Tensor, values: int, across: AcrossRanks
) -> tuple[Tensor, Tensor, Tensor]:
    """Return mean, biased and unbiased variance [C] over all ranks, from those of the `values` values here."""
    channels = len(mean)
    here, spread = mean.double(), variance.double()
    # In float64 the square of the mean can be taken from the mean of the squares.
    sums = torch.cat([here * values, (spread + here.square()) * values, here.new_full((1,), values)])
    across.sum(sums, f"{across.name}.forward")
    count = sums[-1]
    here = sums[:channels] / count
    spread = (sums[channels:-1] / count - here.square()).clamp_(min=0.0)
    return here.float(), spread.float(), (spread * (count / (count - 1).clamp_(min=1.0))).float()


def _multiply_add(
    images: Tensor, factor: Tensor, term: Tensor, out: Tensor, others: Tensor | None = None, slope: Tensor | None = None
) -> None:
    """Write images * factor + others * slope + term, the latter per channel [C], computed in float32, to `out`."""
    shape = (-1, *(1,) * (images.dim() - 2))
    single = out.dtype == torch.float32
    result = torch.addcmul(term.view(shape), images, factor.view(shape), out=out if single else None)
    if others is not None and slope is not None:
        result.addcmul_(others.float(), slope.view(shape))
    if not single:
        out.copy_(result)
