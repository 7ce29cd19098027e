"""Rows of evaluating a whole split, against plain PyTorch with a DataLoader and with images in memory."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass

import torch
from torch import Tensor

from benchmarks.plain_evaluation import in_memory, through_loader
from benchmarks.subject import settings
from benchmarks.timing import Ratio, compare
from dist_train.cluster.communicator import SingleProcess
from dist_train.cluster.devices import choose_device
from dist_train.data.augmentation import PixelFormat
from dist_train.data.images import ImageSet
from dist_train.data.loader import Samples
from dist_train.models import build_model
from dist_train.training.compute import set_up_compute
from dist_train.training.evaluation import evaluate

_IMAGES = {0.25: 10_000, 1.0: 2_000}


@dataclass(frozen=True)
class Subject:
    """VGG9 of `width` and random images, uint8 [n, 3, 32, 32]; `batch_size` of a pass is our default."""

    width: float
    images: Tensor
    labels: Tensor
    batch_size: int = 500


def make_subject(width: float, count: int) -> Subject:
    """Return `count` images for VGG9 of `width`."""
    source = torch.Generator().manual_seed(1)
    images = torch.randint(256, (count, 3, 32, 32), dtype=torch.uint8, generator=source)
    return Subject(width, images, torch.randint(10, (count,), generator=source))


def rows(pairs: int) -> Iterator[Ratio]:
    """Yield the rows for both widths."""
    for width, count in _IMAGES.items():
        yield from rows_of(make_subject(width, count), pairs)


def rows_of(subject: Subject, pairs: int) -> Iterator[Ratio]:
    """Yield our time over each plain evaluation's, with the same network and images."""
    config = settings(subject.width, 128)
    compute = set_up_compute(config.precision, choose_device(config.run.device, local_rank=0))
    model = build_model(config).to(compute.device)
    pixels = PixelFormat(memory_format=torch.channels_last)
    samples = Samples(ImageSet(subject.images, subject.labels, 10), compute.device, pixels=pixels)
    count = len(subject.images)

    def ours() -> None:
        evaluate(model, samples, count, batch_size=subject.batch_size, compute=compute, comm=SingleProcess())

    there = subject.images.to(compute.device), subject.labels.to(compute.device)
    loader = through_loader(model, subject.images, subject.labels, batch_size=subject.batch_size)
    memory = in_memory(model, *there, batch_size=subject.batch_size)
    for name, theirs, bar in (("DataLoader", loader, 1.0), ("bare loop in memory", memory, 1 / 0.97)):
        yield compare(
            f"evaluation, {count:,} images, width {subject.width:g}",
            ("dist-train", ours),
            (name, theirs),
            pairs=pairs,
            bar=bar,
            warm_up=1,
            images=count,
        )
