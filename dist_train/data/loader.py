"""What a training step asks for: samples of its micro-batch, on the device, as the network reads them."""

from __future__ import annotations

from collections.abc import Iterable

import torch
from torch import Tensor

from dist_train.config import DataSettings
from dist_train.data.catalog import load_images
from dist_train.data.image_folder import open_folder
from dist_train.data.images import BatchRequest, ImageSet, Splits
from dist_train.data.pixels import AUGMENTATIONS, PixelFormat, channel_statistics, move, staging_buffer, unchanged

_RESIDENT_PART = 4


class Samples:
    """The samples of one split, on the device where they fit. Nothing here waits for it."""

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
        self._device = device
        self._seed = seed
        self._augment = AUGMENTATIONS[augment]
        self._pixels = PixelFormat() if pixels is None else pixels
        self._is_resident = _fits(images, device)
        # On a CPU these are the mapped pages themselves.
        self._images, self._labels = (
            tensor.to(device) if self._is_resident else tensor for tensor in (images.images, images.labels)
        )

    def __len__(self) -> int:
        return len(self._labels)

    def read(self, batch: BatchRequest) -> tuple[Tensor, Tensor]:
        """Return inputs [n, C, H, W] and labels int64 [n] of `batch`."""
        images, labels = self._gather(batch.indices)
        if batch.epoch is not None and self._augment is not unchanged:
            images = self._augment(images, move(batch.indices, self._device), self._seed, batch.epoch)
        return self._pixels.convert(images), labels

    def prefetch(self, batches: Iterable[BatchRequest]) -> None:
        """Do nothing: all samples are at hand."""

    def close(self) -> None:
        """Do nothing."""

    def _gather(self, indices: Tensor) -> tuple[Tensor, Tensor]:
        if self._is_resident:
            there = move(indices, self._images.device)
            return self._images.index_select(0, there), self._labels.index_select(0, there)
        return self._staged(self._images, indices), self._staged(self._labels, indices)

    def _staged(self, source: Tensor, indices: Tensor) -> Tensor:
        """Return what is in the machine's memory, through pinned buffers that are copied while the device computes."""
        staging = staging_buffer((indices.numel(), *source.shape[1:]), source.dtype, self._device)
        torch.index_select(source, 0, indices, out=staging)
        return staging.to(self._device, non_blocking=True)


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
    validation = None if settings.validation_size is None else load_images(settings, "validation", seed)
    statistics = channel_statistics(train.images) if settings.normalize else None
    pixels = PixelFormat(dtype, memory_format, statistics)
    return Splits(
        train=Samples(train, device, seed, settings.augment, pixels),
        test=Samples(test, device, seed, "none", pixels),
        validation=None if validation is None else Samples(validation, device, seed, "none", pixels),
        identity=f"{train.identity} {test.identity}".strip(),
    )


def _fits(images: ImageSet, device: torch.device) -> bool:
    """Whether the images take less than a quarter of the device's free memory.

    A CPU holds them anyway, and so does a GPU that is only emulated.
    """
    if device.type != "cuda" or not torch.cuda.is_available():
        return True
    free, _ = torch.cuda.mem_get_info(device)
    return images.images.nbytes < free // _RESIDENT_PART
