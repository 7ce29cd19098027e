"""Losses and gradients with default settings, compared with float64.

ReLU and max pooling make the loss piecewise smooth, and rounding may cross an edge, where the gradient jumps. So the
reference, in float64, takes the branches that the network took, and all differences are rounding errors.
"""

from __future__ import annotations

import copy
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional

from dist_train.config import Config
from dist_train.data.images import BatchRequest
from dist_train.data.plan import BatchPlan, batch_indices, epoch_order
from dist_train.models import build_model
from dist_train.models.norm_arithmetic import normalize
from dist_train.models.norms import GroupedBatchNorm
from dist_train.training.step import GlobalBatch
from dist_train.training.trainer import Trainer
from tests.archives import idx_bytes
from tests.unit.simulated_ranks import SimulatedRanks, results
from tests.unit.small_trainers import build_trainer, small_config

pytestmark = pytest.mark.usefixtures("one_thread")


def images_on_black(count: int, seed: int = 0) -> Tensor:
    """Return [count, 1, 28, 28] like Fashion-MNIST's: bright patches on a constant background."""
    source = torch.Generator().manual_seed(seed)
    images = torch.rand(count, 1, 28, 28, generator=source)
    inside = torch.zeros(count, 1, 28, 28)
    for image, (top, left) in zip(inside, torch.randint(2, 12, (count, 2), generator=source).tolist(), strict=True):
        image[:, top : top + 14, left : left + 10] = 1.0
    return images * inside


class ReferenceNorm(nn.Module):
    """Torch's batch norm of each group, on contiguous tensors, which is accurate in float64."""

    def __init__(self, norm: GroupedBatchNorm) -> None:
        super().__init__()
        self.norm = norm

    def forward(self, inputs: Tensor) -> Tensor:
        size = self.norm.group_size or len(inputs)
        cuts = [group * size for group in range(1, max(1, len(inputs) // size))]
        weight, bias = self.norm.weight, self.norm.bias
        parts = torch.tensor_split(inputs.contiguous(), cuts)
        return torch.cat([functional.batch_norm(part, None, None, weight, bias, training=True) for part in parts])


def replace_norms(module: nn.Module) -> None:
    for name, child in module.named_children():
        if isinstance(child, GroupedBatchNorm):
            setattr(module, name, ReferenceNorm(child))
        elif not isinstance(child, ReferenceNorm):
            replace_norms(child)


def branches_of(model: nn.Module, inputs: Tensor, precision: torch.dtype) -> list[Tensor]:
    """Return which inputs each ReLU and max pooling let pass, in the order of the forward pass."""
    branches: list[Tensor] = []

    def record_relu(module: nn.Module, _: Any, output: Tensor) -> None:
        branches.append(output.detach() > 0)

    def record_pool(module: nn.MaxPool2d, arguments: tuple[Tensor], _: Any) -> None:
        options = {"kernel_size": module.kernel_size, "stride": module.stride, "padding": module.padding}
        inputs = arguments[0].detach().contiguous()
        branches.append(functional.max_pool2d(inputs, ceil_mode=module.ceil_mode, return_indices=True, **options)[1])

    hooks = [module.register_forward_hook(record_relu) for module in model.modules() if isinstance(module, nn.ReLU)]
    hooks += [
        module.register_forward_hook(record_pool) for module in model.modules() if isinstance(module, nn.MaxPool2d)
    ]
    with torch.no_grad(), torch.autocast("cpu", dtype=precision, enabled=precision != torch.float32):
        model(inputs)
    for hook in hooks:
        hook.remove()
    return branches


def force_branches(model: nn.Module, branches: list[Tensor]) -> None:
    """Let the ReLUs and max poolings of `model` take `branches`, whatever their inputs."""
    remaining = iter(branches)

    def relu(_: nn.Module, inputs: tuple[Tensor], __: Tensor) -> Tensor:
        return inputs[0] * next(remaining)

    def pool(_: nn.Module, inputs: tuple[Tensor], __: Tensor) -> Tensor:
        indices = next(remaining)
        return inputs[0].flatten(2).gather(2, indices.flatten(2)).view(indices.shape)

    for module in model.modules():
        if isinstance(module, nn.ReLU):
            module.inplace = False
            module.register_forward_hook(relu)
        elif isinstance(module, nn.MaxPool2d):
            module.register_forward_hook(pool)


def loss_and_gradient(
    model: nn.Module, inputs: Tensor, labels: Tensor, samples: int, precision: torch.dtype = torch.float32
) -> tuple[float, Tensor]:
    """Return the sum of the losses over `samples`, and its gradient, float64 [weights]."""
    model.zero_grad()
    with torch.autocast("cpu", dtype=precision, enabled=precision == torch.bfloat16):
        logits = model(inputs)
    logits = logits if logits.dtype == torch.float64 else logits.float()
    loss = functional.cross_entropy(logits, labels, reduction="sum") / samples
    torch.autograd.backward(loss)
    return float(loss.detach()), torch.cat(
        [p.grad.double().flatten() for p in model.parameters() if p.grad is not None]
    )


def loss_and_gradient_in_float64(
    model: nn.Module, inputs: Tensor, labels: Tensor, samples: int, precision: torch.dtype = torch.float32
) -> tuple[float, Tensor]:
    """Return `loss_and_gradient` in float64, with the branches that `model` takes."""
    branches = branches_of(copy.deepcopy(model), inputs, precision)
    reference = copy.deepcopy(model).double()
    replace_norms(reference)
    force_branches(reference, branches)
    return loss_and_gradient(reference, inputs.double().contiguous(), labels, samples)


def distance(values: Tensor, expected: Tensor) -> float:
    return float((values.double() - expected).norm() / expected.norm())


CASES = [
    ("vgg9", "ghost", 120, 120),
    ("vgg9", "ghost", 32, 128),
    ("vgg9", "batch", 32, 3),
    ("vgg9", "sync", 32, 16),
    ("vgg9", "group", 32, 16),
    ("vgg9", "none", 32, 16),
    ("resnet18", "ghost", 120, 120),
    ("resnet18", "ghost", 32, 128),
    ("resnet18", "batch", 32, 2),
    ("resnet18", "sync", 32, 16),
    ("resnet18", "group", 32, 16),
    ("resnet18", "none", 32, 16),
]


def step_config(folder: Path, name: str, norm: str, ghost_size: int, micro_size: int, batches: int) -> Config:
    """Return default settings of a run with one global batch of `batches` micro-batches."""
    count = batches * micro_size
    pixels = (images_on_black(count) * 255).round().to(torch.uint8)[:, 0].numpy()
    labels = (np.arange(count) % 10).astype(np.uint8)
    folder.mkdir()
    for stem in ("train", "t10k"):
        (folder / f"{stem}-images-idx3-ubyte").write_bytes(idx_bytes(pixels))
        (folder / f"{stem}-labels-idx1-ubyte").write_bytes(idx_bytes(labels))
    return small_config(
        data={"name": "fashion-mnist", "root": str(folder)},
        model={"name": name, "width": 0.125, "norm": norm, "ghost_size": ghost_size, "norm_samples": 30},
        batch={"global_size": count, "micro_size": micro_size},
        noise={"method": "none"},
    )


@pytest.mark.parametrize(("name", "norm", "ghost_size", "micro_size"), CASES)
@pytest.mark.parametrize("ranks", [1, 2])
def test_gradient_of_a_step_is_accurate_to_a_ten_thousandth(
    tmp_path: Path, name: str, norm: str, ghost_size: int, micro_size: int, ranks: int
) -> None:
    config = step_config(tmp_path / "data", name, norm, ghost_size, micro_size, batches=ranks)
    assert config.precision.compute == "float32"
    assert config.precision.channels_last

    def step(comm: SimulatedRanks) -> tuple[float, Tensor, Trainer]:
        trainer = build_trainer(config, tmp_path / "run", comm)
        order = epoch_order(len(trainer.splits.train), config.run.seed, 0)
        share = trainer.plan.slices if norm == "sync" else trainer.plan.share
        indices = batch_indices(order, 0, config.batch.global_size)
        batch = GlobalBatch(0, 0, indices, share(comm.rank, comm.size))
        update = trainer.training_step(batch, 0.0, lambda: False)
        gradients = [p.grad.double().flatten() for p in trainer.network.parameters() if p.grad is not None]
        return update.total.loss, torch.cat(gradients), trainer

    ended = results(ranks, step)
    *_, trainer = ended[0]
    expected_loss, expected = 0.0, torch.zeros(())
    order = epoch_order(len(trainer.splits.train), config.run.seed, 0)
    for part in BatchPlan(config.batch.global_size, micro_size).micro_batches:
        inputs, labels = trainer.splits.train.read(BatchRequest(order[part.start : part.stop], 0))
        loss, gradient = loss_and_gradient_in_float64(build_model(config), inputs, labels, config.batch.global_size)
        expected_loss, expected = expected_loss + loss, expected + gradient
    for loss, gradient, _ in ended:
        assert loss == pytest.approx(expected_loss, rel=3e-6)
        assert distance(gradient, expected) < 1e-4


@pytest.mark.parametrize(("name", "norm", "ghost_size", "samples"), [CASES[1], CASES[4], CASES[7], CASES[10]])
def test_bfloat16_is_as_accurate_as_torch_s(name: str, norm: str, ghost_size: int, samples: int) -> None:
    settings = {"name": name, "width": 0.125, "norm": norm, "ghost_size": ghost_size}
    model = build_model(small_config(data={"synthetic_shape": [1, 28, 28]}, model=settings))
    inputs, labels = images_on_black(samples), torch.arange(samples) % 10
    plain = copy.deepcopy(model)
    replace_norms(plain)

    def error(network: nn.Module, images: Tensor) -> float:
        _, expected = loss_and_gradient_in_float64(network, images, labels, samples, torch.bfloat16)
        return distance(loss_and_gradient(network, images, labels, samples, torch.bfloat16)[1], expected)

    ours = error(model, inputs.contiguous(memory_format=torch.channels_last))
    assert ours < 1.25 * error(plain, inputs)
    assert ours < 0.1


@pytest.mark.parametrize("samples", [2, 7, 128, 300])
@pytest.mark.parametrize("shape", [(6,), (16, 28, 28), (3, 1, 5)])
def test_norm_is_accurate_also_where_most_values_are_equal(samples: int, shape: tuple[int, ...]) -> None:
    source = torch.Generator().manual_seed(1)
    inputs = torch.randn(samples, *shape, generator=source)
    upstream = torch.ones_like(inputs)
    if samples > 2:
        is_equal = torch.rand(samples, 1, *shape[1:], generator=source) < 0.5
        inputs, upstream = torch.where(is_equal, 0.3, inputs), torch.where(is_equal, 0.0, upstream)
    inputs, upstream = inputs + 1.0, upstream + 0.1 * torch.randn(samples, *shape, generator=source)
    weight, bias = torch.randn(shape[0], generator=source), torch.randn(shape[0], generator=source)

    def run(dtype: torch.dtype, layout: torch.memory_format) -> list[Tensor]:
        images = inputs.to(dtype, copy=True).contiguous(memory_format=layout).requires_grad_()
        leaves = [images, *(value.to(dtype, copy=True).requires_grad_() for value in (weight, bias))]
        if dtype == torch.float64:
            outputs = functional.batch_norm(images, None, None, leaves[1], leaves[2], training=True)
        else:
            outputs, means, variances = normalize(images, leaves[1], leaves[2], 1e-5, (samples,))
            exact = inputs.double().transpose(0, 1).flatten(1)
            assert distance(means[0], exact.mean(1)) < 1e-6
            assert distance(variances[0], exact.var(1)) < 2e-6
        return [outputs.detach(), *torch.autograd.grad(outputs, leaves, upstream.to(dtype))]

    expected = run(torch.float64, torch.contiguous_format)
    layouts = [torch.contiguous_format, *([torch.channels_last] if len(shape) == 3 else [])]
    for layout in layouts:
        outputs, input_gradient, weight_gradient, bias_gradient = run(torch.float32, layout)
        assert distance(outputs, expected[0]) < 2e-6
        # With two samples the gradient is a small difference of large numbers.
        assert distance(input_gradient, expected[1]) < (1e-2 if samples == 2 and len(shape) == 1 else 1e-5)
        assert distance(weight_gradient, expected[2]) < 1e-4
        assert distance(bias_gradient, expected[3]) < 1e-5


@pytest.mark.parametrize("layout", [torch.contiguous_format, torch.channels_last])
@pytest.mark.parametrize("shape", [(6, 3, 4, 4), (6, 3)])
def test_second_derivatives_of_a_norm_are_accurate(shape: tuple[int, ...], layout: torch.memory_format) -> None:
    source = torch.Generator().manual_seed(0)
    values = [torch.randn(size, generator=source) for size in (shape, (3,), (3,))]
    directions = [torch.randn(size, generator=source) for size in (shape, (3,), (3,))]

    def second(dtype: torch.dtype, layout: torch.memory_format) -> tuple[Tensor, ...]:
        images = values[0].to(dtype).contiguous(memory_format=layout if len(shape) == 4 else torch.contiguous_format)
        leaves = [value.to(dtype, copy=True).requires_grad_() for value in (images, *values[1:])]
        if dtype == torch.float64:
            weight, bias = leaves[1:]
            parts = leaves[0].split(3)
            outputs = torch.cat([functional.batch_norm(part, None, None, weight, bias, True) for part in parts])
        else:
            outputs, _, _ = normalize(leaves[0], leaves[1], leaves[2], 1e-5, (3, 3))
        gradients = torch.autograd.grad(outputs.pow(3).sum(), leaves, create_graph=True)
        return torch.autograd.grad(gradients, leaves, [direction.to(dtype) for direction in directions])

    for found, expected in zip(
        second(torch.float32, layout), second(torch.float64, torch.contiguous_format), strict=True
    ):
        assert distance(found, expected) < 1e-5


@pytest.mark.parametrize("frozen", [0, 1, 2])
def test_second_derivatives_of_a_norm_with_frozen_inputs_or_parameters(frozen: int) -> None:
    source = torch.Generator().manual_seed(0)
    # A transposed matrix, of which the kernels take a copy.
    leaves = [torch.randn(size, generator=source) for size in ((3, 6), (3,), (3,))]
    trained = [leaf.requires_grad_() for index, leaf in enumerate(leaves) if index != frozen]

    def second(outputs: Tensor) -> tuple[Tensor, ...]:
        gradients = torch.autograd.grad(outputs.pow(3).sum(), trained, create_graph=True)
        return torch.autograd.grad(torch.stack([gradient.pow(2).sum() for gradient in gradients]).sum(), trained)

    images, weight, bias = leaves
    ours = second(normalize(images.T, weight, bias, 1e-5, (3, 3))[0])
    parts = [functional.batch_norm(part, None, None, weight, bias, True) for part in images.T.split(3)]
    for found, expected in zip(ours, second(torch.cat(parts)), strict=True):
        assert distance(found, expected) < 1e-4


@pytest.mark.parametrize("precision", [torch.bfloat16, torch.float16])
@pytest.mark.parametrize("samples", [2, 120, 300])
def test_moments_of_half_precision_images_have_float32_accuracy(samples: int, precision: torch.dtype) -> None:
    images = images_on_black(samples).expand(-1, 3, -1, -1).to(precision).contiguous(memory_format=torch.channels_last)
    _, means, variances = normalize(images, torch.ones(3), torch.zeros(3), 1e-5, (samples,))
    exact = images.double().transpose(0, 1).flatten(1)
    assert distance(means[0], exact.mean(1)) < 1e-6
    assert distance(variances[0], exact.var(1)) < 2e-6
