"""Rows of a landscape's points: against a plain evaluation with a DataLoader, and on two ranks against one.

`mpirun -np 2 python -m benchmarks.landscape POINTS` prints the seconds of POINTS points.
"""

from __future__ import annotations

import os
import sys
import time
from collections.abc import Iterator, Sequence

import torch
from torch import Tensor, nn

from benchmarks.launching import measure, module, on_ranks, tell
from benchmarks.plain_evaluation import through_loader
from benchmarks.subject import settings
from benchmarks.timing import Ratio, compare, ratio_of
from dist_train.analysis.directions import random_direction
from dist_train.analysis.landscape_files import Point
from dist_train.analysis.landscape_points import Batch, PointEvaluator, Walk, along, axis, place_of
from dist_train.cluster.communicator import run_on_all_ranks
from dist_train.cluster.rendezvous import join_points
from dist_train.models import build_model
from dist_train.optim.flat_weights import FlatWeights
from dist_train.training.compute import Compute

_IMAGES = 10_000
_BATCH = 100


def rows(pairs: int) -> Iterator[Ratio]:
    """Yield the rows; a pair takes about 15 seconds."""
    yield dataloader_row(pairs)
    yield scaling_row(pairs)


def dataloader_row(pairs: int) -> Ratio:
    """Return the time of a point, 10,000 images, VGG9 width 0.25, over the plain evaluation's."""
    cores = len(os.sched_getaffinity(0))
    model, images, labels, walk = _subject()
    evaluator = PointEvaluator(
        model, [_batches(images, labels)], [], Compute(torch.device("cpu"), torch.float32), threads=cores
    )
    weights = FlatWeights(model)
    plain = through_loader(model, images, labels, batch_size=128)
    alphas = iter(axis(-1.0, 1.0, 2 * pairs + 5))

    def ours() -> None:
        torch.set_num_threads(1)
        evaluator.evaluate(walk(Point(0, next(alphas))))

    def theirs() -> None:
        torch.set_num_threads(cores)
        weights.values.copy_(walk(Point(0, next(alphas))).weights)
        plain()

    return compare(
        f"landscape, a point of 10,000 images, width 0.25, {cores} cores",
        ("in memory", ours),
        ("DataLoader", theirs),
        pairs=pairs,
        bar=0.5,
        warm_up=1,
        images=_IMAGES,
    )


def scaling_row(pairs: int) -> Ratio:
    """Return the time of eight points on two ranks over that on one, with one core per rank."""
    seconds = [(_launch(2, 8), _launch(1, 8)) for _ in range(max(2, pairs // 2))]
    return ratio_of("landscape, eight points, a core a rank", "2 ranks", "1 rank", seconds, 1 / 1.8)


def main() -> None:
    """Evaluate this rank's share of the points; rank 0 prints the seconds until all were done."""
    comm = join_points()
    torch.set_num_threads(1)
    model, images, labels, walk = _subject()
    data = _batches(images, labels)
    points = [Point(0, alpha) for alpha in axis(-1.0, 1.0, int(sys.argv[1]))]
    evaluator = PointEvaluator(model, [data], [], Compute(torch.device("cpu"), torch.float32))
    evaluator.evaluate(walk(points[0]))
    run_on_all_ranks(comm, lambda: None, "begin")
    started = time.perf_counter()
    for point in points[comm.rank :: comm.size]:
        evaluator.evaluate(walk(point))
    run_on_all_ranks(comm, lambda: None, "end")
    if comm.rank == 0:
        tell(time.perf_counter() - started)


def _subject() -> tuple[nn.Module, Tensor, Tensor, Walk]:
    """Return a network, random uint8 images and labels, and a walk along a direction."""
    config = settings(0.25, 128, data={"name": "fashion-mnist"})
    model = build_model(config)
    stream = torch.Generator().manual_seed(0)
    images = torch.randint(0, 256, (_IMAGES, *config.data.image_format.shape), generator=stream).to(torch.uint8)
    labels = torch.randint(0, 10, (_IMAGES,), generator=stream)
    origin = place_of(model)
    direction = random_direction(FlatWeights(model), "filter", ("norm", "bias"), 0, 0)
    return model, images, labels, along(origin, lambda _: (direction,))


def _batches(images: Tensor, labels: Tensor) -> Sequence[Batch]:
    inputs = images.to(torch.float32, memory_format=torch.channels_last).div_(255)
    return list(zip(inputs.split(_BATCH), labels.split(_BATCH), strict=True))


def _launch(ranks: int, points: int) -> float:
    return float(measure(on_ranks("mpi", ranks, module("benchmarks.landscape", points))))


if __name__ == "__main__":
    main()
