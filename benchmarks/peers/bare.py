"""Plain PyTorch on data in memory, one rank: the limit."""

from __future__ import annotations

import torch
from torch.nn import functional

from benchmarks.peers.work import Clock, Work, images_and_labels, sgd, vgg9, work_from_arguments


def train(work: Work) -> None:
    """Make the updates."""
    images, labels = images_and_labels(work.samples)
    model = vgg9(work.width)
    optimizer = sgd(model)
    clock = Clock(work)
    while True:
        order = torch.randperm(len(images))
        for start in range(0, len(images) - work.batch + 1, work.batch):
            optimizer.zero_grad()
            for chosen in order[start : start + work.batch].split(work.micro_batch):
                inputs = images[chosen].to(torch.float32).div_(255)
                (functional.cross_entropy(model(inputs), labels[chosen]) / work.passes).backward()
            optimizer.step()
            if clock.update_ended():
                return clock.report()


if __name__ == "__main__":
    train(work_from_arguments())
