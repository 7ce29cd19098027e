"""PyTorch's DistributedDataParallel over Gloo, started by torchrun; gradients are accumulated under `no_sync`."""

from __future__ import annotations

from contextlib import nullcontext

import torch
import torch.distributed as dist
from torch.nn import functional
from torch.nn.parallel import DistributedDataParallel

from benchmarks.peers.work import Clock, Work, images_and_labels, sgd, vgg9, work_from_arguments


def train(work: Work) -> None:
    """Make the updates on this rank's share of each batch, data in memory."""
    images, labels = images_and_labels(work.samples)
    model = DistributedDataParallel(vgg9(work.width))
    optimizer = sgd(model)
    clock = Clock(work)
    share = work.batch // work.ranks
    shuffle = torch.Generator().manual_seed(1)
    while True:
        order = torch.randperm(len(images), generator=shuffle)
        for start in range(0, len(images) - work.batch + 1, work.batch):
            begin = start + dist.get_rank() * share
            optimizer.zero_grad()
            for number, chosen in enumerate(order[begin : begin + share].split(work.micro_batch), start=1):
                inputs = images[chosen].to(torch.float32).div_(255)
                with nullcontext() if number == work.passes else model.no_sync():
                    (functional.cross_entropy(model(inputs), labels[chosen]) / work.passes).backward()
            optimizer.step()
            if clock.update_ended():
                return clock.report() if dist.get_rank() == 0 else None


if __name__ == "__main__":
    asked = work_from_arguments()
    dist.init_process_group("gloo")
    train(asked)
    dist.destroy_process_group()
