"""What a training step asks for: samples of its micro-batch, on the device, as the network reads them."""

from __future__ import annotations

from collections.abc import Iterable

import torch
from torch import Tensor

from dist_train.config import ENCODED, DataSettings
from dist_train.config.plugins import is_plugin
from dist_train.data.catalog import load_data
from dist_train.data.images import BatchRequest, ImageSet, MapDataset, Split, Splits
from dist_train.data.loaded import list_encoded, open_encoded, open_in_python
from dist_train.data.pixels import AUGMENTATIONS, PixelFormat, channel_statistics, move, staging_buffer, unchanged
from dist_train.data.plan import divided
from dist_train.data.plugin_samples import labels_of

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
    """Open the splits; only training is augmented, and both are normalized by the training images.

    Raises:
        UsageError: files are missing or damaged, or do not fit the settings.
        FaultError: a sample that is read at once is damaged.
    """
    pixels = PixelFormat(dtype, memory_format)
    if settings.name in ENCODED:
        return open_encoded(settings, seed, device, pixels)
    train = load_data(settings, "train", seed)
    test = load_data(settings, "test", seed)
    validation = None if settings.validation_size is None else load_data(settings, "validation", seed)
    if settings.normalize and isinstance(train, ImageSet):
        pixels = PixelFormat(dtype, memory_format, channel_statistics(train.images))
    if not (isinstance(train, ImageSet) and isinstance(test, ImageSet)) or is_plugin(settings.augment):
        opened: dict[Split, ImageSet | MapDataset] = {"train": train, "test": test}
        if validation is not None:
            opened["validation"] = validation
        return open_in_python(settings, opened, seed, device, pixels)
    assert validation is None or isinstance(validation, ImageSet)
    return Splits(
        train=Samples(train, device, seed, settings.augment, pixels),
        test=Samples(test, device, seed, "none", pixels),
        validation=None if validation is None else Samples(validation, device, seed, "none", pixels),
        identity=f"{train.identity} {test.identity}".strip(),
    )


def training_labels(settings: DataSettings, seed: int) -> Tensor:
    """Return the labels of the training samples, int64 [n], in the order in which `open_splits` has them.

    Raises:
        UsageError: files are missing or damaged, or do not fit the settings.
    """
    if settings.name in ENCODED:
        labels = list_encoded(settings, "train", seed).labels
        assert labels is not None
    else:
        found = load_data(settings, "train", seed)
        if isinstance(found, ImageSet):
            return found.labels
        labels = labels_of(found, settings, "train", seed)
    return labels[divided(labels, settings, seed)[0]]


def _fits(images: ImageSet, device: torch.device) -> bool:
    """Whether the images take less than a quarter of the device's free memory.

    A CPU holds them anyway, and so does a GPU that is only emulated.
    """
    if device.type != "cuda" or not torch.cuda.is_available():
        return True
    free, _ = torch.cuda.mem_get_info(device)
    return images.images.nbytes < free // _RESIDENT_PART
