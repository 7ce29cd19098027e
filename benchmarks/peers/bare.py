"""Plain PyTorch on data in memory, one rank: the limit. `noisy.py` adds SmoothOut as its reference does."""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import nn
from torch.nn import functional

from benchmarks.peers.work import Clock, Work, images_and_labels, sgd, vgg9, work_from_arguments


def train(work: Work, perturb: Callable[[nn.Module], Callable[[], None]]) -> None:
    """Make the updates; `perturb` perturbs the weights before an update's passes and returns what restores them."""
    images, labels = images_and_labels(work.samples)
    model = vgg9(work.width)
    optimizer = sgd(model)
    clock = Clock(work)
    while True:
        order = torch.randperm(len(images))
        for start in range(0, len(images) - work.batch + 1, work.batch):
            optimizer.zero_grad()
            restore = perturb(model)
            for chosen in order[start : start + work.batch].split(work.micro_batch):
                inputs = images[chosen].to(torch.float32).div_(255)
                (functional.cross_entropy(model(inputs), labels[chosen]) / work.passes).backward()
            restore()
            optimizer.step()
            if clock.update_ended():
                return clock.report()


def without_noise(model: nn.Module) -> Callable[[], None]:
    """Train without noise."""
    return lambda: None


if __name__ == "__main__":
    train(work_from_arguments(), without_noise)
