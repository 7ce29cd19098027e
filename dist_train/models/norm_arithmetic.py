"""The arithmetic of batch norm (arXiv 1502.03167), over groups of samples and, for sync norm, over ranks.

Our kernels compute all groups at once, together with the ReLU that follows: compiled ones on CPUs, Triton's on GPUs.
Without them, torch's kernels compute one group after the other. On CPUs, torch's batch norm adds up a channel of a
channels-last tensor in one float32 accumulator: over the 94,080 values of 120 images of 28x28 that loses three to four
digits (docs/norms.md). It is accurate if the values of a channel are contiguous, so they are copied.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor
from torch.nn import functional

from dist_train.kernels import operators

_Operation = Callable[..., tuple[Tensor, Tensor, Tensor]]

SumOverRanks = Callable[[Tensor, str], None]  # sums a contiguous tensor over all ranks in place, under a name


def normalize(
    inputs: Tensor,
    weight: Tensor,
    bias: Tensor,
    epsilon: float,
    group_sizes: Sequence[int],
    across: SumOverRanks | None = None,
    relu: bool = False,
) -> tuple[Tensor, Tensor, Tensor]:
    """Normalize `inputs` [n, C] or [n, C, H, W] group by group and apply a ReLU, if `relu`.

    Return the outputs and the groups' means and unbiased variances [g, C], float32, without gradients; the variance of
    a single value is 0. Groups are consecutive samples, in numbers of `group_sizes`. With `across`, the samples of all
    ranks form one group; then every rank must call this, with at least one sample.
    """
    if torch.compiler.is_compiling() and across is None:
        # The compiler fuses plain operations, but does not handle kernels that write to parts of a tensor.
        groups = inputs.split(list(group_sizes))
        outputs = _plain(inputs, weight, bias, epsilon, group_sizes, relu)
        moments = [torch.var_mean(group.detach().float(), [0, *range(2, group.dim())]) for group in groups]
        variances, means = (torch.stack(kind) for kind in zip(*moments, strict=True))
        return outputs, means, variances
    if across is not None:
        # A compiled graph cannot wait for other ranks: break the graph here.
        sync: _Operation = torch.compiler.disable(_NormalizeAcrossRanks.apply)
        outputs, means, variances = sync(inputs, weight, bias, epsilon, across)
    elif _kernels_support(inputs, weight, group_sizes):
        kernels: _Operation = _NormalizeByKernels.apply
        return kernels(inputs, weight, bias, epsilon, tuple(group_sizes), relu)
    else:
        plain: _Operation = _NormalizeByTorch.apply
        outputs, means, variances = plain(inputs, weight, bias, epsilon, tuple(group_sizes))
    return _rectified(outputs, relu), means, variances


def _rectified(outputs: Tensor, relu: bool) -> Tensor:
    return outputs.relu_() if relu else outputs


def _kernels_support(inputs: Tensor, weight: Tensor, group_sizes: Sequence[int]) -> bool:
    """Whether our kernels can normalize `inputs`; for contiguous ones (NCHW) torch's kernels need no copy."""
    has_layout = inputs.dim() == 2 or inputs.is_contiguous(memory_format=torch.channels_last)
    has_equal_groups = len({*group_sizes[:-1]}) <= 1
    return has_layout and has_equal_groups and operators.has_norm_kernels(inputs, weight)


class _NormalizeByKernels(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any, inputs: Tensor, weight: Tensor, bias: Tensor, epsilon: float, group_sizes: tuple[int, ...], relu: bool
    ) -> tuple[Tensor, Tensor, Tensor]:
        outputs, moments = torch.ops.dist_train.ghost_norm(
            _channels_last(inputs), weight, bias, epsilon, group_sizes[0], len(group_sizes), relu
        )
        ctx.save_for_backward(inputs, weight, bias, moments)
        ctx.epsilon, ctx.group_sizes, ctx.relu = epsilon, group_sizes, relu
        means, variances, _ = moments.unbind()
        ctx.mark_non_differentiable(means, variances)
        ctx.set_materialize_grads(False)
        return outputs, means, variances

    @staticmethod
    def backward(ctx: Any, upstream: Tensor, *_: Tensor) -> tuple[Tensor | None, ...]:
        inputs, weight, bias, moments = ctx.saved_tensors
        if torch.is_grad_enabled():
            return *_plain_gradients(ctx, upstream, ctx.relu), None, None, None
        grad_inputs, grad_groups = torch.ops.dist_train.ghost_norm_backward(
            _channels_last(upstream), _channels_last(inputs), weight, bias, moments, ctx.group_sizes[0], ctx.relu
        )
        grad_weight, grad_bias = (grad_groups.sum(1) if len(ctx.group_sizes) > 1 else grad_groups[:, 0]).unbind()
        return grad_inputs, grad_weight, grad_bias, None, None, None


class _NormalizeByTorch(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any, inputs: Tensor, weight: Tensor, bias: Tensor, epsilon: float, group_sizes: tuple[int, ...]
    ) -> tuple[Tensor, Tensor, Tensor]:
        outputs = torch.empty_like(inputs)
        moments = weight.new_zeros(4, len(group_sizes), len(weight))
        groups = zip(inputs.split(group_sizes), outputs.split(group_sizes), moments.unbind(1), strict=True)
        copies = not _torch_is_accurate(inputs)
        for group, output, group_moments in groups:
            mean, variance, scale, saved_mean = group_moments.unbind()
            values = _by_channel(group) if copies else group
            result = torch.empty_like(values) if copies else output
            # With momentum 1 the running statistics become those of this group.
            torch.native_batch_norm(
                values, weight, bias, mean, variance, True, 1.0, epsilon, out=(result, saved_mean, scale)
            )
            if copies:
                output.copy_(_by_sample(result, output))
            if group.numel() == len(weight):
                variance.zero_()  # of a single value, for which torch divides by 0
        means, variances, scales, _ = moments.unbind()
        ctx.save_for_backward(inputs, weight, bias, means, scales)
        ctx.epsilon, ctx.group_sizes, ctx.copies = epsilon, group_sizes, copies
        ctx.mark_non_differentiable(means, variances)
        ctx.set_materialize_grads(False)
        return outputs, means, variances

    @staticmethod
    def backward(ctx: Any, upstream: Tensor, *_: Tensor) -> tuple[Tensor | None, ...]:
        inputs, weight, _, means, scales = ctx.saved_tensors
        if torch.is_grad_enabled():
            return *_plain_gradients(ctx, upstream, relu=False), None, None
        sizes = ctx.group_sizes
        grad_groups = []
        for group, gradient, mean, scale in zip(
            inputs.split(sizes), upstream.split(sizes), means.unbind(), scales.unbind(), strict=True
        ):
            values, slopes = (_by_channel(group), _by_channel(gradient)) if ctx.copies else (group, gradient)
            grad_values, grad_weight, grad_bias = torch.ops.aten.native_batch_norm_backward(
                slopes, values, weight, None, None, mean, scale, True, ctx.epsilon, [True, True, True]
            )
            if ctx.copies:
                grad_values = _by_sample(grad_values, group).to(group.dtype)
            grad_groups.append((grad_values, grad_weight, grad_bias))
        if len(grad_groups) == 1:
            return *grad_groups[0], None, None
        parts, grad_weights, grad_biases = zip(*grad_groups, strict=True)
        grad_weight, grad_bias = torch.stack((*grad_weights, *grad_biases)).view(2, len(parts), -1).sum(1).unbind()
        return torch.cat(parts), grad_weight, grad_bias, None, None


class _NormalizeAcrossRanks(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any, inputs: Tensor, weight: Tensor, bias: Tensor, epsilon: float, across: SumOverRanks
    ) -> tuple[Tensor, Tensor, Tensor]:
        mean, variance, unbiased = _moments_across_ranks(inputs, across)
        # Evaluation normalizes by given moments.
        outputs = functional.batch_norm(inputs, mean, variance, weight, bias, eps=epsilon)
        ctx.save_for_backward(inputs, weight, mean, (variance + epsilon).rsqrt_())
        ctx.across = across
        means, variances = mean.unsqueeze(0), unbiased.unsqueeze(0)
        ctx.mark_non_differentiable(means, variances)
        ctx.set_materialize_grads(False)
        return outputs, means, variances

    @staticmethod
    def backward(ctx: Any, upstream: Tensor, *_: Tensor) -> tuple[Tensor | None, ...]:
        assert not torch.is_grad_enabled(), "sync norm has first derivatives only"
        inputs, weight, mean, scale = ctx.saved_tensors
        dimensions, shape = [0, *range(2, inputs.dim())], (-1, *(1,) * (inputs.dim() - 2))
        standard = (inputs.float() - mean.view(shape)) * scale.view(shape)
        gradient = upstream.float()
        grad_weight, grad_bias = (gradient * standard).sum(dimensions), gradient.sum(dimensions)
        values = grad_bias.new_full((1,), inputs.numel() // len(mean))
        sums = torch.cat([grad_weight, grad_bias, values]).double()
        ctx.across(sums, "backward")
        mean_product, mean_gradient = (share.view(shape) for share in (sums[:-1] / sums[-1]).float().chunk(2))
        grad_inputs = (gradient - mean_gradient - standard * mean_product) * (weight * scale).view(shape)
        return grad_inputs.to(inputs.dtype), grad_weight, grad_bias, None, None


def _plain_gradients(ctx: Any, upstream: Tensor, relu: bool) -> tuple[Tensor | None, ...]:
    """Return the gradients that are needed, by operations that can be differentiated again, as Hessians require."""
    inputs, weight, bias = ctx.saved_tensors[:3]
    needed = ctx.needs_input_grad[:3]
    outputs = _plain(inputs, weight, bias, ctx.epsilon, ctx.group_sizes, relu)
    wanted = [leaf for leaf, is_needed in zip((inputs, weight, bias), needed, strict=True) if is_needed]
    found = iter(torch.autograd.grad(outputs, wanted, upstream, create_graph=True))
    return tuple(next(found) if is_needed else None for is_needed in needed)


def _plain(
    inputs: Tensor, weight: Tensor, bias: Tensor, epsilon: float, group_sizes: Sequence[int], relu: bool
) -> Tensor:
    """Return the outputs of `normalize`, by operations that torch can differentiate repeatedly."""
    dimensions, shape = [0, *range(2, inputs.dim())], (-1, *(1,) * (inputs.dim() - 2))
    outputs = []
    for group in inputs.split(list(group_sizes)):
        values = group.float()
        centered = values - values.mean(dimensions, keepdim=True)
        scale = (centered.square().mean(dimensions, keepdim=True) + epsilon).rsqrt()
        outputs.append((centered * (scale * weight.view(shape)) + bias.view(shape)).to(group.dtype))
    return _rectified(torch.cat(outputs), relu)


def _torch_is_accurate(inputs: Tensor) -> bool:
    """Whether torch's batch norm keeps float32 precision for `inputs` [n, C] or [n, C, ...] in their layout.

    For ones that are not contiguous, such as a part of the channels, torch 2.13 even takes 0 as the mean, given `out`.
    """
    is_plain = inputs.is_contiguous() and not inputs.is_contiguous(memory_format=torch.channels_last)
    return inputs.is_cuda or (inputs.dim() > 2 and is_plain)


def _by_channel(group: Tensor) -> Tensor:
    """Return `group` [n, C, ...], at least float32, with the values of each channel contiguous: [1, C, values]."""
    values = group.to(torch.promote_types(group.dtype, torch.float32))
    return values.transpose(0, 1).flatten(1).contiguous().unsqueeze(0)


def _by_sample(values: Tensor, group: Tensor) -> Tensor:
    """Return `values` [1, C, values] in the shape of `group` [n, C, ...]."""
    return values.view(group.shape[1], len(group), *group.shape[2:]).transpose(0, 1)


def _channels_last(images: Tensor) -> Tensor:
    return images.contiguous(memory_format=torch.channels_last if images.dim() == 4 else torch.contiguous_format)


def _moments_across_ranks(inputs: Tensor, across: SumOverRanks) -> tuple[Tensor, Tensor, Tensor]:
    """Return mean, biased and unbiased variance [C] of the `inputs` of all ranks."""
    variance, mean = torch.var_mean(inputs.float(), [0, *range(2, inputs.dim())], correction=0)
    mean, variance, values = mean.double(), variance.double(), inputs.numel() // len(mean)
    # In float64, subtracting the squared mean from the mean of squares is accurate enough.
    sums = torch.cat([mean * values, (variance + mean.square()) * values, mean.new_full((1,), values)])
    across(sums, "forward")
    mean, square = (sums[:-1] / sums[-1]).chunk(2)
    variance = (square - mean.square()).clamp_(min=0.0)
    unbiased = variance * (sums[-1] / (sums[-1] - 1).clamp_(min=1.0))
    return mean.float(), variance.float(), unbiased.float()
