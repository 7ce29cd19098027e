"""Every model with every norm learns from each of its weights, wherever it is run; models of libraries, too."""

from __future__ import annotations

import copy
import random
from collections.abc import Callable
from pathlib import Path
from typing import Any, Self, get_args

import numpy as np
import pytest
import timm
import torch
from torch import Tensor, nn
from torch.nn import functional
from torch.nn.utils.parametrizations import orthogonal, spectral_norm, weight_norm
from torch.utils.checkpoint import checkpoint
from torchvision import models

from dist_train.checkpoint.files import Contents
from dist_train.config import Config, ImageFormat, ModelSettings, parse_config
from dist_train.models import build_model, check_training
from dist_train.models.building import _MODELS, _with_norm, initialize
from dist_train.models.norms import GroupedBatchNorm, NormFactory, norm_factory, norm_modules, norm_parameters
from dist_train.outcome import UsageError
from dist_train.training.evaluation import stored_model
from tests.raising import raises, raises_problems

pytestmark = pytest.mark.usefixtures("one_thread")

HERE = __name__
MODELS = tuple(_MODELS)
NORMS: tuple[str, ...] = get_args(ModelSettings.model_fields["norm"].annotation)


def config(data: str, **model: Any) -> Config:
    return parse_config({"data": {"name": data}, "model": {"width": 0.0625, "ghost_size": 2, **model}}, source="test")


@pytest.mark.parametrize("data", ["cifar10", "fashion-mnist"])
@pytest.mark.parametrize("norm", NORMS)
@pytest.mark.parametrize("name", MODELS)
def test_every_weight_of_every_model_with_every_norm_has_a_gradient(name: str, norm: str, data: str) -> None:
    settings = config(data, name=name, norm=norm)
    model = build_model(settings)
    images = torch.rand(4, *settings.data.image_format.shape, generator=torch.Generator().manual_seed(0))
    logits = model(images)
    assert logits.shape == (4, 10)
    functional.cross_entropy(logits, torch.arange(4)).backward()
    for parameter_name, parameter in model.named_parameters():
        assert parameter.grad is not None
        assert parameter.grad.isfinite().all(), parameter_name
        assert parameter.grad.any(), parameter_name


@pytest.mark.parametrize("norm", NORMS)
@pytest.mark.parametrize("name", MODELS)
def test_norms_are_known_as_norms_and_begin_as_the_identity(name: str, norm: str) -> None:
    model = build_model(config("cifar10", name=name, norm=norm))
    of_norms = norm_parameters(model)
    by_type = {
        f"{prefix}.{kind}"
        for prefix, module in model.named_modules()
        if isinstance(module, GroupedBatchNorm | nn.GroupNorm)
        for kind in ("weight", "bias")
    }
    assert of_norms == by_type
    assert bool(of_norms) == (norm != "none")
    assert bool(norm_modules(model)) == (norm in ("batch", "ghost", "sync"))
    for parameter_name, parameter in model.named_parameters():
        if parameter_name in of_norms:
            assert torch.equal(parameter, torch.full_like(parameter, float(parameter_name.endswith("weight"))))


@pytest.mark.parametrize("name", MODELS)
def test_initial_weights_do_not_depend_on_the_norm(name: str) -> None:
    with_norms, without = (build_model(config("cifar10", name=name, norm=norm)) for norm in ("group", "none"))
    state = with_norms.state_dict()
    shared = {key: value for key, value in without.state_dict().items() if key in state or key.endswith("weight")}
    assert all(torch.equal(state[key], value) for key, value in shared.items())


@pytest.mark.parametrize("name", ["vgg16", "vgg19", "resnet18"])
@pytest.mark.parametrize("side", [1, 7, 8, 70])
def test_images_of_any_size_are_taken(name: str, side: int) -> None:
    data = {"name": "synthetic", "synthetic_shape": [2, side, side], "synthetic_classes": 3}
    model = build_model(parse_config({"data": data, "model": {"name": name, "width": 0.03}}, source="test"))
    assert model(torch.zeros(2, 2, side, side)).shape == (2, 3)


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


@pytest.mark.parametrize("name", ["torchvision:mobilenet_v3_small", "timm:mobilenetv3_small_050"])
def test_a_model_of_a_library_computes_what_the_library_computes(name: str) -> None:
    """With timm's activations, which are parts of its batch norms, and torchvision's epsilon of 0.001."""
    library, _, model_name = name.partition(":")
    create: Any = {"timm": timm.create_model, "torchvision": models.get_model}[library]
    theirs, ours = create(model_name, num_classes=5), built(name, norm="batch")
    _, unexpected = theirs.load_state_dict(ours.state_dict(), strict=False)
    assert not unexpected
    for model in (theirs, ours):
        model.eval()
        for buffer_name, buffer in model.named_buffers():
            if buffer_name.endswith("running_var"):
                buffer.fill_(0.5)
    images = torch.rand(2, 3, 32, 32, generator=torch.Generator().manual_seed(0))
    torch.testing.assert_close(ours(images), theirs(images), rtol=1e-5, atol=1e-7)


def test_group_norm_in_place_of_a_norm_of_vectors_has_more_than_two_values_per_group() -> None:
    norm = norm_factory(ModelSettings(norm="group"))
    model = _with_norm(nn.Sequential(nn.BatchNorm2d(32), nn.BatchNorm1d(32)), "a model", 1.0, norm)
    assert [each.num_groups for each in model.modules() if isinstance(each, nn.GroupNorm)] == [16, 4]


@pytest.mark.filterwarnings("ignore:The default weight initialization of GoogleNet")
def test_auxiliary_logits_are_refused_with_how_to_leave_them_out() -> None:
    with raises(UsageError, code="plugin-result") as refused:
        built("torchvision:googlenet")
    assert "model.options={aux_logits: false}" in str(refused.value)
    assert built("torchvision:googlenet", options={"aux_logits": False})(torch.zeros(4, 3, 32, 32)).shape == (4, 5)


def test_timm_takes_any_number_of_channels() -> None:
    one = {**IMAGES, "synthetic_shape": [1, 32, 32]}
    assert built("timm:resnet18", one)(torch.zeros(4, 1, 32, 32)).shape == (4, 5)
    with raises(UsageError, code="library-model") as refused:
        built("torchvision:googlenet", one)  # which timm does not have
    assert "timm:googlenet" not in str(refused.value)


class Stateful(nn.Identity):
    def get_extra_state(self) -> dict[str, int]:
        return {"passes": 1}


def leave_out_stem(module: nn.Module, state: dict[str, Any], prefix: str, metadata: object) -> None:
    for name in [name for name in state if name.startswith(f"{prefix}stem.")]:
        del state[name]


class Network(nn.Module):
    """A plug-in's network, with one peculiarity."""

    random: Tensor
    passes: Tensor

    def __init__(self, classes: int, norm: NormFactory, kind: str) -> None:
        super().__init__()
        self.kind = kind
        self.stem, self.norm, self.head = nn.Linear(3 * 32 * 32, 8), norm(8), nn.Linear(8, classes)
        self.register_buffer("random", torch.randn(8))
        self.own = torch.Generator() if kind == "own-dropout" else None
        self.order = (random.random(), float(np.random.random()))
        self.register_buffer("passes", torch.zeros(()))
        extra: dict[str, Callable[[], nn.Module]] = {
            "double": lambda: nn.Linear(8, 8).double(),
            "complex": lambda: nn.ParameterList([torch.ones(2, dtype=torch.complex64)]),
            "empty": lambda: nn.ParameterList([torch.ones(0, 5)]),
            "norm-unused": lambda: norm(8),
            "norm-of-fewer": lambda: norm(4),
            "layer-norm": lambda: nn.Sequential(nn.LayerNorm(8), nn.RMSNorm(8), nn.BatchNorm1d(8)),
            "view": lambda: nn.Conv2d(3, 3, 1),
            "narrow": lambda: nn.Sequential(nn.ReLU(), nn.Linear(5, 8)),
            "extra-state": Stateful,
            "reentrant": lambda: nn.Linear(8, 8),
            "checkpointed": lambda: nn.Linear(8, 8),
            "unused": lambda: nn.Sequential(*[nn.Linear(8, 8) for _ in range(20)]),
            "unused-and-frozen": lambda: nn.Linear(8, 8).requires_grad_(False),
            "sparse": lambda: nn.Embedding(2, 8, sparse=True),
            "norm-in-training": lambda: norm(8),
            "lazy": nn.LazyBatchNorm1d,
            "lazy-in-training": lambda: nn.LazyLinear(8),
            "untracked": lambda: nn.BatchNorm2d(3, track_running_stats=False),
        }
        if kind.endswith("-moved"):
            extra[kind] = lambda: nn.Linear(8, 8).requires_grad_(not kind.startswith("frozen"))
        self.extra = extra.get(kind, nn.Identity)()
        self.listed = [nn.Linear(8, 8).requires_grad_(kind == "listed")] if kind.startswith("listed") else []
        if kind == "frozen":
            self.requires_grad_(False)
        if kind.startswith("pretrained"):
            nn.init.eye_(self.head.weight)
            self.head.requires_grad_(kind != "pretrained-and-frozen")
        if kind == "from-zero":
            nn.init.zeros_(self.head.weight)
        if kind == "unsaved":
            self.stem.requires_grad_(False)
            self.register_state_dict_post_hook(leave_out_stem)  # type: ignore[no-untyped-call]  # torch gives it no types
        others = {"expanded": torch.ones(1, 8).expand(4, 8), "sparse-buffer": torch.eye(8).to_sparse()}
        if kind in others:
            self.register_buffer("other", others[kind])
        if kind.startswith("mask"):
            self.register_buffer("mask", torch.ones(1, 1), persistent=kind != "mask-not-saved")

    def train(self, mode: bool = True) -> Self:
        super().train(mode)
        if self.kind == "norm-at-rest":
            self.norm.eval()
        return None if self.kind == "train-returns-nothing" else self  # type: ignore[return-value]  # a usual mistake

    def moved(self, how: str) -> nn.Module:
        """Return the extra layer, changed in this pass as usual in the code of papers."""
        weight = self.extra.weight
        assert isinstance(weight, nn.Parameter)
        with torch.no_grad():
            if how == "data":
                weight.data = functional.normalize(weight.data)
            if how == "data-unchanged":
                weight.data = torch.renorm(weight.data, 2, 0, 100.0)
            if how == "data-in-place":
                weight.data.mul_(0.5)
            if how == "copied" or (how == "copied-in-evaluation" and not self.training):
                weight.copy_(functional.normalize(weight))
            if how == "clamped-unchanged":
                weight.clamp_(-100.0, 100.0)
            if how == "frozen" and self.training:
                weight.lerp_(torch.eye(8), 0.1)
        return self.extra

    def forward(self, images: Tensor) -> object:
        if self.training:
            self.passes += 1
        if self.kind == "in-place" or (self.kind == "in-place-in-evaluation" and not self.training):
            images[:, 0].sub_(0.5)
        if self.kind == "view":
            images = self.extra(images).view(len(images), 3 * 32 * 32)
        if self.kind == "untracked":
            images = self.extra(images)
        features = self.stem(images.flatten(1)) * self.random
        if self.kind == "norm-of-tokens":
            features = self.norm(torch.cat([features, features]))[: len(images)]
        else:
            features = self.norm(features)
        if self.kind == "norm-twice":
            features = self.norm(features)
        if self.kind in ("layer-norm", "narrow", "lazy", "norm-of-fewer"):
            features = self.extra(features)
        if self.kind in ("norm-in-training", "lazy-in-training") and self.training:
            features = self.extra(features)
        if self.kind in ("reentrant", "checkpointed") and self.training:
            for _ in range(2):
                features = checkpoint(self.extra, features, use_reentrant=self.kind == "reentrant")
        if self.kind == "sparse":
            features = features + self.extra(torch.zeros(len(images), dtype=torch.int64))
        of_mode = "mask-in-training" if self.training else "mask-in-evaluation"
        if self.kind in ("mask", "mask-not-saved", of_mode):
            self.mask = torch.ones(len(images), 1)
        if self.kind == "assigned" and self.training:
            self.random = 0.9 * self.random
        if self.kind == "dropout" and self.training:
            features = functional.dropout(features)
        if self.kind == "own-dropout" and self.training:
            features = features * torch.rand(features.shape, generator=self.own)
        if self.kind.endswith("-moved"):
            features = self.moved(self.kind.removesuffix("-moved"))(features)
        for layer in self.listed:
            features = layer(features)
        logits = self.head(features)
        if self.kind == "squeezed":
            logits = logits.squeeze()
        if self.kind == "standardized":
            features = features.squeeze()
            logits = logits - features.mean(1, keepdim=True)
        if self.kind == "softmax" or (self.kind == "softmax-in-evaluation" and not self.training):
            return logits.softmax(1)
        if self.kind == "complex-logits":
            logits = torch.complex(logits, logits)
        of_training = (logits, features) if self.training else logits
        others = {"dict": {"logits": logits}, "tuple-in-training": of_training, "detached": logits.detach()}
        return others.get(self.kind, logits)


def network(images: ImageFormat, width: float, norm: NormFactory, options: dict[str, Any]) -> nn.Module:
    return Network(images.classes, norm, options["kind"])


@pytest.mark.parametrize(
    "kind",
    [
        "dict",
        "tuple-in-training",
        "detached",
        "double",
        "complex",
        "complex-logits",
        "empty",
        "extra-state",
        "unsaved",
        "frozen",
        "norm-unused",
        "norm-twice",
        "in-place",
        "in-place-in-evaluation",
    ],
)
def test_what_cannot_be_trained_is_refused_before_the_run(kind: str) -> None:
    with raises(UsageError, code="plugin-result"):
        built(f"{HERE}:network", options={"kind": kind})


def test_a_trained_layer_in_a_plain_list_is_refused_with_what_to_use_instead() -> None:
    built(f"{HERE}:network", options={"kind": "listed-and-frozen"})
    with raises(UsageError, code="plugin-result") as refused:
        built(f"{HERE}:network", options={"kind": "listed"})
    assert "nn.ModuleList" in str(refused.value)


def scripted(images: ImageFormat, width: float, norm: NormFactory) -> nn.Module:
    network = nn.Sequential(nn.Flatten(), nn.Linear(3 * 32 * 32, images.classes))
    return torch.jit.trace(network, torch.zeros(2, 3, 32, 32), check_trace=False)  # type: ignore[no-any-return]


@pytest.mark.filterwarnings("ignore:.torch.jit.trace")
def test_a_module_of_torchscript_is_refused() -> None:
    with raises(UsageError, code="plugin-result"):
        built(f"{HERE}:scripted")


@pytest.mark.parametrize(("kind", "fix"), [("expanded", "contiguous"), ("sparse-buffer", "to_dense")])
def test_a_buffer_that_cannot_be_overwritten_is_refused_by_name(kind: str, fix: str) -> None:
    with raises(UsageError, code="plugin-result") as refused:
        built(f"{HERE}:network", options={"kind": kind})
    assert "the buffer other of" in str(refused.value)
    assert fix in str(refused.value)


def test_a_norm_that_stays_in_evaluation_mode_is_refused_with_what_to_use_instead() -> None:
    with raises(UsageError, code="plugin-result") as refused:
        built(f"{HERE}:network", options={"kind": "norm-at-rest"})
    assert "nn.BatchNorm2d" in str(refused.value)


def test_buffers_may_get_their_size_from_the_first_images() -> None:
    model = tried("lazy")
    assert torch.equal(model.get_buffer("extra.running_mean"), torch.zeros(8))
    assert torch.equal(model.get_buffer("extra.running_var"), torch.ones(8))


def test_weights_may_get_their_size_from_the_first_images_in_training() -> None:
    assert tried("lazy-in-training").get_parameter("extra.weight").shape == (8, 8)


def test_ghost_norm_over_more_than_the_samples_is_refused() -> None:
    built(f"{HERE}:network", options={"kind": "norm-of-tokens"}, norm="batch")
    with raises(UsageError, code="plugin-result"):
        built(f"{HERE}:network", options={"kind": "norm-of-tokens"}, norm="ghost")


def test_a_layer_of_torch_that_fails_is_named() -> None:
    with raises(UsageError, code="plugin-failed") as refused:
        built(f"{HERE}:network", options={"kind": "narrow"})
    assert "extra.1, Linear" in str(refused.value)


def packed(images: ImageFormat, width: float, norm: NormFactory) -> nn.Module:
    """Return a network of tokens that needs one besides those for padding, which are 0."""

    class Packed(nn.Linear):
        def forward(self, input: Tensor) -> Tensor:
            tokens = input.flatten(1)
            lengths = (tokens != 0).sum(1)
            rows = nn.utils.rnn.pack_padded_sequence(tokens[..., None], lengths, True, enforce_sorted=False)
            return super().forward(rows.data[: len(input)])

    return Packed(1, images.classes)


def test_a_model_that_fails_on_images_of_zeros_is_told_what_it_was_given() -> None:
    with raises(UsageError, code="plugin-failed") as refused:
        built(f"{HERE}:packed")
    assert "images of zeros" in str(refused.value)


@pytest.mark.parametrize("norm", ["batch", "ghost", "sync"])
def test_a_norm_of_another_number_of_channels_is_refused(norm: str) -> None:
    with raises(UsageError, code="plugin-failed") as refused:
        built(f"{HERE}:network", norm=norm, options={"kind": "norm-of-fewer"})
    assert "a norm of 4 channels was given [2, 8]" in str(refused.value)
    assert "extra" in str(refused.value)


def test_a_network_is_tried_in_the_layout_of_training() -> None:
    settings = {"data": IMAGES, "model": {"name": f"{HERE}:network", "options": {"kind": "view"}}}
    with raises(UsageError, code="plugin-failed") as refused:
        build_model(parse_config(settings, source="test"))
    assert "reshape" in str(refused.value)
    build_model(parse_config({**settings, "precision": {"channels_last": False}}, source="test"))


def test_random_buffers_come_from_the_seed_and_a_trial_pass_leaves_no_trace() -> None:
    first, again = (built(f"{HERE}:network", options={"kind": "plain"}) for _ in range(2))
    assert torch.equal(first.get_buffer("random"), again.get_buffer("random"))
    assert first.order == again.order
    assert first.get_buffer("passes") == 0
    assert first.training
    assert not any(norm.seen for norm in norm_modules(first))


def test_norms_of_the_model_itself_begin_as_the_identity() -> None:
    model = built(f"{HERE}:network", options={"kind": "layer-norm"})
    own = {name: value for name, value in model.named_parameters() if name.startswith("extra")}
    assert own.keys() <= norm_parameters(model)
    assert all(bool((value == float(name.endswith("weight"))).all()) for name, value in own.items())


def test_gains_and_frozen_parameters_keep_the_values_with_which_they_were_built() -> None:
    model = nn.Module()
    built_with = {
        "scale": torch.full((4,), 1e-6),
        "scale_of_channels": torch.full((4, 1, 1), 1e-6),
        "temperature": torch.tensor(2.5),
        "rates": torch.linspace(1, 2, 4),
        "scale_of_all": torch.ones(1, 1, 1, 1),
        "shift_of_channels": torch.zeros(4, 1, 1),
        "rates_of_channels": torch.linspace(1, 2, 4).view(4, 1, 1),
        "begins_at_zero": torch.zeros(1, 1),
    }
    for name, value in built_with.items():
        model.register_parameter(name, nn.Parameter(value.clone()))
    model.register_parameter("positions", nn.Parameter(torch.arange(6.0).view(2, 3), requires_grad=False))
    biases = ("in_proj_bias", (4,)), ("bias", (4, 1, 1)), ("bias_of_maps", (1, 4, 1, 1))
    for name, shape in biases:
        model.register_parameter(name, nn.Parameter(torch.ones(shape)))
    model.register_parameter("token", nn.Parameter(torch.zeros(1, 4)))
    single: dict[str, nn.Linear | nn.Conv2d] = {"linear": nn.Linear(1, 1), "convolution": nn.Conv2d(1, 1, 1)}
    for name, layer in single.items():
        nn.init.ones_(layer.weight)
        model.add_module(name, layer)
    initialize(model, seed=0)
    parameters = dict(model.named_parameters())
    assert all(torch.equal(parameters[name], value) for name, value in built_with.items())
    assert torch.equal(parameters["positions"], torch.arange(6.0).view(2, 3))
    assert not any(parameters[name].any() for name, _ in biases)
    assert parameters["token"].all()
    assert all(parameters[f"{name}.weight"].item() not in (0.0, 1.0) for name in single)


def test_the_weight_of_a_layer_with_weight_norm_is_drawn_as_any_other() -> None:
    layer = weight_norm(nn.Linear(256, 64))
    initialize(layer, seed=0)
    lengths = layer.weight.detach().norm(dim=1)
    assert lengths.min() > 0.8 * 2**0.5
    assert lengths.max() < 1.2 * 2**0.5
    narrow = weight_norm(nn.Linear(1, 64))
    built_with = narrow.weight.detach().clone()
    initialize(narrow, seed=0)
    assert not torch.isclose(narrow.weight, built_with).any()


@pytest.mark.parametrize("constrained", [orthogonal, spectral_norm])
def test_a_weight_under_a_constraint_satisfies_it(constrained: Callable[[nn.Module], nn.Module]) -> None:
    """torch's orthogonal weights take their signs from a diagonal of 1 and -1, and spectral norm keeps two vectors."""
    torch.manual_seed(0)
    layer = constrained(nn.Linear(16, 4)).eval()
    initialize(layer, seed=0)
    assert isinstance(layer.weight, torch.Tensor)
    assert float(torch.linalg.svdvals(layer.weight.detach())[0]) == pytest.approx(1.0, abs=0.05)


@pytest.mark.parametrize("layer", [nn.Embedding(64, 8, padding_idx=-1), nn.EmbeddingBag(64, 8, padding_idx=3)])
def test_the_row_of_an_embedding_for_padding_stays_zero(layer: nn.Embedding | nn.EmbeddingBag) -> None:
    """torch makes it zero, and does not train it: drawn, each padding token would add the same random vector."""
    initialize(layer, seed=0)
    assert layer.padding_idx is not None
    is_zero = (layer.weight == 0).all(1)
    assert is_zero.nonzero().tolist() == [[layer.padding_idx]]


def test_a_network_of_layer_norms_learns_from_every_weight() -> None:
    model = built("timm:convnext_atto")
    optimizer = torch.optim.SGD(model.parameters(), lr=0.01)
    images, labels = torch.rand(4, 3, 32, 32, generator=torch.Generator().manual_seed(0)), torch.arange(4)
    for _ in range(3):
        optimizer.zero_grad()
        functional.cross_entropy(model(images), labels).backward()
        optimizer.step()
    assert [name for name, value in model.named_parameters() if value.grad is None or not value.grad.any()] == []


@pytest.mark.parametrize("name", ["torchvision:resnet1", "timm:resnet1"])
def test_an_unknown_model_is_refused_before_the_run(name: str) -> None:
    with raises_problems(("model.name", "plugin-missing")):
        built(name)


@pytest.mark.parametrize(
    ("name", "options"),
    [
        ("torchvision:resnet18", {"weights": "DEFAULT"}),
        ("torchvision:resnet18", {"pretrained": True}),
        ("timm:resnet18", {"pretrained": True}),
    ],
)
def test_weights_are_named_by_init_from_alone(name: str, options: dict[str, object]) -> None:
    with raises(UsageError, code="library-model"):
        built(name, options=options)


def tried(kind: str, averaging: str = "none", **model: object) -> nn.Module:
    """Return the network after `check_training`."""
    settings = {"name": f"{HERE}:network", "options": {"kind": kind}, **model}
    config = parse_config({"data": IMAGES, "model": settings, "averaging": {"kind": averaging}}, source="test")
    network = build_model(config)
    check_training(network, config)
    return network


@pytest.mark.parametrize("kind", ["reentrant", "sparse"])
def test_gradients_that_arrive_in_parts_or_are_sparse_are_refused(kind: str) -> None:
    with raises(UsageError, code="plugin-result") as refused:
        tried(kind)
    assert "the gradient of extra." in str(refused.value)


@pytest.mark.parametrize(("kind", "code"), [("squeezed", "plugin-result"), ("standardized", "plugin-failed")])
def test_a_model_that_cannot_take_a_single_image_is_refused(kind: str, code: str) -> None:
    built(f"{HERE}:network", options={"kind": kind})
    with raises(UsageError, code=code) as refused:
        tried(kind)
    assert "single image" in str(refused.value)
    assert f"{HERE}:network" in str(refused.value)


def test_the_method_train_of_a_model_may_return_nothing() -> None:
    model = tried("train-returns-nothing")
    assert model.training
    assert not any(norm.seen for norm in norm_modules(model))


@pytest.mark.parametrize("kind", ["mask", "mask-in-training", "mask-in-evaluation"])
def test_buffers_of_checkpoints_that_depend_on_the_number_of_images_are_refused(kind: str) -> None:
    with raises(UsageError, code="plugin-result") as refused:
        tried(kind)
    assert "the buffer mask" in str(refused.value)
    tried("mask-not-saved")


def test_training_warns_of_probabilities_in_place_of_logits(caplog: pytest.LogCaptureFixture) -> None:
    tried("checkpointed")
    assert "softmax" not in caplog.text
    for kind in ("softmax", "softmax-in-evaluation"):
        caplog.clear()
        tried(kind)
        assert "softmax" in caplog.text


def test_training_warns_of_logits_that_depend_on_the_other_images_of_an_evaluation(
    caplog: pytest.LogCaptureFixture,
) -> None:
    for kind in ("dropout", "norm-in-training"):
        tried(kind, norm_statistics="running")
        assert "depend on the other images" not in caplog.text
    tried("untracked")
    assert "depend on the other images" in caplog.text


def test_training_warns_of_parameters_without_a_gradient(caplog: pytest.LogCaptureFixture) -> None:
    for kind in ("checkpointed", "unused-and-frozen"):
        tried(kind)
        assert "no gradient" not in caplog.text
    tried("unused")
    [warning] = [message for message in caplog.messages if "no gradient" in message]
    assert "40 of its parameters (extra.0.weight, extra.0.bias, extra.1.weight)" in warning


def test_training_warns_of_values_of_the_model_s_code_that_initial_weights_replace(
    caplog: pytest.LogCaptureFixture, tmp_path: Path
) -> None:
    for kind in ("plain", "from-zero", "pretrained-and-frozen"):
        tried(kind)
        assert "alike for any seed" not in caplog.text
    settings = {"data": IMAGES, "model": {"name": f"{HERE}:network", "options": {"kind": "pretrained"}}}
    for source in (tmp_path / "weights.pth", None):
        config = parse_config({**settings, "run": {"init_from": source}}, source="test")
        check_training(build_model(config), config)
        assert ("builds 1 of its parameters (head.weight) alike for any seed" in caplog.text) == (source is None)


def test_training_warns_of_draws_from_a_generator_of_the_model_s_own(caplog: pytest.LogCaptureFixture) -> None:
    tried("dropout")
    assert "repeated from the same seed" not in caplog.text
    tried("own-dropout")
    assert "repeated from the same seed" in caplog.text


@pytest.mark.parametrize(
    "how", ["data", "data-unchanged", "data-in-place", "copied", "copied-in-evaluation", "clamped-unchanged"]
)
def test_a_trained_parameter_that_a_forward_pass_changes_is_refused(how: str) -> None:
    """Each rank would change it for its own passes; averages and noise are computed from weights that miss it."""
    with raises(UsageError, code="plugin-result") as refused:
        tried(f"{how}-moved")
    assert "extra.weight" in str(refused.value)


def test_a_frozen_parameter_that_training_changes_is_warned_of_and_restored(caplog: pytest.LogCaptureFixture) -> None:
    untouched = built(f"{HERE}:network", options={"kind": "frozen-moved"})
    model = tried("frozen-moved")
    assert "frozen parameters in training (extra.weight)" in caplog.text
    assert "repeated from the same seed" not in caplog.text
    assert torch.equal(model.get_parameter("extra.weight"), untouched.get_parameter("extra.weight"))


def test_a_trial_of_the_backward_pass_leaves_no_trace() -> None:
    model = tried("checkpointed")
    assert all(parameter.grad is None and not parameter._post_accumulate_grad_hooks for parameter in model.parameters())
    assert not any(norm.seen for norm in norm_modules(model))
    assert all(module.training for module in model.modules())


def test_a_norm_that_evaluations_do_not_use_is_refused_where_its_statistics_are_recomputed() -> None:
    assert tried("norm-in-training", norm_statistics="running").training
    with raises(UsageError, code="plugin-result"):
        tried("norm-in-training", norm_statistics="recomputed")
    with raises(UsageError, code="plugin-result"):
        tried("norm-in-training", averaging="ema", norm_statistics="running")


def test_buffers_to_which_training_assigns_new_tensors_are_found_and_restored(
    caplog: pytest.LogCaptureFixture,
) -> None:
    model, untouched = tried("assigned"), built(f"{HERE}:network", options={"kind": "plain"})
    assert "(random, passes)" in caplog.text
    assert torch.equal(model.get_buffer("random"), untouched.get_buffer("random"))


def test_training_alone_warns_of_buffers_that_it_changes(caplog: pytest.LogCaptureFixture) -> None:
    settings = {"data": IMAGES, "model": {"name": f"{HERE}:network", "options": {"kind": "plain"}}}
    config = parse_config(settings, source="test")
    model = build_model(config)
    contents = Contents(step=1, epoch=1.0, model=model.state_dict(), optimizer={}, config={}, metrics={})
    stored_model(contents, config)
    assert not caplog.text
    generator = torch.get_rng_state()
    check_training(model, config)
    assert "changes buffers in training (passes)" in caplog.text
    assert model.get_buffer("passes") == 0
    assert not any(norm.seen for norm in norm_modules(model))
    assert torch.equal(torch.get_rng_state(), generator)


class Storing(nn.Module):
    """A plug-in that stores its activations."""

    def __init__(self, images: ImageFormat, width: float, norm: NormFactory) -> None:
        super().__init__()
        self.head = nn.Linear(images.shape[0] * images.shape[1] * images.shape[2], images.classes)

    def forward(self, inputs: Tensor) -> Tensor:
        logits: Tensor = self.head(inputs.flatten(1))
        self.logits = logits
        return logits


def test_a_model_that_stores_activations_can_be_copied() -> None:
    copy.deepcopy(build_model(config("cifar10", name=f"{HERE}:Storing")))
