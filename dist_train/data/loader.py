"""What a training step asks for: samples of its micro-batch, on the device, as the network reads them."""

from __future__ import annotations

from collections.abc import Iterable
from typing import Protocol

import torch
from torch import Tensor

from dist_train.config import DataSettings
from dist_train.data.catalog import load_images
from dist_train.data.folder_samples import open_folder
from dist_train.data.images import BatchRequest, ImageSet, Splits
from dist_train.data.pixels import AUGMENTATIONS, PixelFormat, channel_statistics, move, staging_buffer, unchanged

_RESIDENT_PART = 4


class Samples:
    """The samples of one split, held in memory. Nothing here waits for the device."""

    def __init__(
        self,
        images: ImageSet,
        device: torch.device,
        seed: int = 0,
        augment: str = "none",
        pixels: PixelFormat | None = None,
    ) -> None:
        self.classes = images.classes
        self.shape = images.shape
        self._length = len(images)
        self._device = device
        self._seed = seed
        self._augment = AUGMENTATIONS[augment]
        self._pixels = PixelFormat() if pixels is None else pixels
        self._store: _Store = _Resident(images, device) if _fits(images, device) else _Staged(images, device)

    def __len__(self) -> int:
        return self._length

    def micro_batch(self, indices: Tensor, epoch: int) -> tuple[Tensor, Tensor]:
        """Return augmented inputs [n, C, H, W] and labels int64 [n] for `indices`, int64 [n] on the CPU."""
        images, labels = self._store.gather(indices)
        if self._augment is not unchanged:
            images = self._augment(images, move(indices, self._device), self._seed, epoch)
        return self._pixels.convert(images), labels

    def unaugmented(self, indices: Tensor) -> tuple[Tensor, Tensor]:
        """Return inputs and labels of `indices`, int64 [n] on the CPU, not augmented."""
        images, labels = self._store.gather(indices)
        return self._pixels.convert(images), labels

    def plain(self, start: int, stop: int) -> tuple[Tensor, Tensor]:
        """Return inputs and labels of the samples `start` to `stop` (exclusive), not augmented."""
        images, labels = self._store.span(start, stop)
        return self._pixels.convert(images), labels

    def prefetch(self, batches: Iterable[BatchRequest]) -> None:
        """Do nothing: all samples are at hand."""

    def close(self) -> None:
        """Do nothing."""


def open_splits(
    settings: DataSettings,
    seed: int,
    device: torch.device,
    memory_format: torch.memory_format = torch.contiguous_format,
    dtype: torch.dtype = torch.float32,
) -> Splits:
    """Open both splits; only training is augmented, and both are normalized by the training images.

    Raises:
        UsageError: files are missing or damaged, or do not fit the settings.
    """
    if settings.name == "imagefolder":
        return open_folder(settings, seed, device, PixelFormat(dtype, memory_format))
    train = load_images(settings, "train", seed)
    test = load_images(settings, "test", seed)
    statistics = channel_statistics(train.images) if settings.normalize else None
    pixels = PixelFormat(dtype, memory_format, statistics)
    return Splits(
        train=Samples(train, device, seed, settings.augment, pixels),
        test=Samples(test, device, seed, "none", pixels),
        identity=f"{train.identity} {test.identity}".strip(),
    )


class _Store(Protocol):
    """Where the bytes lie, and how they come to the device."""

    def gather(self, indices: Tensor) -> tuple[Tensor, Tensor]: ...

    def span(self, start: int, stop: int) -> tuple[Tensor, Tensor]: ...


class _Resident:
    """All images on the device; on a CPU these are the mapped pages themselves."""

    def __init__(self, images: ImageSet, device: torch.device) -> None:
        self._images = images.images.to(device)
        self._labels = images.labels.to(device)

    def gather(self, indices: Tensor) -> tuple[Tensor, Tensor]:
        there = move(indices, self._images.device)
        return self._images.index_select(0, there), self._labels.index_select(0, there)

    def span(self, start: int, stop: int) -> tuple[Tensor, Tensor]:
        return self._images[start:stop], self._labels[start:stop]


class _Staged:
    """Images in the machine's memory, copied to the device through pinned buffers while it computes."""

    def __init__(self, images: ImageSet, device: torch.device) -> None:
        self._images = images.images
        self._labels = images.labels
        self._device = device

    def gather(self, indices: Tensor) -> tuple[Tensor, Tensor]:
        return self._pick(self._images, indices), self._pick(self._labels, indices)

    def span(self, start: int, stop: int) -> tuple[Tensor, Tensor]:
        return move(self._images[start:stop], self._device), move(self._labels[start:stop], self._device)

    def _pick(self, source: Tensor, indices: Tensor) -> Tensor:
        staging = staging_buffer((indices.numel(), *source.shape[1:]), source.dtype, self._device)
        torch.index_select(source, 0, indices, out=staging)
        return staging.to(self._device, non_blocking=True)


def _fits(images: ImageSet, device: torch.device) -> bool:
    """Whether the images take less than a quarter of the device's free memory.

    A CPU holds them anyway, and so does a GPU that is only emulated.
    """
    if device.type != "cuda" or not torch.cuda.is_available():
        return True
    free, _ = torch.cuda.mem_get_info(device)
    return images.images.nbytes < free // _RESIDENT_PART
