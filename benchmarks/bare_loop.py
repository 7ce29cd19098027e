"""The limit: VGG9 and a training loop in plain PyTorch, with data in memory and nothing else."""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor, nn
from torch.nn import functional


def bare_vgg9(channels: int, classes: int, width: float) -> nn.Module:
    """Return VGG9 for 32x32 images, built from PyTorch's layers."""
    layers: list[nn.Module] = []
    for outputs in (64, 64, 0, 128, 128, 0, 256, 256, 256, 0):
        if outputs == 0:
            layers.append(nn.MaxPool2d(2, ceil_mode=True))
            continue
        scaled = round(outputs * width)
        layers += [nn.Conv2d(channels, scaled, 3, padding=1), nn.BatchNorm2d(scaled), nn.ReLU(inplace=True)]
        channels = scaled
    hidden = round(256 * width)
    layers += [nn.Flatten(), nn.Linear(channels * 16, hidden), nn.BatchNorm1d(hidden), nn.ReLU(inplace=True)]
    return nn.Sequential(*layers, nn.Linear(hidden, classes))


def bare_loop(
    images: Tensor, labels: Tensor, *, width: float, batch: int, channels_last: bool, precision: torch.dtype
) -> Callable[[], None]:
    """Return a function that makes one update on the next `batch` of shuffled samples, on the device of `images`."""
    device = images.device
    model = bare_vgg9(images.shape[1], 10, width).to(device)
    optimizer = torch.optim.SGD(model.parameters(), lr=0.01, momentum=0.9, nesterov=True)
    layout = torch.channels_last if channels_last else torch.contiguous_format
    order = torch.randperm(len(images), device=device)
    position = 0

    def update() -> None:
        nonlocal order, position
        if position + batch > len(images):
            order, position = torch.randperm(len(images), device=device), 0
        chosen = order[position : position + batch]
        position += batch
        inputs = images[chosen].to(torch.float32, memory_format=layout).div_(255)
        optimizer.zero_grad()
        with torch.autocast(device.type, dtype=precision, enabled=precision != torch.float32):
            logits = model(inputs)
        loss = functional.cross_entropy(logits.float(), labels[chosen])
        loss.backward()
        optimizer.step()

    return update
