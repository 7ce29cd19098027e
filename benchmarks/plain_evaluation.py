"""Evaluations in plain PyTorch: with a DataLoader, and with images in memory, which is the limit."""

from __future__ import annotations

from collections.abc import Callable, Iterable

import torch
from torch import Tensor, nn
from torch.nn import functional
from torch.utils.data import DataLoader, Dataset

Evaluate = Callable[[], tuple[float, float]]
"""Returns the mean loss and the accuracy."""


class Images(Dataset[tuple[Tensor, int]]):
    """Images as torchvision's data sets return them: one by one, as floats in [0, 1]."""

    def __init__(self, images: Tensor, labels: Tensor) -> None:
        """Hold uint8 `images` [n, C, H, W] and their `labels` [n]."""
        self._images = images
        self._labels = labels

    def __len__(self) -> int:
        """Return the number of images."""
        return len(self._images)

    def __getitem__(self, index: int) -> tuple[Tensor, int]:
        """Return an image and its label."""
        return self._images[index].to(torch.float32).div(255), int(self._labels[index])


def through_loader(model: nn.Module, images: Tensor, labels: Tensor, *, batch_size: int) -> Evaluate:
    """Return an evaluation as in PyTorch's examples."""
    loader = DataLoader(Images(images, labels), batch_size=batch_size)
    return lambda: _evaluate(model, loader)


def in_memory(model: nn.Module, images: Tensor, labels: Tensor, *, batch_size: int) -> Evaluate:
    """Return an evaluation of uint8 images on the model's device, the limit."""

    def batches() -> Iterable[tuple[Tensor, Tensor]]:
        for inputs, targets in zip(images.split(batch_size), labels.split(batch_size), strict=True):
            yield inputs.to(torch.float32).div_(255), targets

    return lambda: _evaluate(model, batches())


def _evaluate(model: nn.Module, batches: Iterable[tuple[Tensor, Tensor]]) -> tuple[float, float]:
    device = next(model.parameters()).device
    model.eval()
    loss, correct, samples = 0.0, 0, 0
    with torch.no_grad():
        for inputs, targets in batches:
            there = targets.to(device)
            outputs = model(inputs.to(device))
            loss += functional.cross_entropy(outputs, there, reduction="sum").item()
            correct += int((outputs.argmax(dim=1) == there).sum())
            samples += len(targets)
    return loss / samples, correct / samples
