"""Triton kernels in its interpreter on CPU tensors, and their compilation for GPUs, without a GPU.

`make test-lengthy` installs Triton: PyPI's takes a gigabyte, and a torch for CUDA brings its own.
"""

from __future__ import annotations

import os
import subprocess
import sys
from collections.abc import Sequence
from importlib.util import find_spec

import pytest
import torch
from torch import Tensor

from dist_train.models import normalization
from dist_train.models.norms import GroupedBatchNorm, join_relus
from dist_train.reproducible import bits, key

pytestmark = [
    pytest.mark.lengthy,
    pytest.mark.skipif(find_spec("triton") is None, reason="needs Triton, which make test-lengthy installs"),
    pytest.mark.skipif(os.environ.get("TRITON_INTERPRET") != "1", reason="needs TRITON_INTERPRET=1 from the beginning"),
]
EPSILON = 1e-5
CASES = [
    # samples, channels, sides, group size
    (7, 5, (), 3),
    (6, 3, (5, 7), 2),
    (9, 70, (9, 9), 4),
    (40, 2, (9, 11), 17),  # parts of 1,024 rows: two in the first group, three in the last
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


def norm_by_kernels(
    inputs: Tensor, upstream: Tensor, weight: Tensor, bias: Tensor, sizes: Sequence[int], activation: str
) -> tuple[Tensor, ...]:
    """Return outputs, moments, the inputs' gradient and the groups' sums."""
    operators = torch.ops.dist_train
    outputs, moments = operators.ghost_norm(inputs, weight, bias, EPSILON, sizes[0], len(sizes), activation)
    gradients = operators.ghost_norm_backward(upstream, inputs, weight, bias, moments, sizes[0], activation)
    return outputs, moments, *gradients


def norm_in_float64(
    inputs: Tensor, upstream: Tensor, weight: Tensor, bias: Tensor, sizes: Sequence[int], activation: str
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
    whole = torch.cat(outputs).relu() if activation == "relu" else torch.cat(outputs)
    return whole.detach(), torch.stack(moments, 1), *torch.autograd.grad(whole, leaves, upstream.double())


@pytest.mark.parametrize("activation", ["none", "relu"])
@pytest.mark.parametrize("case", CASES, ids=str)
def test_norm_agrees_with_float64_up_to_rounding(
    case: tuple[int, int, tuple[int, ...], int], activation: normalization.Activation
) -> None:
    samples, channels, sides, size = case
    given, sizes = tensors(samples, channels, sides), sizes_of(samples, size)
    outputs, moments, input_gradients, group_sums = norm_by_kernels(*given, sizes, activation)
    expected = norm_in_float64(*given, sizes, activation)
    for found, true in zip((outputs, moments[:2], input_gradients, *group_sums.sum(1)), expected, strict=True):
        torch.testing.assert_close(found.double(), true, rtol=1e-5, atol=1e-5 * float(true.abs().max()) + 1e-6)


def test_variance_is_accurate_where_the_mean_is_large() -> None:
    inputs, upstream, weight, bias = tensors(40, 3, (9, 11), offset=1000.0)
    _, moments, _, _ = norm_by_kernels(inputs, upstream, weight, bias, [40], "none")
    _, expected, *_ = norm_in_float64(inputs, upstream, weight, bias, [40], "none")
    torch.testing.assert_close(moments[:2].double(), expected, rtol=1e-5, atol=0.0)


def test_promise_3_bits_of_a_group_do_not_depend_on_other_groups() -> None:
    given, sizes = tensors(40, 5, (9, 11)), sizes_of(40, 11)
    outputs, moments, input_gradients, group_sums = norm_by_kernels(*given, sizes, "relu")
    parts = zip(*(each.split(sizes) for each in (given[0], given[1], outputs, input_gradients)), strict=True)
    for index, (inputs, upstream, its_outputs, its_input_gradients) in enumerate(parts):
        alone = norm_by_kernels(inputs, upstream, given[2], given[3], [len(inputs)], "relu")
        in_batch = its_outputs, moments[:, index : index + 1], its_input_gradients, group_sums[:, index : index + 1]
        assert all(torch.equal(one, other) for one, other in zip(alone, in_batch, strict=True))


@pytest.mark.parametrize("kind", [torch.bfloat16, torch.float16])
def test_half_precision_activations_are_computed_in_float32(kind: torch.dtype) -> None:
    inputs, upstream, weight, bias = tensors(9, 6, (4, 4))
    inputs, upstream = inputs.to(kind), upstream.to(kind)
    found = norm_by_kernels(inputs, upstream, weight, bias, [4, 5], "relu")
    expected = norm_by_kernels(inputs.float(), upstream.float(), weight, bias, [4, 5], "relu")
    for one, other in zip(found, expected, strict=True):
        # A GPU rounds to bfloat16, but the interpreter truncates.
        torch.testing.assert_close(one.float(), other, rtol=torch.finfo(one.dtype).eps, atol=1e-7)


@pytest.mark.parametrize("activation", ["none", "relu"])
def test_nan_spreads_within_its_group_and_channel_only(activation: str) -> None:
    inputs, upstream, weight, bias = tensors(6, 2, (3, 3))
    inputs[4, 1, 0, 0] = torch.nan
    outputs, moments, input_gradients, _ = norm_by_kernels(inputs, upstream, weight, bias, [3, 3], activation)
    for each in (outputs[3:, 1], moments[:, 1, 1], input_gradients[3:, 1]):
        assert each.isnan().all()
    for each in (outputs[:3], outputs[:, 0], moments[:, 0], input_gradients[:3]):
        assert each.isfinite().all()


@pytest.mark.parametrize("sides", [(), (5, 4)])
def test_norm_with_relu_agrees_with_the_one_without_kernels(
    sides: tuple[int, ...], monkeypatch: pytest.MonkeyPatch
) -> None:
    inputs, upstream, weight, bias = tensors(11, 6, sides)

    def run(with_kernels: bool) -> list[Tensor]:
        norm = GroupedBatchNorm(6, 4)
        model = torch.nn.Sequential(norm, torch.nn.ReLU(inplace=True))
        if with_kernels:
            join_relus(model)
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

    expected = run(with_kernels=False)
    monkeypatch.setattr(normalization, "_kernels_support", lambda *_: True)
    for found, true in zip(run(with_kernels=True), expected, strict=True):
        torch.testing.assert_close(found, true, rtol=1e-4, atol=1e-5 * float(true.detach().abs().max()))


@pytest.mark.parametrize("stream", [0, key(1, "noise", 2), 2**63 - 1])
def test_random_bits_equal_those_of_the_cpu(stream: int, monkeypatch: pytest.MonkeyPatch) -> None:
    expected = torch.cat([part.clone() for part in bits(stream, 2 * 3001, torch.device("cpu"))])
    found = torch.empty(3001, dtype=torch.int32)
    low, high = torch.tensor([stream], dtype=torch.int64).view(torch.int32).tolist()
    torch.ops.dist_train.random_bits_(found, low, high)
    assert torch.equal(found.view(torch.int16), expected)


def test_accumulated_gradients_equal_torch_s() -> None:
    gradients = torch.randn(3, 2500, generator=torch.Generator().manual_seed(0)) * torch.tensor([[1e-9], [1.0], [1e-4]])
    total = torch.full((2500,), 7)
    largest = [
        torch.ops.dist_train.accumulate_(each, total, 2.0**48, index > 0) for index, each in enumerate(gradients)
    ]
    assert torch.equal(total, gradients.mul(2.0**48).to(torch.int64).sum(0))
    assert torch.equal(torch.stack(largest).amax(1), gradients.abs().amax(1))


@pytest.mark.filterwarnings("ignore:invalid value encountered in cast")
@pytest.mark.parametrize("bad", [torch.nan, torch.inf, -torch.inf])
def test_gradient_that_is_not_finite_is_reported_as_largest(bad: float) -> None:
    gradients = torch.ones(1500)
    gradients[1100] = bad
    largest = torch.ops.dist_train.accumulate_(gradients, torch.zeros(1500, dtype=torch.int64), 1.0, False)
    assert largest.tolist() == [1.0, torch.inf]


@pytest.mark.parametrize("kind", [torch.int32, torch.int64])
def test_gradients_accumulated_on_grids_equal_torch_s(kind: torch.dtype) -> None:
    shapes, offset = [(3, 1100), (2, 5), (1, 2300)], 48
    scales = torch.tensor([2.0**20, 2.0**24, 0.5])
    places, start = [], offset
    for index, (rows, length) in enumerate(shapes):
        places += [(start + row * length, length, index) for row in range(rows)]
        start += rows * length + 6  # padding
    total = torch.full((start - offset,), 3, dtype=kind)
    largest, expected_largest = torch.full((len(places),), 5), torch.full((len(places),), 5)
    expected = torch.zeros_like(total)
    for turn in range(2):
        gradients = torch.randn(len(total), generator=torch.Generator().manual_seed(turn)) * 9
        gradients[-2000:] = torch.arange(2000) - 1000.0  # halves, times 0.5
        sizes = torch.ops.dist_train.accumulate_on_grids_(
            gradients, total, largest, torch.tensor(places), scales, offset, turn > 0
        )
        for row, (first, length, index) in enumerate(places):
            part = slice(first - offset, first - offset + length)
            rounded = gradients[part].mul(scales[index]).round()
            expected[part] += rounded.to(kind)
            assert sizes[row] == rounded.abs().max()
            expected_largest[row] += int(rounded.abs().max())
    inside = torch.zeros(len(total), dtype=torch.bool)
    for first, length, _ in places:
        inside[first - offset : first - offset + length] = True
    assert torch.equal(total[inside], expected[inside])
    assert (total[~inside] == 3).all()
    assert torch.equal(largest, expected_largest)


@pytest.mark.filterwarnings("ignore:invalid value encountered in cast")
@pytest.mark.parametrize("bad", [torch.nan, -torch.inf])
def test_gradient_on_a_grid_that_is_not_finite_is_reported_as_largest(bad: float) -> None:
    gradients, integers = torch.ones(12), torch.zeros(12, dtype=torch.int32)
    gradients[7] = bad
    places, scales = torch.tensor([(0, 6, 0), (6, 6, 0)]), torch.ones(1)
    largest = torch.zeros(2, dtype=torch.int64)
    sizes = torch.ops.dist_train.accumulate_on_grids_(gradients, integers, largest, places, scales, 0, False)
    assert sizes.tolist() == [1.0, torch.inf]


COMPILE = """
import triton
from triton.backends.compiler import GPUTarget
from triton.compiler import ASTSource
from dist_train.kernels import flat, norms

values = {"width": 64, "block": 1024, "rectify": True, "begun": True}
kernels = [norms._part_moments, norms._write_normalized, norms._part_sums, norms._write_gradients]
known = dict.fromkeys(values, "constexpr") | dict.fromkeys(("epsilon", "scale"), "fp32")
known |= dict.fromkeys(("rows", "total", "parts", "channels", "count", "low", "high", "offset"), "i32")
for capability in (80, 90):
    def compile(kernel, types):
        signature = {name: types.get(name, "*fp32") for name in kernel.arg_names}
        source = ASTSource(kernel, signature, {name: values[name] for name in signature if name in values})
        target = GPUTarget("cuda", capability, 32)
        assert triton.compile(source, target=target, options={"enable_fp_fusion": False}).asm["cubin"]

    compile(flat._random_bits, {**known, "out": "*i32"})
    compile(flat._accumulate, {**known, "total": "*i64"})
    for kind in ("*i32", "*i64"):
        compile(flat._accumulate_on_grids, {**known, "places": "*i64", "largest": "*i64", "total": kind})
    for kind in ("*fp32", "*bf16", "*fp16"):
        of_activations = dict.fromkeys(("inputs", "outputs", "upstream", "of_inputs"), kind)
        for kernel in kernels:
            compile(kernel, {**known, **of_activations})
"""


def test_kernels_compile_for_gpus() -> None:
    environment = {key: value for key, value in os.environ.items() if key != "TRITON_INTERPRET"}
    ended = subprocess.run([sys.executable, "-c", COMPILE], env=environment, capture_output=True, text=True)
    assert ended.returncode == 0, ended.stderr
