"""Rows of data preparation: Fashion-MNIST's files, first decoded and cached, later mapped from the cache.

They are compared with torchvision, which reads its unpacked files every time and verifies nothing. The images are
synthetic.
"""

from __future__ import annotations

import shutil
import tempfile
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

from torchvision.datasets import FashionMNIST

from benchmarks.idx_files import write_packed, write_unpacked
from benchmarks.timing import Ratio, ratio_of, timed
from dist_train.data.cache import Source, decoded_once
from dist_train.data.images import ImageSet
from dist_train.data.published import (
    FASHION_MNIST_CLASSES,
    FASHION_MNIST_VERSION,
    decode_fashion_mnist,
    find_fashion_mnist,
)

_IMAGES = 60_000


@dataclass(frozen=True)
class Files:
    """A training set on disk: as downloaded, unpacked for torchvision, and our cache folder."""

    packed: tuple[Path, Path]
    unpacked: Path
    cache: Path


def rows(pairs: int) -> Iterator[Ratio]:
    """Yield the rows."""
    with tempfile.TemporaryDirectory() as folder:
        yield from rows_of(write_files(Path(folder), _IMAGES), _IMAGES, pairs)


def rows_of(files: Files, count: int, pairs: int) -> Iterator[Ratio]:
    """Yield the rows of `files`, which hold `count` images; the first round is a warm-up."""
    first, later, theirs = [], [], []
    for _ in range(pairs + 1):
        shutil.rmtree(files.cache, ignore_errors=True)
        first.append(timed(lambda: prepare(files)))
        later.append(timed(lambda: prepare(files)))
        theirs.append(timed(lambda: read_by_torchvision(files)))
    title = f"data, {count:,} images of 28x28"
    for row, ours, other, seconds, bar in (
        (f"{title}, first", "decoded and cached", "torchvision, unpacked files", (first, theirs), None),
        (f"{title}, later", "verified and mapped", "torchvision, unpacked files", (later, theirs), None),
        (f"{title}, later", "verified and mapped", "decoded and cached", (later, first), 1.0),
    ):
        yield ratio_of(row, ours, other, list(zip(seconds[0][1:], seconds[1][1:], strict=True)), bar, images=count)


def write_files(folder: Path, count: int) -> Files:
    """Write `count` synthetic images and their labels into `folder`, in both forms."""
    write_packed(folder, "train", count)
    raw = folder / "FashionMNIST" / "raw"
    raw.mkdir(parents=True)
    write_unpacked(raw, "train", count)
    write_unpacked(raw, "test", 1)  # torchvision only checks that it exists
    return Files(find_fashion_mnist(folder, "train"), folder, folder / "cache")


def prepare(files: Files) -> ImageSet:
    """Return the images as a run does: from the cache, which is filled if necessary."""
    source = Source("fashion-mnist", "train", FASHION_MNIST_VERSION, files.packed, FASHION_MNIST_CLASSES)
    return decoded_once(files.cache, source, lambda: decode_fashion_mnist(files.packed))


def read_by_torchvision(files: Files) -> FashionMNIST:
    """Return torchvision's data set of the same images."""
    return FashionMNIST(str(files.unpacked), train=True)
