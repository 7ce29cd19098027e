"""Residual networks (arXiv 1512.03385) of torchvision's blocks, with its parameter names, for images of any size."""

from __future__ import annotations

from collections import OrderedDict
from collections.abc import Callable, Sequence
from itertools import pairwise

from torch import Tensor, nn
from torch.nn import functional

from dist_train.config import ImageFormat
from dist_train.models.norms import NormFactory

_STAGES = (64, 128, 256, 512)
_SMALL = 64
"""Images of up to so many pixels a side keep their size through the stem, as is usual for CIFAR."""

_FEWEST_CHANNELS = 8
"""With fewer, torch 2.13's backward pass of a strided 1x1 convolution in channels-last layout corrupts the heap."""


class _StridedPointwise(nn.Conv2d):
    """A 1x1 convolution that leaves out pixels before it computes, instead of computing with a stride."""

    def forward(self, input: Tensor) -> Tensor:
        rows, columns = self.stride
        return functional.conv2d(input[:, :, ::rows, ::columns], self.weight)


def resnet18(images: ImageFormat, width: float, norm: NormFactory) -> nn.Module:
    """Return ResNet-18, its channels scaled by `width`: 11,173,962 parameters at 3x32x32.

    Takes [n, C, H, W], gives [n, classes].
    """
    from torchvision.models.resnet import BasicBlock

    return _resnet(BasicBlock, BasicBlock.expansion, (2, 2, 2, 2), images, width, norm)


def resnet50(images: ImageFormat, width: float, norm: NormFactory) -> nn.Module:
    """Return ResNet-50, its channels scaled by `width`: 23,520,842 parameters at 3x32x32.

    Takes [n, C, H, W], gives [n, classes].
    """
    from torchvision.models.resnet import Bottleneck

    return _resnet(Bottleneck, Bottleneck.expansion, (3, 4, 6, 3), images, width, norm)


def _resnet(
    block: Callable[..., nn.Module],
    expansion: int,
    depths: Sequence[int],
    images: ImageFormat,
    width: float,
    norm: NormFactory,
) -> nn.Module:
    planes = [max(1, round(channels * width)) for channels in _STAGES]
    layers = _stem(images, planes[0], norm)
    inputs = [planes[0], *(channels * expansion for channels in planes)]
    for stage, ((channels, outputs), depth) in enumerate(zip(pairwise(inputs), depths, strict=True), start=1):
        stride = 1 if stage == 1 else 2
        shortcut = None
        if stride > 1 or channels != outputs:
            pointwise = nn.Conv2d if channels >= _FEWEST_CHANNELS else _StridedPointwise
            shortcut = nn.Sequential(pointwise(channels, outputs, 1, stride, bias=False), norm(outputs))
        first = block(channels, planes[stage - 1], stride, shortcut, norm_layer=norm)
        others = [block(outputs, planes[stage - 1], norm_layer=norm) for _ in range(depth - 1)]
        layers[f"layer{stage}"] = nn.Sequential(first, *others)
    layers["avgpool"] = nn.AdaptiveAvgPool2d(1)
    layers["flatten"] = nn.Flatten()
    layers["fc"] = nn.Linear(inputs[-1], images.classes)
    return nn.Sequential(layers)


def _stem(images: ImageFormat, outputs: int, norm: NormFactory) -> OrderedDict[str, nn.Module]:
    colours, height, breadth = images.shape
    layers: OrderedDict[str, nn.Module] = OrderedDict()
    if max(height, breadth) <= _SMALL:
        layers["conv1"] = nn.Conv2d(colours, outputs, 3, padding=1, bias=False)
    else:
        layers["conv1"] = nn.Conv2d(colours, outputs, 7, 2, padding=3, bias=False)
    layers["bn1"] = norm(outputs)
    layers["relu"] = nn.ReLU(inplace=True)
    if max(height, breadth) > _SMALL:
        layers["maxpool"] = nn.MaxPool2d(3, 2, padding=1)
    return layers
