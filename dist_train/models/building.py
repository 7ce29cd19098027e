"""Builds the network of a configuration. A parameter's initial values depend on the seed and its name alone.

VGG9 is the network of Li et al. (arXiv 1712.09913). VGG16 and VGG19 (arXiv 1409.1556) are for small images. Residual
networks (arXiv 1512.03385) consist of torchvision's blocks, with its parameter names, for images of any size. All
models of torchvision and timm are available as `torchvision:resnet50` or `timm:resnet50`, with `model.norm`.
"""

from __future__ import annotations

import logging
from collections import OrderedDict
from collections.abc import Callable, Collection, Iterator, Mapping, Sequence
from contextlib import contextmanager
from functools import partial
from itertools import pairwise
from traceback import walk_tb
from typing import Any, Literal

import torch
from torch import Tensor, nn
from torch.nn import functional
from torch.nn.modules.conv import _ConvNd
from torch.nn.parameter import is_lazy
from torch.nn.utils.parametrizations import _WeightNorm
from torch.nn.utils.weight_norm import WeightNorm

from dist_train.config import Config, ImageFormat
from dist_train.config.plugins import call_plugin, failing_clearly
from dist_train.models.norms import (
    VECTOR_GROUP,
    NormFactory,
    check_norms,
    collect_statistics,
    norm_factory,
    norm_modules,
    norm_parameters,
    replace_batch_norms,
    restoring_buffers,
    restoring_parameters,
)
from dist_train.outcome import PluginResultError, UsageError, did_you_mean
from dist_train.reproducible import generator, key, seed_generators, seeded_generators

_logger = logging.getLogger("dist_train.models")
_MAX_NAMES = 3  # of buffers or parameters in a message
_NEAR = 1e-3  # to 1, for a sum of probabilities, also in 16 bits

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
    """Return VGG, with one linear layer after the `hidden` one, if any, instead of three with dropout as published."""
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
    # torch's layers draw initial values, which are overwritten, and what a plug-in keeps may be random, too
    with seeded_generators(key(config.run.seed, "model")):
        model = _network(config)
    initialize(model, config.run.seed)
    return model


def runs_sequentials_whole(name: str) -> bool:
    """Whether the model `name` runs each `nn.Sequential` as a whole, as `join_relus` requires: ours, and torchvision's.

    The code of a plug-in or another library may as well take layers out of one, slice it or add hooks to its layers.
    """
    return name in _MODELS or name.startswith("torchvision:")


def _network(config: Config) -> nn.Module:
    settings, images = config.model, config.data.image_format
    norm = norm_factory(settings)
    if settings.name in _MODELS:
        return _MODELS[settings.name](images, settings.width, norm)
    model: nn.Module = call_plugin(settings.name, settings.options, nn.Module, images, settings.width, norm)
    if isinstance(model, torch.jit.ScriptModule):
        raise PluginResultError(f"{settings.name} returned a module of TorchScript: return that of which it was made")
    _check_buffers(model, settings.name)
    blank = _blank(config)
    with failing_clearly(settings.name), _noting_layer(model):
        model.train()  # not to be chained: a method `train` of the model's own may return nothing
        with torch.enable_grad(), restoring_buffers(model):
            outputs = {" in training": model(blank)}
        model.eval()
        # Last: a model that stores activations could not be copied with those of a graph.
        with torch.no_grad():
            outputs[""] = model(blank)
        model.train()
    if blank._version:
        raise PluginResultError(
            f"{settings.name} changes its input in place, though an update may use it several times: write for example "
            f"x = x - mean, not x.sub_(mean)"
        )
    for mode, logits in outputs.items():
        is_tensor = isinstance(logits, Tensor)
        if not is_tensor or logits.shape != (_TRIAL_SAMPLES, images.classes) or not logits.is_floating_point():
            form = f"{logits.dtype} of {list(logits.shape)}" if is_tensor else type(logits).__name__
            raise PluginResultError(
                f"{settings.name} gives {form}, not real logits of [2, {images.classes}], for 2 images{mode}"
            )
    _check_registered(model, settings.name, outputs[" in training"])
    _check_trainable(model, settings.name)
    if not outputs[" in training"].requires_grad:
        raise PluginResultError(f"the logits of {settings.name} depend on no parameter that is trained")
    return model


@contextmanager
def _noting_layer(model: nn.Module) -> Iterator[None]:
    """Note in an error the layer of `model` that raised it: one of torch's has no line in the plug-in's file."""
    try:
        yield
    except Exception as error:
        error.add_note("(given two images of zeros)")
        names = {layer: name for name, layer in model.named_modules() if name}
        callers = [frame.f_locals.get("self") for frame, _ in walk_tb(error.__traceback__)]
        layers = [each for each in callers if isinstance(each, nn.Module) and each in names]
        for layer in layers[-1:]:
            error.add_note(f"(in its layer {names[layer]}, {type(layer).__name__})")
        raise


_TRIAL_SAMPLES = 2


def _blank(config: Config, samples: int = _TRIAL_SAMPLES) -> Tensor:
    """Return blank images in the layout of training, in which for example Tensor.view may fail."""
    layout = torch.channels_last if config.precision.channels_last else torch.contiguous_format
    return torch.zeros(samples, *config.data.image_format.shape).to(memory_format=layout)


def check_training(model: nn.Module, config: Config) -> None:
    """Try a plug-in's `model` in training; warn of what would depend on ranks, buffers and draws of its own, and of
    parameters without a gradient.

    The model stays as it was. Raises UsageError if a gradient is sparse or arrives in parts, if what checkpoints hold
    depends on the number of images, or if norms whose statistics are to be recomputed are not used in evaluations.
    """
    name = config.model.name
    if name in _MODELS:
        return
    images = _blank(config)
    seed = key(config.run.seed, "model")
    with seeded_generators(seed), failing_clearly(name):
        more = _blank(config, 2 * _TRIAL_SAMPLES)
        # Of blank images dropout leaves no trace; these have values of 0 and 1 where a model counts in 255 steps.
        more.uniform_(0.0, 1 / 255, generator=generator(config.run.seed, "trial images"))
        shapes = {path: value.shape for path, value in model.state_dict().items()}
        with restoring_buffers(model) as changed, restoring_parameters(model) as moved:
            model.train()
            logits = model(more)
            _check_shapes(model, name, shapes)
            unreached = _check_gradients(model, name, logits)
        with restoring_buffers(model), restoring_parameters(model):
            seed_generators(seed)
            is_repeatable = torch.allclose(model(more), logits, rtol=0.0, atol=0.0, equal_nan=True)
        with restoring_buffers(model), restoring_parameters(model) as moved_at_rest, torch.no_grad():
            model.eval()
            evaluated = model(more)
            _check_shapes(model, name, shapes)
            _check_single(model, name, config.data.image_format.classes, images[:1])
        for norm in norm_modules(model):
            norm.seen.clear()
        if config.recomputes_statistics:
            collect_statistics(model)
            with torch.no_grad():
                model(images)
            check_norms(model, name, " of an evaluation", samples=_TRIAL_SAMPLES)
        model.train()
    trained = {path for path, parameter in model.named_parameters() if parameter.requires_grad}
    for path in filter(trained.__contains__, (*moved, *moved_at_rest)):
        raise PluginResultError(
            f"{name} changes its parameter {path} in a forward pass, as by max_norm or .data: ranks would differ, "
            f"and averages and noise miss it; compute with a changed copy, such as functional.normalize(weight)"
        )
    modes = [mode for mode, given in (("", logits), (" in evaluations", evaluated)) if _are_probabilities(given)]
    for mode in modes[:1]:
        _logger.warning("%s seems to end in softmax%s: leave it out, since cross entropy contains it", name, mode)
    if unreached:
        _logger.warning(
            f"in a trial pass of {name} {len(unreached)} of its parameters ({', '.join(unreached[:_MAX_NAMES])}) get "
            f"no gradient: use them in the forward pass, or freeze them by requires_grad_(False)"
        )
    if not is_repeatable:
        _logger.warning(
            f"a pass of {name} in training, repeated from the same seed, gives other logits: it draws from a generator "
            f"of its own, or keeps something outside of its buffers, so that results depend on the number of ranks, "
            f"and those of a resumed run differ; draw from the global generators, which are seeded for each micro-batch"
        )
    if changed or moved:
        _logger.warning(
            f"{name} changes {'frozen parameters' if moved else 'buffers'} in training "
            f"({', '.join((moved or changed)[:_MAX_NAMES])}), on each rank by its own samples: "
            f"results depend on the number of ranks, and model.norm_statistics does not apply to them; build norms by "
            f"norm(channels)"
        )


def _are_probabilities(logits: Tensor) -> bool:
    return bool((logits >= 0).all()) and bool((logits.float().sum(1) - 1).abs().max() < _NEAR)


def _check_single(model: nn.Module, name: str, classes: int, image: Tensor) -> None:
    """Raise UsageError unless a plug-in's `model` takes one `image`, as the last batch of an evaluation may be."""
    try:
        logits = model(image)
    except Exception as error:
        error.add_note("(given a single image)")
        raise
    if logits.shape != (1, classes):
        raise PluginResultError(
            f"{name} gives logits of {list(logits.shape)}, not [1, {classes}], for a single image: write x.flatten(1) "
            f"instead of x.squeeze()"
        )


def _check_shapes(model: nn.Module, name: str, before: Mapping[str, torch.Size]) -> None:
    """Raise UsageError if a pass over more images has changed shapes of the state dict, of which a checkpoint is."""
    for path, value in model.state_dict().items():
        if value.shape != before.get(path, value.shape):
            raise PluginResultError(
                f"the shape of the buffer {path} of {name} depends on the number of images, so no checkpoint would fit "
                f"the model: register it with persistent=False, or make it a plain attribute"
            )


def _check_gradients(model: nn.Module, name: str, logits: Tensor) -> list[str]:
    """Return the trained parameters that the backward pass from `logits` does not reach.

    Raises UsageError if it completes a gradient more than once, or makes it sparse.
    """
    arrived: set[str] = set()

    def note(path: str, parameter: nn.Parameter) -> None:
        assert parameter.grad is not None
        problem = "arrives in parts: call checkpoint(..., use_reentrant=False)" if path in arrived else ""
        if parameter.grad.layout != torch.strided:
            problem = "is sparse: set sparse=False"
        if problem:
            raise PluginResultError(f"the gradient of {path} of {name} {problem}")
        arrived.add(path)
        parameter.grad = None

    trained = [(path, parameter) for path, parameter in model.named_parameters() if parameter.requires_grad]
    hooks = [parameter.register_post_accumulate_grad_hook(partial(note, path)) for path, parameter in trained]
    try:
        torch.autograd.backward(logits.sum())
    finally:
        for hook in hooks:
            hook.remove()
    return [path for path, _ in trained if path not in arrived]


def _check_registered(model: nn.Module, name: str, logits: Tensor) -> None:
    """Raise UsageError if `logits` depend on a trained parameter that a plug-in's `model` does not know."""
    known, seen, nodes = set(map(id, model.parameters())), set[Any](), [logits.grad_fn]
    while nodes:
        if (node := nodes.pop()) is None or node in seen:
            continue
        seen.add(node)
        leaf = getattr(node, "variable", None)
        if isinstance(leaf, nn.Parameter) and id(leaf) not in known:
            raise PluginResultError(
                f"{name} computes with a parameter of {list(leaf.shape)} that is not registered in it, and would be "
                f"neither trained nor saved: keep layers in nn.ModuleList or nn.ModuleDict, not in a list or dict"
            )
        nodes += [each for each, _ in node.next_functions]


def _check_trainable(model: nn.Module, name: str) -> None:
    """Raise UsageError if a plug-in's `model`, after a forward pass in training, cannot be trained reproducibly."""
    if not any(parameter.requires_grad for parameter in model.parameters()):
        raise PluginResultError(f"{name} has no parameter to train")
    for path, parameter in model.named_parameters():
        if not parameter.numel() or (parameter.requires_grad and parameter.dtype != torch.float32):
            raise PluginResultError(
                f"the parameter {path} of {name} is {str(parameter.dtype).removeprefix('torch.')} of "
                f"{list(parameter.shape)}: what is trained is float32, and nothing is empty"
            )
    with failing_clearly(name):
        saved = model.state_dict().keys()
    if missing := [path for path, _ in model.named_parameters(remove_duplicate=False) if path not in saved]:
        raise PluginResultError(
            f"the state dict of {name} has no {missing[0]}, so a checkpoint could not restore it: remove the hook, or "
            f"the method state_dict, that leaves it out"
        )
    for path, module in model.named_modules():
        if type(module).get_extra_state is not nn.Module.get_extra_state:
            raise PluginResultError(
                f"{name} has a state outside its tensors ({path or 'itself'}, {type(module).__name__}, has "
                f"get_extra_state): ranks and checkpoints share parameters and buffers; register it as a buffer"
            )
    check_norms(model, name, "", samples=_TRIAL_SAMPLES)


def _check_buffers(model: nn.Module, name: str) -> None:
    """Raise UsageError if a buffer of a plug-in's `model` cannot be overwritten, as by a checkpoint."""
    for path, buffer in model.named_buffers():
        form = ""
        if buffer.layout != torch.strided:
            form = "sparse: register its .to_dense()"
        elif not is_lazy(buffer) and any(n > 1 > step for n, step in zip(buffer.shape, buffer.stride(), strict=True)):
            form = "expanded, one value for many elements: register its .contiguous()"
        if form:
            raise PluginResultError(f"the buffer {path} of {name} is {form}")


def initialize(model: nn.Module, seed: int) -> None:
    """Initialize weights after He et al. (arXiv 1502.01852), biases to 0, norms to the identity.

    Each parameter has its own random stream, drawn on the CPU, so that the device does not matter. Frozen parameters,
    gains, such as layer scales, and an embedding's row for padding keep the values with which the model was built.
    """
    of_norms = norm_parameters(model)
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if not parameter.requires_grad:
                continue
            owner = model.get_submodule(name.rpartition(".")[0])
            if name in of_norms:
                parameter.fill_(1.0 if name.endswith("weight") else 0.0)
            elif parameter.dim() < 2 and "bias" in name.rpartition(".")[2]:
                parameter.zero_()
            elif parameter.dim() >= 2 and not _is_gain(parameter, owner):
                fan_in = parameter[0].numel()
                sample = torch.empty(parameter.shape).normal_(generator=generator(seed, "initial weights", name))
                sample.mul_((2.0 / fan_in) ** 0.5)
                if isinstance(owner, nn.Embedding | nn.EmbeddingBag) and (row := owner.padding_idx) is not None:
                    sample[row] = parameter[row]  # zeros: torch does not train it
                parameter.copy_(sample)
        for module in model.modules():
            for parts in getattr(module, "parametrizations", {}).values():
                # Of weight_norm: with the norm of the direction as its gain, the weight is the direction as drawn.
                if isinstance(parts[0], _WeightNorm) and parts.original0.requires_grad:
                    parts.original0.copy_(torch.norm_except_dim(parts.original1, 2, parts[0].dim))
            for hook in module._forward_pre_hooks.values():
                if isinstance(hook, WeightNorm):  # torch's older function of that name
                    gain, direction = (getattr(module, f"{hook.name}_{part}") for part in "gv")
                    if gain.requires_grad:
                        gain.copy_(torch.norm_except_dim(direction, 2, hook.dim))


def _is_gain(parameter: Tensor, module: nn.Module) -> bool:
    """Whether all of several elements are equal, and not 0: weights that are to be random would differ.

    A single element is a gain unless it is of a linear layer or a convolution.
    """
    if parameter.numel() == 1:
        return not isinstance(module, nn.Linear | _ConvNd)
    return bool(parameter.all()) and bool((parameter == parameter.flatten()[0]).all())


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
        _refuse_weights(f"torchvision:{name}", options, "weights", "weights_backbone")
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
            f"{name}: weights loaded by model.options.{found[0]} would be overwritten by initial weights of the seed; "
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
