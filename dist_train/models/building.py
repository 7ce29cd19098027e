"""From a configuration to an initialized network."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from types import MappingProxyType

import torch
from torch import nn

from dist_train.config import Config, ImageFormat
from dist_train.models.initialization import initialize
from dist_train.models.norms import NormFactory, norm_factory
from dist_train.models.resnet import resnet18, resnet50
from dist_train.models.vgg import vgg9, vgg16, vgg19

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
