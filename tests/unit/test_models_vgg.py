"""VGG as it was published, at any width, for both sizes of images; its initial weights."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import nn

from dist_train.config import Config, parse_config
from dist_train.models import build_model
from dist_train.models.building import initialize
from dist_train.models.norms import GroupedBatchNorm


def config(data: str = "cifar10", seed: int = 0, **model: Any) -> Config:
    return parse_config({"data": {"name": data}, "model": model, "run": {"seed": seed}}, source="test")


def small(seed: int = 0) -> nn.Module:
    return build_model(config("fashion-mnist", seed, width=0.0625))


@pytest.mark.parametrize(
    ("data", "width", "norm", "count"),
    [
        ("cifar10", 1.0, "ghost", 2_789_706),
        ("cifar10", 1.0, "batch", 2_789_706),
        # a weight and a bias for each of 1,408 normalized channels
        ("cifar10", 1.0, "none", 2_789_706 - 2 * (2 * 64 + 2 * 128 + 4 * 256)),
        ("cifar100", 1.0, "ghost", 2_789_706 + 90 * 257),
        ("fashion-mnist", 1.0, "ghost", 2_789_706 - 2 * 9 * 64),
        ("cifar10", 0.25, "ghost", 175_962),
    ],
)
def test_it_has_the_published_number_of_parameters(data: str, width: float, norm: str, count: int) -> None:
    model = build_model(config(data, width=width, norm=norm))
    assert sum(parameter.numel() for parameter in model.parameters()) == count


def test_odd_sizes_are_pooled_up_and_narrow_widths_keep_a_channel() -> None:
    settings = {
        "data": {"name": "synthetic", "synthetic_shape": [2, 9, 13], "synthetic_classes": 3},
        "model": {"width": 0.001},
    }
    model = build_model(parse_config(settings, source="test"))
    assert model(torch.zeros(2, 2, 9, 13)).shape == (2, 3)


def test_its_layers_follow_the_paper() -> None:
    model = build_model(config(width=1.0))
    layers = [
        (type(layer).__name__, getattr(layer, "out_channels", getattr(layer, "out_features", None)))
        for layer in model.children()
    ]
    norm_and_relu = [("GroupedBatchNorm", None), ("ReLU", None)]
    expected: list[tuple[str, int | None]] = []
    for outputs in (64, 64, None, 128, 128, None, 256, 256, 256, None):
        expected += [("MaxPool2d", None)] if outputs is None else [("Conv2d", outputs), *norm_and_relu]
    expected += [("Flatten", None), ("Linear", 256), *norm_and_relu, ("Linear", 10)]
    assert layers == expected


@pytest.mark.parametrize(("name", "letter", "count"), [("vgg16", "D", 14_728_266), ("vgg19", "E", 20_040_522)])
def test_the_deep_ones_have_torchvision_s_body_and_one_linear_layer(name: str, letter: str, count: int) -> None:
    from torchvision.models import vgg

    model = build_model(config(name=name, norm="batch"))
    assert sum(parameter.numel() for parameter in model.parameters()) == count
    *body, flatten, classifier = model.children()
    reference = list(vgg.make_layers(vgg.cfgs[letter], batch_norm=True))
    assert len(body) == len(reference)
    for layer, expected in zip(body, reference, strict=True):
        assert [value.shape for value in layer.parameters()] == [value.shape for value in expected.parameters()]
        assert isinstance(layer, GroupedBatchNorm if isinstance(expected, nn.BatchNorm2d) else type(expected))
    assert isinstance(flatten, nn.Flatten)
    assert isinstance(classifier, nn.Linear)
    assert classifier.in_features == 512


class TestInitialization:
    def test_promise_2_it_is_a_function_of_the_seed_alone(self) -> None:
        torch.manual_seed(1)
        first = small().state_dict()
        torch.manual_seed(2)
        again, other = small().state_dict(), small(seed=1).state_dict()
        assert all(torch.equal(first[name], again[name]) for name in first)
        drawn = [name for name in first if first[name].dim() > 1]
        assert len(drawn) == 9
        assert not any(torch.equal(first[name], other[name]) for name in drawn)

    def test_each_parameter_has_a_stream_of_its_own(self) -> None:
        twins = nn.Linear(5, 5), nn.Linear(5, 5)
        initialize(nn.ModuleList(twins), 0)
        assert not torch.equal(twins[0].weight, twins[1].weight)

    def test_drawing_the_initial_weights_moves_no_global_generator(self) -> None:
        before = torch.get_rng_state()
        model = small()
        initialize(model, 3)
        assert torch.equal(torch.get_rng_state(), before)

    def test_weights_are_he_s_biases_zero_norms_the_identity(self) -> None:
        model = build_model(config(width=0.5))
        for name, parameter in model.named_parameters():
            if "norm" in name:
                assert torch.equal(parameter, torch.full_like(parameter, float(name.endswith("weight"))))
            elif name.endswith("bias"):
                assert not parameter.any(), name
            elif parameter.numel() > 10_000:
                deviation = (2.0 / parameter[0].numel()) ** 0.5
                assert parameter.std().item() == pytest.approx(deviation, rel=0.03), name
                assert abs(parameter.mean().item()) < 0.05 * deviation, name
