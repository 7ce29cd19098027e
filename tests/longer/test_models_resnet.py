"""Residual networks: bit-identical to torchvision's on large images, adapted to small ones, of any width."""

from __future__ import annotations

import subprocess
import sys
from typing import Any

import pytest
import torch
from torch import nn

from dist_train.config import parse_config
from dist_train.models import build_model


def build(name: str, shape: tuple[int, int, int] = (3, 32, 32), classes: int = 10, **model: Any) -> nn.Module:
    data = {"name": "synthetic", "synthetic_shape": list(shape), "synthetic_classes": classes}
    return build_model(parse_config({"data": data, "model": {"name": name, **model}}, source="test"))


@pytest.mark.parametrize(("name", "count"), [("resnet18", 11_173_962), ("resnet50", 23_520_842)])
def test_number_of_parameters_for_cifar(name: str, count: int) -> None:
    assert sum(parameter.numel() for parameter in build(name).parameters()) == count


@pytest.mark.parametrize("name", ["resnet18", "resnet50"])
def test_network_for_large_images_equals_torchvision_s(name: str) -> None:
    import torchvision

    reference: nn.Module = getattr(torchvision.models, name)(num_classes=7)
    state = {key: value for key, value in reference.state_dict().items() if "num_batches" not in key}
    model = build(name, (3, 72, 72), 7, norm="batch")
    assert list(model.state_dict()) == list(state)
    model.load_state_dict(state)
    images = torch.randn(2, 3, 72, 72, generator=torch.Generator().manual_seed(0))
    with torch.no_grad():
        assert torch.equal(model.eval()(images), reference.eval()(images))


@pytest.mark.parametrize(("size", "sides"), [(28, 28), (32, 32), (64, 64), (65, 17)])
def test_small_images_keep_their_size_through_the_stem(size: int, sides: int) -> None:
    model = build("resnet18", (1, size, size), width=0.0625)
    seen: list[int] = []
    model.get_submodule("layer1").register_forward_hook(lambda *passed: seen.append(passed[-1].shape[-1]))
    model(torch.zeros(2, 1, size, size))
    assert seen == [sides]


@pytest.mark.parametrize("name", ["resnet18", "resnet50"])
@pytest.mark.parametrize("width", [0.001, 0.25, 0.5])
def test_width_scales_all_channels(name: str, width: float) -> None:
    model = build(name, (1, 12, 12), width=width)
    expansion = {"resnet18": 1, "resnet50": 4}[name]
    first, last = model.get_submodule("conv1"), model.get_submodule("fc")
    assert isinstance(first, nn.Conv2d)
    assert isinstance(last, nn.Linear)
    assert first.out_channels == max(1, round(64 * width))
    assert last.in_features == expansion * max(1, round(512 * width))


def test_initialization_uses_no_global_generator() -> None:
    before = torch.get_rng_state()
    first = build("resnet18", width=0.0625).state_dict()
    assert torch.equal(torch.get_rng_state(), before)
    torch.manual_seed(7)
    again = build("resnet18", width=0.0625).state_dict()
    assert all(torch.equal(first[name], again[name]) for name in first)


def test_strided_shortcuts_of_narrow_networks_are_correct() -> None:
    """Trains in its own process, since torch 2.13's own convolution would corrupt the heap."""
    model = build("resnet18", (3, 16, 16), width=0.03125, norm="none")
    shortcut = model.get_submodule("layer2.0.downsample.0")
    images = torch.randn(4, 2, 8, 8, generator=torch.Generator().manual_seed(0))
    reference = nn.functional.conv2d(images, shortcut.get_parameter("weight"), None, 2)
    torch.testing.assert_close(shortcut(images), reference)
    script = """
import torch
from dist_train.config import parse_config
from dist_train.models import build_model
sections = {"data": {"name": "synthetic"}, "model": {"name": "resnet18", "width": 0.03125, "norm": "none"}}
model = build_model(parse_config(sections, source="test"))
for _ in range(20):
    images = torch.randn(8, *model[0].weight.shape[1:2], 8, 8).to(memory_format=torch.channels_last)
    model(images).square().sum().backward()
"""
    ended = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True)
    assert ended.returncode == 0, ended.stderr
