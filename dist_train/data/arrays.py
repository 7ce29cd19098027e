"""Images and labels in NumPy's files, mapped where they are .npy: all ranks of a node share the pages."""

from __future__ import annotations

import hashlib
import zipfile
from pathlib import Path
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from dist_train.config import DataSettings
from dist_train.data.images import ImageSet, Split
from dist_train.data.packed import NAMES
from dist_train.outcome import UsageError

_DIGESTED = 64


def read_arrays(settings: DataSettings, split: Split) -> ImageSet:
    """Return the images of a split, uint8 [N, C, H, W], [N, H, W, C] or [N, H, W], and labels [N], in `data.root`.

    Raises:
        UsageError: files are missing, cannot be read, or hold something else.
    """
    where = find_arrays(settings, split)
    images, labels = (_array(*each) for each in where)
    image_format = settings.image_format
    pixels = _channels_first(images, image_format.shape)
    if pixels is None or images.dtype != np.uint8:
        raise UsageError(
            f"{where[0][0]} holds {images.dtype} of {list(images.shape)}, not uint8 of {list(image_format.shape)} an "
            f"image, channels first or last: set data.shape to it",
            code="data-shape",
        )
    if labels.shape != images.shape[:1] or labels.dtype.kind not in "iu":
        raise UsageError(
            f"{where[1][0]} holds {labels.dtype} of {list(labels.shape)}: not a whole number for each of {len(images)} "
            f"images",
            code="data-counts",
        )
    if len(labels) and not 0 <= labels.min() <= labels.max() < image_format.classes:
        raise UsageError(
            f"{where[1][0]} holds labels from {labels.min()} to {labels.max()}, but data.classes is "
            f"{image_format.classes}: labels count from 0",
            code="data-labels",
        )
    numbers = torch.from_numpy(labels.astype(np.int64))
    return ImageSet(pixels, numbers, image_format.classes, _identity(pixels, numbers))


def find_arrays(settings: DataSettings, split: Split) -> tuple[tuple[Path, str], tuple[Path, str]]:
    """Return the files of images and of labels, and each array's name: NAME.npz, or NAME_images.npy and so on.

    Raises:
        UsageError: there are none.
    """
    assert settings.root is not None
    image, label = settings.image_column or "images", settings.label_column or "labels"
    for name in NAMES[split]:
        if (both := settings.root / f"{name}.npz").is_file():
            return (both, image), (both, label)
        for apart in (settings.root / name, settings.root / f"{name}_"):
            images, labels = (
                Path(f"{apart}{'' if str(apart).endswith('_') else '/'}{each}.npy") for each in (image, label)
            )
            if images.is_file() and labels.is_file():
                return (images, image), (labels, label)
    name = NAMES[split][0]
    raise UsageError(
        f"{settings.root} holds no {split} arrays: {name}.npz, or {name}_{image}.npy and {name}_{label}.npy "
        f"(for test: {', '.join(NAMES['test'])}); set data.root",
        code="data-missing",
    )


def _array(path: Path, name: str) -> NDArray[Any]:
    try:
        if path.suffix == ".npy":
            return np.load(path, mmap_mode="c", allow_pickle=False)  # type: ignore[no-any-return]
        with np.load(path, allow_pickle=False) as archive:
            if name not in archive:
                raise UsageError(
                    f"{path} has no array {name}: it has {', '.join(archive)}; "
                    f"set data.image_column and data.label_column",
                    code="column-missing",
                )
            return archive[name]  # type: ignore[no-any-return]
    except UsageError:
        raise
    except (OSError, ValueError, EOFError, zipfile.BadZipFile) as error:
        raise UsageError(f"{path} is no file of NumPy's, or damaged: {error}", code="data-format") from error


def _channels_first(images: NDArray[Any], shape: tuple[int, int, int]) -> Tensor | None:
    """Return a view [N, C, H, W] of arrays of that shape; none where they have another."""
    channels, height, width = shape
    if images.dtype != np.uint8:
        return None
    found = torch.from_numpy(images)
    if images.shape[1:] == shape:
        return found
    if images.shape[1:] == (height, width, channels):
        return found.movedim(-1, 1)
    return found.unsqueeze(1) if images.shape[1:] == (height, width) and channels == 1 else None


def _identity(images: Tensor, labels: Tensor) -> str:
    """Return what names them: the labels, and some of the images: to read all would take as long as an epoch."""
    chosen = torch.linspace(0, max(0, len(labels) - 1), _DIGESTED).long()[: len(labels)]
    hashed = hashlib.sha256(f"{tuple(images.shape)}".encode())
    hashed.update(labels.numpy().tobytes())
    hashed.update(images[chosen].contiguous().numpy().tobytes())
    return hashed.hexdigest()[:16]
