"""Weights of other programs as the beginning of a run: which files, what fits, what is refused."""

from __future__ import annotations

import hashlib
import pickle
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import save_file
from torchvision import models

from dist_train.checkpoint.state import find_initial, load_model, read_initial
from dist_train.config import parse_config
from dist_train.models import build_model
from dist_train.outcome import UsageError
from tests.raising import raises

NAME = "torchvision:shufflenet_v2_x0_5"


def model(classes: int, **settings: object) -> torch.nn.Module:
    data = {"name": "synthetic", "synthetic_shape": [3, 32, 32], "synthetic_classes": classes}
    return build_model(
        parse_config({"data": data, "model": {"name": NAME, "norm": "batch", **settings}}, source="test")
    )


@pytest.fixture(scope="module")
def published() -> dict[str, torch.Tensor]:
    """A state dict such as torchvision publishes: 1000 classes, and counts that our norms do not keep."""
    with torch.random.fork_rng():
        torch.manual_seed(1)
        network = models.shufflenet_v2_x0_5()
    for module in network.modules():
        if isinstance(module, torch.nn.BatchNorm2d) and module.running_mean is not None:
            module.running_mean.fill_(0.5)
    return dict(network.state_dict())


def loaded(path: Path, network: torch.nn.Module, classes: int) -> list[str]:
    """Load the file at `path` as a run does, and return what it leaves to the seed."""
    initial = read_initial(path, NAME)
    own = network.state_dict()
    heads = list(initial.other_heads(own, classes))
    load_model(initial.fitted(own, classes), network, str(path))
    return heads


@pytest.mark.parametrize("form", ["plain.pth", "wrapped.pth", "parallel.bin", "plain.pt", "plain.safetensors"])
def test_weights_are_taken_and_a_head_of_other_classes_is_the_seeds(
    form: str, published: dict[str, torch.Tensor], tmp_path: Path
) -> None:
    path = tmp_path / form
    if path.suffix == ".safetensors":
        save_file(published, path)
    else:
        parallel = {f"module.{name}": tensor for name, tensor in published.items()}
        contents: dict[str, Any] = {
            "plain": published,
            "wrapped": {"epoch": 3, "state_dict": published},
            "parallel": {"model": parallel},
        }
        torch.save(contents[path.stem], path)
    assert read_initial(path, NAME).sha256 == hashlib.sha256(path.read_bytes()).hexdigest()
    network = model(1000)
    assert loaded(path, network, 1000) == []
    assert all(torch.equal(tensor, published[name]) for name, tensor in network.state_dict().items())
    five, seeded = model(5), model(5).state_dict()
    assert loaded(path, five, 5) == ["fc.weight", "fc.bias"]
    for name, tensor in five.state_dict().items():
        assert torch.equal(tensor, seeded[name] if name.startswith("fc.") else published[name])


def test_averages_are_left_out_where_the_norm_keeps_none(published: dict[str, torch.Tensor], tmp_path: Path) -> None:
    torch.save(published, tmp_path / "weights.pth")
    assert loaded(tmp_path / "weights.pth", model(1000, norm="group"), 1000) == []


@pytest.mark.parametrize(
    ("change", "code"),
    [
        ({"conv1.0.weight": torch.zeros(24, 3, 1, 1)}, "checkpoint-of-another-model"),
        ({"layer9.weight": torch.zeros(3)}, "checkpoint-of-another-model"),
        ({"fc.weight": torch.zeros(10, 256)}, "checkpoint-of-another-model"),
        ({"conv1.1.weight": None}, "weights-unreadable"),
    ],
)
def test_what_does_not_fit_is_one_message(
    change: dict[str, Any], code: str, published: dict[str, torch.Tensor], tmp_path: Path
) -> None:
    torch.save({**published, **change}, tmp_path / "weights.pth")
    with raises(UsageError, code):
        loaded(tmp_path / "weights.pth", model(5), 5)


def test_nothing_in_a_file_is_run(tmp_path: Path) -> None:
    (tmp_path / "code.pth").write_bytes(pickle.dumps({"weight": print}))
    torch.save(torch.nn.Linear(2, 2), tmp_path / "module.pth")
    (tmp_path / "text.safetensors").write_text("no tensors")
    for name in ("code.pth", "module.pth", "text.safetensors"):
        with raises(UsageError, "weights-unreadable"):
            read_initial(tmp_path / name, NAME)


def test_torchvisions_weights_are_found_in_the_cache_of_torch_hub(
    published: dict[str, torch.Tensor], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("TORCH_HOME", str(tmp_path))
    source = Path("torchvision:IMAGENET1K_V1")
    with raises(UsageError, "weights-missing") as missing:
        read_initial(source, NAME)
    file = Path(str(missing.value).split()[-1])
    assert file.name.startswith("shufflenetv2_x0.5-")
    file.parent.mkdir(parents=True)
    torch.save(published, file)
    assert find_initial(source, NAME) == find_initial(source, "shufflenet_v2_x0_5") == file
    with raises(UsageError, "weights-unreadable"):  # its name says another digest
        read_initial(source, NAME)
    for name, weights in ((NAME, "torchvision:IMAGENET1K_V9"), ("vgg9", str(source))):
        with raises(UsageError, "weights-missing"):
            find_initial(Path(weights), name)
