"""Synthetic Fashion-MNIST files, compressed as downloaded, and uncompressed as torchvision reads them."""

from __future__ import annotations

import gzip
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy
from numpy.typing import NDArray

from dist_train.data.catalog import make_synthetic
from dist_train.data.images import Split
from dist_train.data.published import FASHION_MNIST_CLASSES

_STEMS: dict[Split, str] = {"train": "train", "test": "t10k"}


def write_packed(folder: Path, split: Split, count: int) -> None:
    """Write the two compressed files of `split` with `count` images into `folder`."""
    for name, content in _contents(split, count):
        (folder / f"{name}.gz").write_bytes(gzip.compress(content, 1))


def write_unpacked(folder: Path, split: Split, count: int) -> None:
    """Write the same files, uncompressed, into `folder`."""
    for name, content in _contents(split, count):
        (folder / name).write_bytes(content)


def _contents(split: Split, count: int) -> Iterator[tuple[str, bytes]]:
    data = make_synthetic((1, 28, 28), FASHION_MNIST_CLASSES, count, split, 0)
    stem = _STEMS[split]
    yield f"{stem}-images-idx3-ubyte", _idx(data.images[:, 0].numpy())
    yield f"{stem}-labels-idx1-ubyte", _idx(data.labels.numpy().astype(numpy.uint8))


def _idx(array: NDArray[Any]) -> bytes:
    """Return the IDX file of an array of unsigned bytes."""
    return bytes((0, 0, 8, array.ndim)) + numpy.array(array.shape, dtype=">u4").tobytes() + array.tobytes()
