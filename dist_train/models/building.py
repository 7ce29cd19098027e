"""From a configuration to an initialized network; initial weights depend on the seed and the name alone."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from types import MappingProxyType

import torch
from torch import nn

from dist_train.config import Config, ImageFormat
from dist_train.models.norms import NormFactory, norm_factory, norm_parameters
from dist_train.models.resnet import resnet18, resnet50
from dist_train.models.vgg import vgg9, vgg16, vgg19
from dist_train.randomness import generator

_MODELS: Mapping[str, Callable[[ImageFormat, float, NormFactory], nn.Module]] = MappingProxyType(
    {"vgg9": vgg9, "vgg16": vgg16, "vgg19": vgg19, "resnet18": resnet18, "resnet50": resnet50}
)


def build_model(config: Config) -> nn.Module:
    """Return the network of `config` on the CPU, its weights initialized from `run.seed`.

    Takes images [n, C, H, W] of the configured data set, gives logits [n, classes].
    """
    settings = config.model
    # Torch's layers draw initial values of their own, which are overwritten: leave no trace of that.
    with torch.random.fork_rng(devices=()):
        model = _MODELS[settings.name](config.data.image_format, settings.width, norm_factory(settings))
    initialize(model, config.run.seed)
    return model


def initialize(model: nn.Module, seed: int) -> None:
    """Set weights after He et al. (arXiv 1502.01852), biases to 0, norms to the identity.

    Each parameter has its own stream, drawn on the CPU, so that the device does not matter.
    """
    of_norms = norm_parameters(model)
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if name in of_norms:
                parameter.fill_(1.0 if name.endswith("weight") else 0.0)
            elif parameter.dim() < 2:
                parameter.zero_()
            else:
                fan_in = parameter[0].numel()
                sample = torch.empty(parameter.shape).normal_(generator=generator(seed, "initial weights", name))
                parameter.copy_(sample.mul_((2.0 / fan_in) ** 0.5))
