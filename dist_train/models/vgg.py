"""VGG: VGG9 as Li et al. use it (arXiv 1712.09913), VGG16 and VGG19 (arXiv 1409.1556) for small images."""

from __future__ import annotations

from collections import OrderedDict
from collections.abc import Sequence

from torch import nn

from dist_train.config import ImageFormat
from dist_train.models.norms import VECTOR_GROUP, NormFactory

_POOL = None
_VGG9 = (64, 64, _POOL, 128, 128, _POOL, 256, 256, 256, _POOL)
_VGG16 = (64, 64, _POOL, 128, 128, _POOL, *(256,) * 3, _POOL, *(512,) * 3, _POOL, *(512,) * 3, _POOL)
_VGG19 = (64, 64, _POOL, 128, 128, _POOL, *(256,) * 4, _POOL, *(512,) * 4, _POOL, *(512,) * 4, _POOL)
_HIDDEN = 256


def vgg9(images: ImageFormat, width: float, norm: NormFactory) -> nn.Module:
    """Return VGG9 for images of `images`, its channels scaled by `width`: 2,789,706 parameters at 3x32x32.

    Takes [n, C, H, W], gives [n, classes].
    """
    layers, features = _body(_VGG9, images, width, norm)
    hidden = max(1, round(_HIDDEN * width))
    layers["hidden"] = nn.Linear(features, hidden)
    layers["hidden_norm"] = norm(hidden, least=VECTOR_GROUP)
    layers["hidden_relu"] = nn.ReLU(inplace=True)
    layers["classifier"] = nn.Linear(hidden, images.classes)
    return nn.Sequential(layers)


def vgg16(images: ImageFormat, width: float, norm: NormFactory) -> nn.Module:
    """Return VGG16, configuration D, with one linear layer on top: 14,728,266 parameters at 3x32x32.

    Takes [n, C, H, W], gives [n, classes].
    """
    return _with_classifier(_VGG16, images, width, norm)


def vgg19(images: ImageFormat, width: float, norm: NormFactory) -> nn.Module:
    """Return VGG19, configuration E, with one linear layer on top: 20,040,522 parameters at 3x32x32.

    Takes [n, C, H, W], gives [n, classes].
    """
    return _with_classifier(_VGG19, images, width, norm)


def _with_classifier(plan: Sequence[int | None], images: ImageFormat, width: float, norm: NormFactory) -> nn.Module:
    # The published hidden layers need dropout, whose draws would depend on how samples are dealt out.
    layers, features = _body(plan, images, width, norm)
    layers["classifier"] = nn.Linear(features, images.classes)
    return nn.Sequential(layers)


def _body(
    plan: Sequence[int | None], images: ImageFormat, width: float, norm: NormFactory
) -> tuple[OrderedDict[str, nn.Module], int]:
    """Return the convolutions of `plan`, flattened, and how many features they give."""
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
    return layers, channels * height * breadth
