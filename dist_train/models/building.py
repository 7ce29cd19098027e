"""Builds the network and the loss of a configuration.

A parameter's initial values depend on the seed and its name alone.

VGG9 is the network of Li et al. (arXiv 1712.09913). VGG16 and VGG19 (arXiv 1409.1556) are for small images. Residual
networks (arXiv 1512.03385) consist of torchvision's blocks, with its parameter names, for images of any size. All
models of torchvision and timm are available as `torchvision:resnet50` or `timm:resnet50`, with `model.norm`.
"""

from __future__ import annotations

from collections import OrderedDict
from collections.abc import Callable, Collection, Mapping, Sequence
from functools import partial
from itertools import pairwise
from typing import Any, Literal, Protocol

import torch
from torch import Tensor, nn
from torch.nn import functional
from torch.nn.modules.conv import _ConvNd
from torch.nn.utils.parametrizations import _WeightNorm
from torch.nn.utils.parametrize import ParametrizationList
from torch.nn.utils.weight_norm import WeightNorm

from dist_train.config import Config, ImageFormat
from dist_train.config.plugins import call_plugin, is_plugin
from dist_train.models.norms import VECTOR_GROUP, NormFactory, norm_factory, norm_parameters, replace_batch_norms
from dist_train.models.trial import check_loss, check_outputs, sample_losses
from dist_train.outcome import UsageError, did_you_mean
from dist_train.reproducible import generator, key, seeded_generators

_POOL = None
_VGG9 = (64, 64, _POOL, 128, 128, _POOL, 256, 256, 256, _POOL)
_VGG16 = (64, 64, _POOL, 128, 128, _POOL, *(256,) * 3, _POOL, *(512,) * 3, _POOL, *(512,) * 3, _POOL)
_VGG19 = (64, 64, _POOL, 128, 128, _POOL, *(256,) * 4, _POOL, *(512,) * 4, _POOL, *(512,) * 4, _POOL)

_STAGES = (64, 128, 256, 512)
_SMALL = 64  # images with at most this many pixels per side keep their size through the stem, as is usual for CIFAR
_MIN_STRIDED_CHANNELS = 8  # with fewer, the backward pass of a strided 1x1 convolution corrupts the heap (torch 2.13)


def _vgg(
    plan: Sequence[int | None], images: ImageFormat, width: float, norm: NormFactory, hidden: int | None = None
) -> nn.Module:
    """Return VGG, with one linear layer after the `hidden` one, if any; the published has three, with dropout."""
    channels, height, breadth = images.shape
    layers: OrderedDict[str, nn.Module] = OrderedDict()
    block, place = 1, 1
    for outputs in plan:
        if outputs is _POOL:
            layers[f"pool{block}"] = nn.MaxPool2d(2, ceil_mode=True)
            height, breadth = -(-height // 2), -(-breadth // 2)
            block, place = block + 1, 1
            continue
        scaled = max(1, round(outputs * width))
        layers[f"convolution{block}_{place}"] = nn.Conv2d(channels, scaled, 3, padding=1)
        channels = scaled
        layers[f"norm{block}_{place}"] = norm(channels)
        layers[f"relu{block}_{place}"] = nn.ReLU(inplace=True)
        place += 1
    layers["flatten"] = nn.Flatten()
    features = channels * height * breadth
    if hidden is not None:
        scaled = max(1, round(hidden * width))
        layers["hidden"] = nn.Linear(features, scaled)
        layers["hidden_norm"] = norm(scaled, least=VECTOR_GROUP)
        layers["hidden_relu"] = nn.ReLU(inplace=True)
        features = scaled
    layers["classifier"] = nn.Linear(features, images.classes)
    return nn.Sequential(layers)


class _StridedPointwise(nn.Conv2d):
    """A 1x1 convolution that takes strided slices of its input instead of computing with a stride."""

    def forward(self, input: Tensor) -> Tensor:
        rows, columns = self.stride
        return functional.conv2d(input[:, :, ::rows, ::columns], self.weight)


def _resnet(
    name: Literal["BasicBlock", "Bottleneck"],
    depths: Sequence[int],
    images: ImageFormat,
    width: float,
    norm: NormFactory,
) -> nn.Module:
    """Return a ResNet with stages of `depths` blocks `name` of torchvision, their channels scaled by `width`."""
    from torchvision.models import resnet

    block: Any = getattr(resnet, name)
    planes = [max(1, round(channels * width)) for channels in _STAGES]
    layers = _stem(images, planes[0], norm)
    inputs = [planes[0], *(channels * block.expansion for channels in planes)]
    for stage, ((channels, outputs), depth) in enumerate(zip(pairwise(inputs), depths, strict=True), start=1):
        stride = 1 if stage == 1 else 2
        shortcut = None
        if stride > 1 or channels != outputs:
            pointwise = nn.Conv2d if channels >= _MIN_STRIDED_CHANNELS else _StridedPointwise
            shortcut = nn.Sequential(pointwise(channels, outputs, 1, stride, bias=False), norm(outputs))
        first = block(channels, planes[stage - 1], stride, shortcut, norm_layer=norm)
        others = [block(outputs, planes[stage - 1], norm_layer=norm) for _ in range(depth - 1)]
        layers[f"layer{stage}"] = nn.Sequential(first, *others)
    layers["avgpool"] = nn.AdaptiveAvgPool2d(1)
    layers["flatten"] = nn.Flatten()
    layers["fc"] = nn.Linear(inputs[-1], images.classes)
    return nn.Sequential(layers)


def _stem(images: ImageFormat, outputs: int, norm: NormFactory) -> OrderedDict[str, nn.Module]:
    colours, *sides = images.shape
    is_small = max(sides) <= _SMALL
    size, stride, padding = (3, 1, 1) if is_small else (7, 2, 3)
    layers: OrderedDict[str, nn.Module] = OrderedDict()
    layers["conv1"] = nn.Conv2d(colours, outputs, size, stride, padding, bias=False)
    layers["bn1"] = norm(outputs)
    layers["relu"] = nn.ReLU(inplace=True)
    if not is_small:
        layers["maxpool"] = nn.MaxPool2d(3, 2, padding=1)
    return layers


_MODELS: Mapping[str, Callable[[ImageFormat, float, NormFactory], nn.Module]] = {
    # 2,789,706 parameters at 3x32x32
    "vgg9": partial(_vgg, _VGG9, hidden=256),
    "vgg16": partial(_vgg, _VGG16),
    "vgg19": partial(_vgg, _VGG19),
    # 11,173,962
    "resnet18": partial(_resnet, "BasicBlock", (2, 2, 2, 2)),
    # 23,520,842
    "resnet50": partial(_resnet, "Bottleneck", (3, 4, 6, 3)),
}


def build_model(config: Config) -> nn.Module:
    """Return the network [n, C, H, W] -> logits [n, classes], on the CPU, with initial weights from `run.seed`."""
    # torch's layers draw initial values, which are overwritten; but a plug-in may keep others that it has drawn
    with seeded_generators(key(config.run.seed, "model")):
        model = _network(config)
    initialize(model, config.run.seed)
    return model


class Loss(Protocol):
    """What training minimizes: the sum of the samples' losses, or with `none` each of them [n].

    `logits` are float32 [n, classes], `labels` int64 [n].
    """

    def __call__(self, logits: Tensor, labels: Tensor, *, reduction: Literal["none", "sum"]) -> Tensor: ...


def build_loss(config: Config, device: torch.device) -> Loss:
    """Return the loss of `config`, on `device`. Raises UsageError if it is a plug-in's and fails its trial."""
    name = config.loss.name
    if not is_plugin(name):
        return partial(functional.cross_entropy, label_smoothing=config.regularization.label_smoothing)
    with seeded_generators(key(config.run.seed, "loss")):
        of_samples = call_plugin(name, config.loss.options, object, config.data.image_format)
    if isinstance(of_samples, nn.Module):
        of_samples = of_samples.to(device)
    check_loss(of_samples, config, device)

    def loss(logits: Tensor, labels: Tensor, *, reduction: Literal["none", "sum"]) -> Tensor:
        losses = sample_losses(name, of_samples, logits, labels)
        return losses.sum() if reduction == "sum" else losses

    return loss


def runs_sequentials_whole(name: str) -> bool:
    """Whether the model `name` runs each `nn.Sequential` as a whole, as `fuse_relus` requires: ours, and torchvision's.

    Plug-ins and other libraries may take layers out of one, slice it, or add hooks to its layers.
    """
    return name in _MODELS or name.startswith("torchvision:")


def _network(config: Config) -> nn.Module:
    settings, images = config.model, config.data.image_format
    norm = norm_factory(settings)
    if settings.name in _MODELS:
        return _MODELS[settings.name](images, settings.width, norm)
    model: nn.Module = call_plugin(settings.name, settings.options, nn.Module, images, settings.width, norm)
    check_outputs(model, config)
    return model


def initialize(model: nn.Module, seed: int) -> None:
    """Initialize weights after He et al. (arXiv 1502.01852), biases to 0, norms to the identity.

    Each parameter has its own random stream, drawn on the CPU, so that the device does not matter. Frozen parameters,
    vectors, gains, such as layer scales, what a parametrization other than weight norm holds, and an embedding's row
    for padding keep the values with which the model was built.
    """
    norm_names = norm_parameters(model)
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if not parameter.requires_grad:
                continue
            owner = model.get_submodule(name.rpartition(".")[0])
            if "parametrizations" in name.split(".") and not _has_weight_norm(owner):
                continue  # a draw may break the constraint: torch's orthogonal weights would be 0
            if name in norm_names:
                parameter.fill_(1.0 if name.endswith("weight") else 0.0)
            elif parameter.numel() == max(parameter.shape, default=1) and "bias" in name.rpartition(".")[2]:
                parameter.zero_()  # a vector, also as [1, C, 1, 1]
            elif parameter.dim() >= 2 and not _is_vector_or_gain(parameter, owner):
                fan_in = parameter[0].numel()
                sample = torch.empty(parameter.shape).normal_(generator=generator(seed, "initial weights", name))
                sample.mul_((2.0 / fan_in) ** 0.5)
                if isinstance(owner, nn.Embedding | nn.EmbeddingBag) and (row := owner.padding_idx) is not None:
                    sample[row] = parameter[row]  # zeros: torch does not train it
                parameter.copy_(sample)
        for module in model.modules():
            for parts in getattr(module, "parametrizations", {}).values():
                # In weight_norm, with the direction's norm as the gain the weight is the direction as drawn.
                if _has_weight_norm(parts) and parts.original0.requires_grad:
                    parts.original0.copy_(torch.norm_except_dim(parts.original1, 2, parts[0].dim))
            for hook in module._forward_pre_hooks.values():
                if isinstance(hook, WeightNorm):  # torch's older function of that name
                    gain, direction = (getattr(module, f"{hook.name}_{part}") for part in "gv")
                    if gain.requires_grad:
                        gain.copy_(torch.norm_except_dim(direction, 2, hook.dim))


def _has_weight_norm(module: nn.Module) -> bool:
    return isinstance(module, ParametrizationList) and isinstance(module[0], _WeightNorm)


def _is_vector_or_gain(parameter: Tensor, module: nn.Module) -> bool:
    """Whether `parameter` of `module` is a vector, such as [C, 1, 1], or filled with one value that is not 0.

    Such a value is a layer scale, for example: random weights differ. In a linear layer or a convolution, also one with
    weight norm, [C, 1] and a single element are weights.
    """
    if parameter[0].numel() == 1 and not isinstance(module, nn.Linear | _ConvNd | ParametrizationList):
        return True
    return parameter.numel() > 1 and bool(parameter.all()) and bool((parameter == parameter.flatten()[0]).all())


Builder = Callable[..., nn.Module]


def torchvision_model(name: str) -> Builder:
    """Return the builder of torchvision's model `name`; `options` are its keyword arguments. Raises UsageError."""
    from torchvision import models

    _check_known(name, models.list_models(module=models), "torchvision")

    def build(images: ImageFormat, width: float, norm: NormFactory, options: dict[str, Any]) -> nn.Module:
        if images.shape[0] != 3:
            raise UsageError(
                f"torchvision's models take 3 channels, not {images.shape[0]}: use vgg9, resnet18 or timm:NAME",
                code="library-model",
            )
        _refuse_weights(f"torchvision:{name}", options, "weights", "weights_backbone", "pretrained")
        model = models.get_model(name, num_classes=images.classes, **options)
        return _with_norm(model, f"torchvision:{name}", width, norm)

    return build


def timm_model(name: str) -> Builder:
    """Return the builder of timm's model `name`; `options` are keywords of `timm.create_model`. Raises UsageError."""
    import timm

    _check_known(name, timm.list_models(), "timm")

    def build(images: ImageFormat, width: float, norm: NormFactory, options: dict[str, Any]) -> nn.Module:
        _refuse_weights(f"timm:{name}", options, "pretrained", "checkpoint_path")
        keywords: Mapping[str, Any] = {"in_chans": images.shape[0], "num_classes": images.classes, **options}
        return _with_norm(timm.create_model(name, **keywords), f"timm:{name}", width, norm)

    return build


def _check_known(name: str, known: Collection[str], library: str) -> None:
    if name not in known:
        hint = did_you_mean(name, known, f"{library}:")
        raise UsageError(f"{library} has no model {name}{hint}", code="plugin-missing")


def _refuse_weights(name: str, options: Mapping[str, Any], *loading: str) -> None:
    """Raise UsageError for options that load weights: the run's initial weights would silently replace them."""
    if found := [option for option in loading if options.get(option)]:
        raise UsageError(
            f"{name}: weights loaded by model.options.{found[0]} would be overwritten by the seed's initial weights; "
            f"set run.init_from to a file or torchvision:NAME instead",
            code="library-model",
        )


def _with_norm(model: nn.Module, name: str, width: float, norm: NormFactory) -> nn.Module:
    """Return `model`, called `name`, with each of its batch norms replaced by `norm`."""
    if width != 1.0:
        raise UsageError(
            f"model.width does not apply to {name}: set it to 1, and the width by model.options", code="library-model"
        )
    replace_batch_norms(model, norm)
    return model
