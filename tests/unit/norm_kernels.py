"""What the norm kernels of CPUs and of GPUs have in common: subclasses of `NormKernels` name a module by a fixture."""

from __future__ import annotations

from collections.abc import Sequence
from types import ModuleType

import pytest
import torch
from torch import Tensor

from dist_train.kernels import operators
from dist_train.models.norms import GroupedBatchNorm, fuse_relus

EPSILON = 1e-5
CASES = [
    # samples, channels, sides, group size
    (7, 5, (), 3),
    (6, 3, (5, 7), 2),
    (9, 70, (9, 9), 4),
    (40, 2, (9, 11), 17),  # parts of 1,024 or 2,048 rows: more in the last group than in the first
    (5, 1, (1, 1), 5),
    (2, 130, (3, 1), 1),
]


Arguments = tuple[Tensor, Tensor, Tensor, Tensor]


def tensors(samples: int, channels: int, sides: tuple[int, ...], offset: float = 1.0) -> Arguments:
    """Return inputs in channels-last layout, the gradient of their outputs, weight and bias."""
    source = torch.Generator().manual_seed(samples)
    inputs, upstream = torch.randn(2, samples, channels, *sides, generator=source).unbind()
    if sides:
        inputs, upstream = (each.contiguous(memory_format=torch.channels_last) for each in (inputs, upstream))
    weight, bias = torch.randn(2, channels, generator=source).unbind()
    return inputs.mul(3.0).add_(offset), upstream, weight, bias


def sizes_of(samples: int, size: int) -> list[int]:
    groups = max(1, samples // size)
    return [size] * (groups - 1) + [samples - size * (groups - 1)]


def norm_by(
    kernels: ModuleType,
    inputs: Tensor,
    upstream: Tensor,
    weight: Tensor,
    bias: Tensor,
    sizes: Sequence[int],
    relu: bool,
) -> tuple[Tensor, ...]:
    """Return outputs, moments, the inputs' gradient and the groups' sums."""
    outputs, moments = kernels.normalize(inputs, weight, bias, EPSILON, sizes[0], len(sizes), relu)
    gradients = kernels.gradients(upstream, inputs, weight, bias, moments, sizes[0], relu)
    return outputs, moments, *gradients


def norm_in_float64(
    inputs: Tensor, upstream: Tensor, weight: Tensor, bias: Tensor, sizes: Sequence[int], relu: bool
) -> tuple[Tensor, ...]:
    """Return outputs, means and variances, and the gradients of inputs, weight and bias."""
    leaves = [each.double().requires_grad_() for each in (inputs, weight, bias)]
    outputs, shape, moments = [], (-1, *(1,) * (inputs.dim() - 2)), []
    for group in leaves[0].split(list(sizes)):
        dimensions = [0, *range(2, group.dim())]
        centered = group - group.mean(dimensions, keepdim=True)
        variance = centered.square().mean(dimensions)
        count = group.numel() / len(variance)
        moments.append(torch.stack([group.mean(dimensions), variance * count / max(count - 1, 1)]).detach())
        factor = leaves[1] * (variance + EPSILON).rsqrt()
        outputs.append(centered * factor.view(shape) + leaves[2].view(shape))
    whole = torch.cat(outputs).relu() if relu else torch.cat(outputs)
    return whole.detach(), torch.stack(moments, 1), *torch.autograd.grad(whole, leaves, upstream.double())


class NormKernels:
    """Tests with a fixture `kernels`, the module, and `kind`, a type of half precision that it supports."""

    @pytest.mark.parametrize("relu", [False, True])
    @pytest.mark.parametrize("case", CASES, ids=str)
    def test_norm_agrees_with_float64_up_to_rounding(
        self, kernels: ModuleType, case: tuple[int, int, tuple[int, ...], int], relu: bool
    ) -> None:
        samples, channels, sides, size = case
        given, sizes = tensors(samples, channels, sides), sizes_of(samples, size)
        outputs, moments, input_gradients, group_sums = norm_by(kernels, *given, sizes, relu)
        expected = norm_in_float64(*given, sizes, relu)
        for found, true in zip((outputs, moments[:2], input_gradients, *group_sums.sum(1)), expected, strict=True):
            torch.testing.assert_close(found.double(), true, rtol=1e-5, atol=1e-5 * float(true.abs().max()) + 1e-6)

    def test_variance_is_accurate_where_the_mean_is_large(self, kernels: ModuleType) -> None:
        inputs, upstream, weight, bias = tensors(40, 3, (9, 11), offset=1000.0)
        _, moments, _, _ = norm_by(kernels, inputs, upstream, weight, bias, [40], relu=False)
        _, expected, *_ = norm_in_float64(inputs, upstream, weight, bias, [40], relu=False)
        torch.testing.assert_close(moments[:2].double(), expected, rtol=1e-5, atol=0.0)

    def test_promise_3_bits_of_a_group_do_not_depend_on_other_groups(self, kernels: ModuleType) -> None:
        given, sizes = tensors(40, 5, (9, 11)), sizes_of(40, 11)
        outputs, moments, input_gradients, group_sums = norm_by(kernels, *given, sizes, relu=True)
        parts = zip(*(each.split(sizes) for each in (given[0], given[1], outputs, input_gradients)), strict=True)
        for index, (inputs, upstream, its_outputs, its_input_gradients) in enumerate(parts):
            alone = norm_by(kernels, inputs, upstream, given[2], given[3], [len(inputs)], relu=True)
            in_batch = its_outputs, moments[:, index : index + 1], its_input_gradients, group_sums[:, index : index + 1]
            assert all(torch.equal(one, other) for one, other in zip(alone, in_batch, strict=True))

    def test_half_precision_activations_are_computed_in_float32(self, kernels: ModuleType, kind: torch.dtype) -> None:
        inputs, upstream, weight, bias = tensors(9, 6, (4, 4))
        inputs, upstream = inputs.to(kind), upstream.to(kind)
        found = norm_by(kernels, inputs, upstream, weight, bias, [4, 5], relu=True)
        expected = norm_by(kernels, inputs.float(), upstream.float(), weight, bias, [4, 5], relu=True)
        for one, other in zip(found, expected, strict=True):
            # GPUs and CPUs round to bfloat16, but Triton's interpreter truncates.
            torch.testing.assert_close(one.float(), other, rtol=torch.finfo(one.dtype).eps, atol=1e-7)

    @pytest.mark.parametrize("relu", [False, True])
    def test_nan_spreads_within_its_group_and_channel_only(self, kernels: ModuleType, relu: bool) -> None:
        inputs, upstream, weight, bias = tensors(6, 2, (3, 3))
        inputs[4, 1, 0, 0] = torch.nan
        outputs, moments, input_gradients, _ = norm_by(kernels, inputs, upstream, weight, bias, [3, 3], relu)
        for each in (outputs[3:, 1], moments[:, 1, 1], input_gradients[3:, 1]):
            assert each.isnan().all()
        for each in (outputs[:3], outputs[:, 0], moments[:, 0], input_gradients[:3]):
            assert each.isfinite().all()

    @pytest.mark.parametrize("sides", [(), (5, 4)])
    def test_norm_with_relu_agrees_with_the_one_without_kernels(
        self, kernels: ModuleType, sides: tuple[int, ...], monkeypatch: pytest.MonkeyPatch
    ) -> None:
        inputs, upstream, weight, bias = tensors(11, 6, sides)

        def run() -> list[Tensor]:
            norm = GroupedBatchNorm(6, 4)
            model = torch.nn.Sequential(norm, torch.nn.ReLU(inplace=True))
            fuse_relus(model)
            with torch.no_grad():
                norm.weight.copy_(weight)
                norm.bias.copy_(bias)
            leaf = inputs.clone().requires_grad_()
            outputs = model(leaf)
            [seen] = norm.seen
            leaves = (leaf, norm.weight, norm.bias)
            gradients = torch.autograd.grad(outputs, leaves, upstream, retain_graph=True)
            slopes = torch.autograd.grad(outputs, leaves, upstream, create_graph=True)
            again = torch.autograd.grad(torch.stack([slope.square().sum() for slope in slopes]).sum(), leaves)
            return [outputs, seen.means, seen.variances, *gradients, *slopes, *again]

        monkeypatch.setattr(operators, "has_norm_kernels", lambda *_: False)
        expected = run()
        monkeypatch.setattr(operators, "has_norm_kernels", lambda *_: True)
        monkeypatch.setattr(operators, "norm_kernels", lambda _: kernels)
        for found, true in zip(run(), expected, strict=True):
            torch.testing.assert_close(found, true, rtol=1e-4, atol=1e-5 * float(true.detach().abs().max()))
