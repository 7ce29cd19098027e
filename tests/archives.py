"""Small data sets in the formats of the published ones."""

from __future__ import annotations

import gzip
import io
import struct
import tarfile
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

import numpy as np
from numpy.typing import NDArray

Bytes = NDArray[np.uint8]
Split = Literal["train", "test"]

_IDX_STEMS: dict[Split, str] = {"train": "train", "test": "t10k"}
_CIFAR10_BATCHES = {
    **{f"data_batch_{n}": f"training batch {n} of 5" for n in range(1, 6)},
    "test_batch": "testing",
}


@dataclass(frozen=True)
class Written:
    """The data of a written data set: images uint8 [n, C, H, W] and labels [n]."""

    images: Bytes
    labels: Bytes


def idx_bytes(array: Bytes) -> bytes:
    """Return the IDX file of an array of unsigned bytes."""
    return struct.pack(f">HBB{array.ndim}I", 0, 8, array.ndim, *array.shape) + array.tobytes()


def random_set(count: int, shape: tuple[int, int, int], classes: int, seed: int = 0) -> Written:
    """Return random images, with labels that cycle through the classes."""
    source = np.random.default_rng(seed)
    images = source.integers(0, 256, (count, *shape), dtype=np.uint8)
    return Written(images, (np.arange(count) % classes).astype(np.uint8))


def write_fashion_mnist(root: Path, split: Split = "train", count: int = 40, packed: bool = True) -> Written:
    """Write the two IDX files of `split` into `root`."""
    written = random_set(count, (1, 28, 28), 10)
    files = {"images-idx3-ubyte": written.images[:, 0], "labels-idx1-ubyte": written.labels}
    for name, array in files.items():
        path = root / f"{_IDX_STEMS[split]}-{name}"
        if packed:
            path.with_name(f"{path.name}.gz").write_bytes(gzip.compress(idx_bytes(array), 1))
        else:
            path.write_bytes(idx_bytes(array))
    return written


def cifar10_members(per_batch: int = 6) -> tuple[dict[str, bytes], Written, Written]:
    """Return the files of a small CIFAR-10 by name, and the contents of train and test."""
    train = random_set(5 * per_batch, (3, 32, 32), 10, seed=1)
    test = random_set(per_batch, (3, 32, 32), 10, seed=2)
    parts = [
        *(Written(train.images[n::5], train.labels[n::5]) for n in range(5)),
        test,
    ]
    ordered = Written(
        np.concatenate([part.images for part in parts[:5]]),
        np.concatenate([part.labels for part in parts[:5]]),
    )
    members = {
        name: python2_pickle(
            {
                "batch_label": label,
                "labels": [int(value) for value in part.labels],
                "data": part.images.reshape(per_batch, -1),
                "filenames": [f"picture_s_{n:06}.png" for n in range(per_batch)],
            }
        )
        for (name, label), part in zip(_CIFAR10_BATCHES.items(), parts, strict=True)
    }
    members["batches.meta"] = python2_pickle({"num_vis": 3072, "label_names": ["airplane", "automobile"]})
    return members, ordered, test


def cifar100_members(count: int = 100) -> tuple[dict[str, bytes], Written, Written]:
    """Return the files of a small CIFAR-100 by name, and the contents of train and test."""
    sets = random_set(count, (3, 32, 32), 100, seed=3), random_set(count, (3, 32, 32), 100, seed=4)
    members = {
        name: python2_pickle(
            {
                "filenames": [f"picture_s_{n:06}.png" for n in range(count)],
                "batch_label": name,
                "fine_labels": [int(value) for value in part.labels],
                "coarse_labels": [int(value) // 5 for value in part.labels],
                "data": part.images.reshape(count, -1),
            }
        )
        for name, part in zip(("train", "test"), sets, strict=True)
    }
    return members, *sets


def write_members(folder: Path, members: Mapping[str, bytes]) -> None:
    """Write the files into `folder`, as unpacking the archive would."""
    folder.mkdir(parents=True, exist_ok=True)
    for name, content in members.items():
        (folder / name).write_bytes(content)


def packed_members(folder: str, members: Mapping[str, bytes]) -> bytes:
    """Return the files as a tar.gz archive with the one folder `folder`."""
    buffer = io.BytesIO()
    with tarfile.open(fileobj=buffer, mode="w:gz", format=tarfile.GNU_FORMAT, compresslevel=1) as archive:
        directory = tarfile.TarInfo(folder)
        directory.type = tarfile.DIRTYPE
        archive.addfile(directory)
        for name, content in members.items():
            entry = tarfile.TarInfo(f"{folder}/{name}")
            entry.size = len(content)
            archive.addfile(entry, io.BytesIO(content))
    return buffer.getvalue()


def python2_pickle(record: Mapping[str, Any]) -> bytes:
    """Return a pickle as Python 2 wrote it with protocol 2, as in the published archives."""
    items = b"".join(_string(name) + _value(value) for name, value in record.items())
    return b"\x80\x02}(" + items + b"u."


def _value(value: object) -> bytes:
    match value:
        case str() | bytes():
            return _string(value)
        case int():
            return _integer(value)
        case list():
            return b"](" + b"".join(map(_value, value)) + b"e"
        case np.ndarray():
            return _array(value)
        case _:
            raise TypeError(type(value))


def _string(text: str | bytes) -> bytes:
    content = text.encode("latin1") if isinstance(text, str) else text
    if len(content) < 256:
        return b"U" + bytes([len(content)]) + content
    return b"T" + struct.pack("<i", len(content)) + content


def _integer(value: int) -> bytes:
    if 0 <= value < 256:
        return b"K" + bytes([value])
    return b"J" + struct.pack("<i", value)


def _array(array: NDArray[Any]) -> bytes:
    empty = b"cnumpy.core.multiarray\n_reconstruct\ncnumpy\nndarray\nK\x00\x85U\x01b\x87R"
    number = b"cnumpy\ndtype\n" + _string(array.dtype.str[1:]) + b"K\x00K\x01\x87R"
    number += b"(K\x03" + _string(array.dtype.str[0]) + b"NNN" + _integer(-1) * 2 + b"K\x00tb"
    shape = b"(" + b"".join(map(_integer, array.shape)) + b"t"
    return empty + b"(K\x01" + shape + number + b"\x89" + _string(array.tobytes()) + b"tb"
