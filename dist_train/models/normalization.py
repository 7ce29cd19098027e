"""The arithmetic of batch norm (arXiv 1502.03167), over groups of samples and, for sync norm, over ranks.

On CPUs, torch's batch norm adds up a channel of a channels-last tensor in one float32 accumulator: over the 94,080
values of 120 images of 28x28 that loses three to four digits (docs/norms.md). Here each position of the image is first
treated as a channel, so that an accumulator sees one value per sample, and the positions are then summed pairwise.
On GPUs with Triton, our kernels compute all groups at once, together with the ReLU that follows; without Triton,
torch's kernels compute one group after the other.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from typing import Any, Literal

import torch
from torch import Tensor

from dist_train.kernels import operators

Activation = Literal["none", "relu"]  # the activation applied after a norm

SumOverRanks = Callable[[Tensor, str], None]  # sums a contiguous tensor over all ranks in place, under a name

_RUN = 128  # the most samples that one accumulator adds up

_CACHED_VALUES = 100_000  # float32 values that, twice, stay in the cache of one core

_FEW_VALUES = 8192  # per channel: so far, torch's backward pass, given accurate moments, errs below 2e-5


@dataclass(frozen=True)
class AcrossRanks:
    """For groups whose samples lie on several ranks: how to sum over the ranks, and a prefix for operation names."""

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
    """Normalize `inputs` [n, C] or [n, C, H, W] group by group and apply `activation`.

    Return the outputs and the groups' means and unbiased variances [g, C], float32, without gradients; the variance of
    a single value is 0. Groups are consecutive samples, as many in each as `group_sizes` says. With `across`, the
    samples of all ranks form one group; then every rank must call this, with at least one sample.
    """
    if torch.compiler.is_compiling() and across is None:
        # The compiler fuses plain operations, but does not handle kernels that write to parts of a tensor.
        groups = inputs.split(list(group_sizes))
        outputs = _activated(_plain_groups(inputs, weight, bias, epsilon, group_sizes), activation)
        moments = [torch.var_mean(group.detach().float(), [0, *range(2, group.dim())]) for group in groups]
        variances, means = (torch.stack(kind) for kind in zip(*moments, strict=True))
        return outputs, means, variances
    if across is None and _kernels_support(inputs, group_sizes):
        kernels: Callable[..., tuple[Tensor, Tensor, Tensor]] = _NormalizeByKernels.apply
        return kernels(inputs, weight, bias, epsilon, tuple(group_sizes), activation)
    operation: Callable[..., tuple[Tensor, Tensor, Tensor]] = _Normalize.apply
    if across is not None:
        # A compiled graph cannot wait for other ranks: break the graph here.
        operation = torch.compiler.disable(operation)
    outputs, means, variances = operation(inputs, weight, bias, epsilon, tuple(group_sizes), across)
    return _activated(outputs, activation), means, variances


def _activated(outputs: Tensor, activation: Activation) -> Tensor:
    return outputs.relu_() if activation == "relu" else outputs


def _kernels_support(inputs: Tensor, group_sizes: Sequence[int]) -> bool:
    """Whether our kernels can normalize `inputs`. In other layouts torch's need no copy."""
    has_layout = inputs.dim() == 2 or inputs.is_contiguous(memory_format=torch.channels_last)
    has_equal_groups = len({*group_sizes[:-1]}) <= 1
    has_type = inputs.dtype != torch.float64
    return inputs.is_cuda and has_layout and has_equal_groups and has_type and operators.has_triton()


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
            return *_plain_gradients(ctx, upstream, ctx.activation), None, None, None
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
        groups = zip(_split(inputs, group_sizes), _split(outputs, group_sizes), strict=True)
        if fused:
            means, variances, scales = _normalize_fused(groups, len(group_sizes), weight, bias, epsilon)
        else:
            moments = [_normalize(group, weight, bias, epsilon, output, across) for group, output in groups]
            means, variances, scales = (_stack(of_groups) for of_groups in zip(*moments, strict=True))
        ctx.save_for_backward(inputs, weight, bias, means, scales)
        ctx.epsilon, ctx.group_sizes, ctx.across, ctx.fused = epsilon, group_sizes, across, fused
        ctx.mark_non_differentiable(means, variances)
        ctx.set_materialize_grads(False)
        return outputs, means, variances

    @staticmethod
    def backward(ctx: Any, upstream: Tensor, *_: Tensor) -> tuple[Tensor | None, ...]:
        inputs, weight, _, means, scales = ctx.saved_tensors
        if torch.is_grad_enabled():
            assert ctx.across is None, "sync norm has first derivatives only"
            return *_plain_gradients(ctx, upstream, "none"), None, None, None
        upstream = upstream if ctx.fused else _channels_last(upstream)
        sizes = ctx.group_sizes
        groups = zip(_split(inputs, sizes), _split(upstream, sizes), means.unbind(), scales.unbind(), strict=True)
        values = max(sizes) * inputs[0, 0].numel()
        if ctx.fused or (ctx.across is None and values <= _FEW_VALUES):
            of_inputs, of_weight, of_bias = _fused_gradients(weight, ctx.epsilon, groups)
        else:
            of_inputs = torch.empty_like(inputs)
            of_groups = _split(of_inputs, sizes)
            gradients = [
                _gradients(weight, ctx.across, *group, of_group)
                for group, of_group in zip(groups, of_groups, strict=True)
            ]
            of_weight, of_bias = (
                kind[0] if len(kind) == 1 else torch.stack(kind).sum(0) for kind in zip(*gradients, strict=True)
            )
        return of_inputs, of_weight, of_bias, None, None, None


def _plain_gradients(ctx: Any, upstream: Tensor, activation: Activation) -> tuple[Tensor, ...]:
    """Return the gradients by operations that can be differentiated once more, as for Hessians."""
    inputs, weight, bias = ctx.saved_tensors[:3]
    outputs = _activated(_plain_groups(inputs, weight, bias, ctx.epsilon, ctx.group_sizes), activation)
    gradients: tuple[Tensor, ...] = torch.autograd.grad(outputs, (inputs, weight, bias), upstream, create_graph=True)
    return gradients


def _plain_groups(inputs: Tensor, weight: Tensor, bias: Tensor, epsilon: float, group_sizes: Sequence[int]) -> Tensor:
    return torch.cat([_plain(group, weight, bias, epsilon) for group in inputs.split(list(group_sizes))])


def _plain(group: Tensor, weight: Tensor, bias: Tensor, epsilon: float) -> Tensor:
    """Return the normalized `group`, by operations that torch can differentiate repeatedly."""
    dimensions = [0, *range(2, group.dim())]
    values = group.float()
    centered = values - values.mean(dimensions, keepdim=True)
    scale = (centered.square().mean(dimensions, keepdim=True) + epsilon).rsqrt()
    shape = (-1, *(1,) * (group.dim() - 2))
    return (centered * (scale * weight.view(shape)) + bias.view(shape)).to(group.dtype)


def _torch_is_accurate(inputs: Tensor) -> bool:
    """Whether torch's batch norm keeps float32 precision for `inputs` [n, C] or [n, C, H, W] in their layout."""
    if inputs.is_cuda:
        return True
    if inputs.dim() == 2:
        return len(inputs) <= _RUN
    return not inputs.is_contiguous(memory_format=torch.channels_last)


def _split(samples: Tensor, group_sizes: Sequence[int]) -> Sequence[Tensor]:
    return (samples,) if len(group_sizes) == 1 else samples.split(group_sizes)


def _stack(of_groups: tuple[Tensor, ...]) -> Tensor:
    return of_groups[0].unsqueeze(0) if len(of_groups) == 1 else torch.stack(of_groups)


def _channels_last(images: Tensor) -> Tensor:
    return images.contiguous(memory_format=torch.channels_last if images.dim() == 4 else torch.contiguous_format)


def _normalize_fused(
    groups: Iterable[tuple[Tensor, Tensor]], count: int, weight: Tensor, bias: Tensor, epsilon: float
) -> tuple[Tensor, ...]:
    """Normalize `count` groups with torch's kernel; return means, unbiased variances and 1/deviations [g, C]."""
    moments = weight.new_zeros(4, count, len(weight))
    for (group, output), of_group in zip(groups, moments.unbind(1), strict=True):
        mean, variance, scale, saved_mean = of_group.unbind()
        # With momentum 1 the running statistics become those of this group.
        torch.native_batch_norm(
            group, weight, bias, mean, variance, True, 1.0, epsilon, out=(output, saved_mean, scale)
        )
    return moments[:3].unbind()


def _fused_gradients(
    weight: Tensor, epsilon: float, groups: Iterable[tuple[Tensor, Tensor, Tensor, Tensor]]
) -> tuple[Tensor, Tensor, Tensor]:
    """Return the gradients by torch's kernel for each group: inputs, upstream gradient, mean and 1/deviation."""
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
    """Write the normalized `group` to `output`; return mean, unbiased variance and 1/deviation [C]."""
    mean, variance = _moments(group)
    values = group.numel() // len(mean)
    if across is None:
        unbiased = variance * (values / max(values - 1, 1))
    else:
        mean, variance, unbiased = _moments_across_ranks(mean, variance, values, across)
    scale = (variance + epsilon).rsqrt_()
    unused = mean.new_empty(0)
    # torch's kernel for evaluation, given this group's moments.
    torch.native_batch_norm(group, weight, bias, mean, variance, False, 0.0, epsilon, out=(output, unused, unused))
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
    """Write the gradient of `group` to `of_group`; return those of weight and bias [C] from this rank's samples."""
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
    _write_gradient(upstream, factor, group, slope.neg_(), term, of_group)
    return of_weight, of_bias


def _columns(images: Tensor) -> Tensor:
    """Return a view of `images` [n, C] or, in channels-last layout, [n, C, H, W], in memory order: [n, H W C]."""
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
    # For half precision, the kernel returns float32 moments only if it is given float32 running averages.
    averages = None if columns.dtype == torch.float32 else columns.new_zeros(columns.shape[1], dtype=torch.float32)
    means, variances = torch.batch_norm_update_stats(columns, averages, averages, 0.0)
    positions = (-1, group.shape[1])
    return _moments_of_parts(means.view(positions), variances.view(positions), group.shape[1] / len(means))


def _moments_of_parts(means: Tensor, variances: Tensor, shares: Tensor | float) -> tuple[Tensor, Tensor]:
    """Return the mean and variance [C] of a group from those of its parts [parts, C] and their shares of it."""
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
    # torch's kernel, here only for two of its sums.
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
    """Return mean, biased and unbiased variance [C] over all ranks, from those of this rank's `values` values."""
    channels = len(mean)
    mean, variance = mean.double(), variance.double()
    # In float64, subtracting the squared mean from the mean of squares is accurate enough.
    sums = torch.cat([mean * values, (variance + mean.square()) * values, mean.new_full((1,), values)])
    across.sum(sums, f"{across.name}.forward")
    count = sums[-1]
    mean = sums[:channels] / count
    variance = (sums[channels:-1] / count - mean.square()).clamp_(min=0.0)
    return mean.float(), variance.float(), (variance * (count / (count - 1).clamp_(min=1.0))).float()


def _write_gradient(
    upstream: Tensor, factor: Tensor, group: Tensor, slope: Tensor, term: Tensor, output: Tensor
) -> None:
    """Write upstream * factor + group * slope + term to `output`, computed in float32. Factor, slope and term are [C].

    In half precision on CPUs, a part at a time whose float32 copies fit the core's cache.
    """
    shape = (-1, *(1,) * (group.dim() - 2))
    factor, slope, term = factor.view(shape), slope.view(shape), term.view(shape)
    if output.dtype == torch.float32:
        torch.addcmul(term, upstream, factor, out=output).addcmul_(group, slope)
        return
    samples = len(group) if group.is_cuda else max(1, _CACHED_VALUES // group[0].numel())
    for of_output, *of_inputs in zip(output.split(samples), upstream.split(samples), group.split(samples), strict=True):
        result, values = (part.float() for part in of_inputs)
        torch.addcmul(term, result, factor, out=result).addcmul_(values, slope)
        of_output.copy_(result)
