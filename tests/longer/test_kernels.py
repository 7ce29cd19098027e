"""Triton kernels in its interpreter on CPU tensors, and their compilation for GPUs, without a GPU.

`make test-lengthy` installs Triton: PyPI's takes a gigabyte, and a torch for CUDA brings its own.
"""

from __future__ import annotations

import importlib
import os
import subprocess
import sys
from importlib.util import find_spec
from types import ModuleType
from unittest.mock import MagicMock

import pytest
import torch

from dist_train.reproducible import bits, key
from tests.unit.norm_kernels import NormKernels

pytestmark = [
    pytest.mark.lengthy,
    pytest.mark.skipif(find_spec("triton") is None, reason="needs Triton, which make test-lengthy installs"),
    pytest.mark.skipif(os.environ.get("TRITON_INTERPRET") != "1", reason="needs TRITON_INTERPRET=1 from the beginning"),
]


class TestNorms(NormKernels):
    @pytest.fixture
    def kernels(self) -> ModuleType:
        return importlib.import_module("dist_train.kernels.norms")

    @pytest.fixture(params=[torch.bfloat16, torch.float16], ids=str)
    def kind(self, request: pytest.FixtureRequest) -> torch.dtype:
        kind: torch.dtype = request.param
        return kind


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


def test_every_launch_says_that_multiplications_and_additions_are_not_fused(monkeypatch: pytest.MonkeyPatch) -> None:
    from dist_train.kernels import flat, norms  # which need Triton

    kernels = [(flat, name) for name in ("_random_bits", "_accumulate", "_accumulate_on_grids")]
    kernels += [(norms, name) for name in ("_part_moments", "_write_normalized", "_part_sums", "_write_gradients")]
    launches = {name: MagicMock() for _, name in kernels}
    for module, name in kernels:
        monkeypatch.setattr(module, name, launches[name])
    integers, matrix, ones = torch.zeros(4, dtype=torch.int64), torch.ones(4, 2), torch.ones(2)
    flat.random_bits(integers.int(), 1, 2)
    flat.accumulate(matrix.flatten(), integers, 1.0, begun=True)
    flat.accumulate_on_grids(matrix.flatten(), integers, integers, integers.view(-1, 1), ones, 0, begun=True)
    _, moments = norms.normalize(matrix, ones, ones, 1e-5, 4, 1, rectify=False)
    norms.gradients(matrix, matrix, ones, ones, moments, 4, rectify=False)
    for launch in launches.values():
        assert launch.__getitem__.return_value.call_args.kwargs["enable_fp_fusion"] is False


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
        of_activations = dict.fromkeys(("inputs", "outputs", "upstream", "grad_inputs"), kind)
        for kernel in kernels:
            compile(kernel, {**known, **of_activations})
"""


def test_kernels_compile_for_gpus() -> None:
    environment = {key: value for key, value in os.environ.items() if key != "TRITON_INTERPRET"}
    command = [sys.executable, "-W", "error", "-c", COMPILE]
    ended = subprocess.run(command, env=environment, capture_output=True, text=True)
    assert ended.returncode == 0, ended.stderr
