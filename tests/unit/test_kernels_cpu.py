"""The compiled kernels for norms on CPUs."""

from __future__ import annotations

import importlib.util
import shutil
import subprocess
import sysconfig
from pathlib import Path
from types import ModuleType

import pytest
import torch

from dist_train.kernels import operators
from dist_train.models.norm_arithmetic import normalize
from dist_train.models.norms import GroupedBatchNorm
from tests.unit.norm_kernels import EPSILON, NormKernels, norm_by, norm_in_float64, sizes_of, tensors

pytest.importorskip("dist_train.kernels._cpu", reason="needs the compiled kernels, which make setup builds")
cpu = importlib.import_module("dist_train.kernels.cpu")

ROOT = Path(__file__).parents[2]
CASE = (40, 70, (9, 11))


class TestNorms(NormKernels):
    @pytest.fixture
    def kernels(self) -> ModuleType:
        module: ModuleType = cpu
        return module

    @pytest.fixture
    def kind(self) -> torch.dtype:
        return torch.bfloat16


@pytest.mark.parametrize("kind", [torch.float32, torch.bfloat16], ids=str)
def test_bits_do_not_depend_on_the_number_of_threads(kind: torch.dtype, monkeypatch: pytest.MonkeyPatch) -> None:
    inputs, upstream, weight, bias = tensors(*CASE)
    given = inputs.to(kind), upstream.to(kind), weight, bias
    expected = norm_by(cpu, *given, sizes_of(40, 17), relu=True)
    monkeypatch.setattr(cpu, "_threads", lambda _: 3)
    for found, alone in zip(norm_by(cpu, *given, sizes_of(40, 17), relu=True), expected, strict=True):
        assert torch.equal(found, alone)


def test_bits_do_not_depend_on_the_width_of_vectors(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    compiler = shutil.which("cc") or pytest.skip("needs a C compiler")
    library, source = tmp_path / "_cpu.so", ROOT / "dist_train/kernels/_cpu.c"
    options = ("-O1", "-fopenmp", "-ffp-contract=off", "-fPIC", "-shared", f"-I{sysconfig.get_paths()['include']}")
    subprocess.run([compiler, *options, "-DVECTORIZED=", "-o", library, source], check=True)
    spec = importlib.util.spec_from_file_location("_cpu", library)
    assert spec is not None
    assert spec.loader is not None
    scalar = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(scalar)
    for kind in (torch.float32, torch.bfloat16):
        inputs, upstream, weight, bias = tensors(*CASE)
        given = inputs.to(kind), upstream.to(kind), weight, bias
        expected = norm_by(cpu, *given, [40], relu=True)
        with monkeypatch.context() as patch:
            patch.setattr(cpu, "_cpu", scalar)
            for found, vectorized in zip(norm_by(cpu, *given, [40], relu=True), expected, strict=True):
                assert torch.equal(found, vectorized)


def test_many_equal_values_do_not_lose_digits() -> None:
    inputs, upstream, weight, bias = tensors(120, 4, (28, 28))
    inputs[:, :, :, 14:] = 0.3  # the black background of Fashion-MNIST: torch's error is 1e-4 and more
    found = norm_by(cpu, inputs, upstream, weight, bias, [120], relu=False)
    expected = norm_in_float64(inputs, upstream, weight, bias, [120], relu=False)
    outputs, moments, grad_inputs, grad_groups = found
    for result, true in zip((outputs, moments[:2], grad_inputs, *grad_groups[:, 0]), expected, strict=True):
        assert float((result.double() - true).abs().max() / true.abs().max()) < 5e-7


@pytest.mark.parametrize("sides", [(), (1, 1), (3, 2)], ids=str)
def test_without_kernels_torch_computes_the_same_up_to_rounding(
    sides: tuple[int, ...], monkeypatch: pytest.MonkeyPatch
) -> None:
    inputs, upstream, weight, bias = tensors(205, 6, sides)
    sizes = sizes_of(205, 100)
    expected = norm_in_float64(inputs, upstream, weight, bias, sizes, relu=True)
    monkeypatch.setattr(operators, "has_cpu_kernels", lambda: False)
    norm = GroupedBatchNorm(6, 100)
    norm.epsilon, norm.has_relu = EPSILON, True
    with torch.no_grad():
        norm.weight.copy_(weight)
        norm.bias.copy_(bias)
    leaf = inputs.clone().requires_grad_()
    outputs = norm(leaf)
    [seen] = norm.seen
    gradients = torch.autograd.grad(outputs, (leaf, norm.weight, norm.bias), upstream)
    for found, true in zip((outputs, torch.stack([seen.means, seen.variances]), *gradients), expected, strict=True):
        torch.testing.assert_close(found.double(), true, rtol=1e-5, atol=1e-5 * float(true.abs().max()) + 1e-6)


@pytest.mark.parametrize("with_kernels", [True, False])
def test_single_value_has_variance_0(with_kernels: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    inputs, _, weight, bias = tensors(3, 6, ())
    monkeypatch.setattr(operators, "has_cpu_kernels", lambda: with_kernels)
    outputs, means, variances = normalize(inputs, weight, bias, EPSILON, [1, 1, 1])
    torch.testing.assert_close(outputs, bias.expand(3, -1), rtol=0.0, atol=1e-3)
    assert torch.equal(means, inputs)
    assert not variances.any()


def test_groups_that_do_not_fit_the_rows_are_refused() -> None:
    inputs, _, weight, bias = tensors(4, 3, ())
    with pytest.raises(ValueError, match="a group has"):
        cpu.normalize(inputs, weight, bias, EPSILON, 3, 2, False)


@pytest.mark.parametrize("channels", [2, 4])
def test_another_number_of_channels_is_refused(channels: int) -> None:
    inputs, upstream, weight, bias = tensors(4, 3, ())
    other_weight, other_bias = torch.ones(2, channels)
    operators = torch.ops.dist_train
    with pytest.raises(ValueError, match="channels"):
        operators.ghost_norm(inputs, other_weight, other_bias, EPSILON, 4, 1, False)
    _, moments = operators.ghost_norm(inputs, weight, bias, EPSILON, 4, 1, False)
    for given in (
        (upstream, inputs, other_weight, other_bias, moments),
        (upstream, inputs, weight, bias, torch.ones(3, 1, channels)),
        (torch.ones(4, channels), inputs, weight, bias, moments),
    ):
        with pytest.raises(ValueError, match=r"channels|shape"):
            operators.ghost_norm_backward(*given, 4, False)
