"""The types in which data sets reach the rest of the program, and in which it asks for samples."""

from __future__ import annotations

import hashlib
from collections.abc import Callable
from dataclasses import dataclass, replace
from typing import Any, Literal, Protocol

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from dist_train.outcome import UsageError

Split = Literal["train", "validation", "test"]

_HASHED_ROWS = 1024


@dataclass(frozen=True)
class ImageSet:
    """Images uint8 [N, C, H, W] and labels int64 [N] in 0..classes-1, both on the CPU.

    The tensors may be views of a file that all local ranks map: never write to them. (A write to a decoded data set
    changes this process's copy of the page; one to a .npy file, which is mapped read-only, ends the process.)
    """

    images: Tensor
    labels: Tensor
    classes: int
    identity: str = ""  # identifies the source files by digest; empty for images that are generated from the settings
    is_mapped: bool = False  # whether local ranks share the images' pages, so that a copy of some takes more memory

    def __post_init__(self) -> None:
        assert self.images.dtype == torch.uint8, f"images are {self.images.dtype}, not torch.uint8"
        assert self.images.ndim == 4, f"images have the shape {list(self.images.shape)}, not [N, C, H, W]"
        assert self.labels.dtype == torch.int64, f"labels are {self.labels.dtype}, not torch.int64"
        assert self.labels.shape == self.images.shape[:1], (
            f"{list(self.labels.shape)} labels, {len(self.images)} images"
        )

    def __len__(self) -> int:
        return self.images.shape[0]

    @property
    def shape(self) -> tuple[int, int, int]:
        """Channels, height and width of one image."""
        _, channels, height, width = self.images.shape
        return channels, height, width

    def select(self, samples: Tensor) -> ImageSet:
        """Return the images of `samples`, int64, in their order."""
        return ImageSet(self.images[samples], self.labels[samples], self.classes, self.identity)

    def digest(self) -> str:
        """Return a digest of the images and labels."""
        return digest_of("", self.images, self.labels)


def digest_of(text: str | memoryview, *tensors: Tensor) -> str:
    """Return a digest of `text`, which may hold names of files, and of `tensors`: 16 hexadecimal digits."""
    hashed = hashlib.sha256(text.encode("utf-8", "surrogateescape") if isinstance(text, str) else text)
    for tensor in tensors:
        for part in tensor.split(_HASHED_ROWS):  # copies are then small
            hashed.update(part.contiguous().numpy())
    return hashed.hexdigest()[:16]


def check_labels(labels: Tensor, classes: int, place: str, code: str = "data-labels") -> None:
    """Raise UsageError, with `code`, if one of `labels`, int64 [n] of the samples in `place`, is not of a class."""
    if len(wrong := ((labels < 0) | (labels >= classes)).nonzero()):
        sample = int(wrong[0])
        raise UsageError(
            f"sample {sample} of {place} has the label {int(labels[sample])}: data.classes is {classes}, labels count "
            f"from 0",
            code=code,
        )


def evenly_spread(samples: int, count: int) -> Tensor:
    """Return `count` numbers from 0 to `samples` - 1, ascending, int64 [count]; `samples` must not be 0."""
    # torch spreads them in float32, which rounds the last of more than 2^24 up to `samples`.
    return torch.linspace(0, samples - 1, count).long().clamp_(max=samples - 1)


def channels_first(images: NDArray[Any], shape: tuple[int, int, int]) -> NDArray[Any] | None:
    """Return a view [n, C, H, W] of images of `shape`: [n, C, H, W], [n, H, W, C] or [n, H, W]; None of all others."""
    channels, height, width = shape
    if images.shape[1:] == shape:
        return images
    if images.shape[1:] == (height, width, channels):
        return np.moveaxis(images, -1, 1)
    return images[:, None] if images.shape[1:] == (height, width) and channels == 1 else None


@dataclass(frozen=True)
class Listing:
    """The samples of a split in order, to be read when needed."""

    refer: Callable[[int], Any]  # maps a sample's number in the source to its index, path or `decoding.Part`
    numbers: Tensor  # int64 [n]
    labels: Tensor | None  # int64 [n]; None if a label is known only after its sample has been read
    source: str  # identifies the source by names, places and labels, not by the contents of samples
    class_names: tuple[str, ...] = ()  # in the order of labels, if the source has them

    def __len__(self) -> int:
        return len(self.numbers)

    def reference(self, sample: int) -> Any:
        """Return the index of `sample` in a data set in Python, otherwise its path or `decoding.Part`."""
        return self.refer(int(self.numbers[sample]))

    def digest(self) -> str:
        """Return a digest of the source and the order."""
        return digest_of(self.source, self.numbers)

    def select(self, samples: Tensor) -> Listing:
        """Return a listing of `samples`, int64, in their order."""
        labels = None if self.labels is None else self.labels[samples]
        return replace(self, numbers=self.numbers[samples], labels=labels)


class MapDataset(Protocol):
    """A map-style Dataset of PIL images, uint8 tensors [C, H, W], or arrays [H, W], [H, W, C] or [C, H, W]."""

    def __len__(self) -> int: ...

    def __getitem__(self, index: int, /) -> tuple[Any, Any]: ...


DataSource = ImageSet | Listing | MapDataset  # a split in memory, of encoded images, or of a plug-in


@dataclass(frozen=True)
class BatchRequest:
    """The samples of a batch, int64 [n] on the CPU, and the epoch that determines their augmentation; None: none."""

    indices: Tensor
    epoch: int | None = None
