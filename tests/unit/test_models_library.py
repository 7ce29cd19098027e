"""Models of torchvision and timm, with our norms."""

from __future__ import annotations

import pytest
import torch
from torch import nn

from dist_train.config import parse_config
from dist_train.models import build_model
from dist_train.models.norms import norm_modules
from dist_train.outcome import UsageError
from tests.raising import raises, raises_problems

IMAGES = {"name": "synthetic", "synthetic_shape": [3, 32, 32], "synthetic_classes": 5}


def built(name: str, data: object = IMAGES, **model: object) -> nn.Module:
    config = parse_config({"data": data, "model": {"name": name, "ghost_size": 4, **model}}, source="test")
    return build_model(config)


@pytest.mark.parametrize("name", ["torchvision:resnet18", "timm:resnet18"])
def test_a_model_of_a_library_has_the_runs_norms_and_classes(name: str) -> None:
    model = built(name)
    assert len(list(norm_modules(model))) == 20
    assert not any(isinstance(module, nn.BatchNorm2d) for module in model.modules())
    images = torch.rand(8, 3, 32, 32, generator=torch.Generator().manual_seed(0))
    assert model(images).shape == (8, 5)
    again = built(name).state_dict()
    assert all(torch.equal(tensor, again[key]) for key, tensor in model.state_dict().items())


def test_timm_takes_any_number_of_channels() -> None:
    one = {**IMAGES, "synthetic_shape": [1, 32, 32]}
    assert built("timm:resnet18", one)(torch.zeros(4, 1, 32, 32)).shape == (4, 5)
    with raises(UsageError, code="library-model"):
        built("torchvision:resnet18", one)


def test_what_would_draw_at_random_is_refused() -> None:
    with raises(UsageError, code="library-model"):
        built("torchvision:vgg11")
    with raises(UsageError, code="library-model"):
        built("torchvision:convnext_tiny")
    built("torchvision:vgg11", options={"dropout": 0.0})


@pytest.mark.parametrize("name", ["torchvision:resnet1", "timm:resnet1"])
def test_an_unknown_model_is_refused_before_the_run(name: str) -> None:
    with raises_problems(("model.name", "plugin-missing")):
        built(name)


@pytest.mark.parametrize(
    ("name", "options"), [("torchvision:resnet18", {"weights": "DEFAULT"}), ("timm:resnet18", {"pretrained": True})]
)
def test_weights_are_named_by_init_from_alone(name: str, options: dict[str, object]) -> None:
    with raises(UsageError, code="library-model"):
        built(name, options=options)
