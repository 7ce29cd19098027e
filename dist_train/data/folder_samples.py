"""Samples of an image folder: decoded when they are due, ahead of time where there are loader processes."""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from dataclasses import replace

import torch
from torch import Tensor

from dist_train.config import DataSettings
from dist_train.data.decoders import Decoder, InProcessDecoder, LoaderProcesses, Order
from dist_train.data.decoding import CHANNELS, DRAWS, Work
from dist_train.data.image_folder import Listing, check_same_classes, list_split, training_subset
from dist_train.data.images import BatchRequest, Splits
from dist_train.data.pixels import PixelFormat, move, staging_buffer, statistics_of_parts
from dist_train.outcome import FaultError, UsageError
from dist_train.randomness import key, uniform

STATISTICS_SAMPLES = 1000
_STATISTICS_PART = 100


class FolderSamples:
    """The samples of one split of an image folder. What is augmented, and how, depends on (seed, epoch, sample)."""

    def __init__(
        self,
        listing: Listing,
        decoder: Decoder,
        size: int,
        device: torch.device,
        seed: int = 0,
        augment: str = "none",
        pixels: PixelFormat | None = None,
    ) -> None:
        """Take images of `listing`, cut to `size` pixels square, from `decoder`, which it may share with others."""
        assert augment in ("none", "crop-flip")
        self.classes = len(listing.classes)
        self.shape = (CHANNELS, size, size)
        self._listing = listing
        self._decoder = decoder
        self._device = device
        self._seed = seed
        self._augments = augment == "crop-flip"
        self._pixels = PixelFormat() if pixels is None else pixels

    def __len__(self) -> int:
        return len(self._listing)

    def micro_batch(self, indices: Tensor, epoch: int) -> tuple[Tensor, Tensor]:
        """Return augmented inputs [n, C, H, W] and labels int64 [n] for `indices`, int64 [n] on the CPU."""
        return self._fetch(BatchRequest(indices, epoch))

    def unaugmented(self, indices: Tensor) -> tuple[Tensor, Tensor]:
        """Return inputs and labels of `indices`, int64 [n] on the CPU, not augmented."""
        return self._fetch(BatchRequest(indices, None))

    def plain(self, start: int, stop: int) -> tuple[Tensor, Tensor]:
        """Return inputs and labels of the samples `start` to `stop` (exclusive), not augmented."""
        return self.unaugmented(torch.arange(start, stop))

    def prefetch(self, batches: Iterable[BatchRequest]) -> None:
        """Have the loader processes begin what will be asked for next."""
        self._decoder.prefetch(map(self._order, batches))

    def close(self) -> None:
        """End the loader processes, also for those who share them."""
        self._decoder.close()

    def decoded(self, wanted: BatchRequest) -> Tensor:
        """Return images as bytes, uint8 [n, C, H, W], ready to be copied to the device."""
        images = staging_buffer((wanted.indices.numel(), *self.shape), torch.uint8, self._device)
        self._decoder.fetch(self._order(wanted), images)
        return images

    def _fetch(self, wanted: BatchRequest) -> tuple[Tensor, Tensor]:
        images = self.decoded(wanted).to(self._device, non_blocking=True)
        labels = move(self._listing.labels[wanted.indices], self._device)
        return self._pixels.convert(images), labels

    def _order(self, wanted: BatchRequest) -> Order:
        indices = wanted.indices
        epoch = wanted.epoch if self._augments else None

        def work(start: int, stop: int) -> Work:
            part = indices[start:stop]
            paths = [self._listing.path(sample) for sample in part.tolist()]
            return Work(paths, None if epoch is None else augmentation_draws(part, self._seed, epoch).tolist())

        return Order((self._listing.folder, epoch, indices.numpy().tobytes()), indices.numel(), work)


def augmentation_draws(samples: Tensor, seed: int, epoch: int) -> Tensor:
    """Return the uniforms that augment each of `samples`, int64 [n], in `epoch`: float32 [n, DRAWS]."""
    return uniform(key(seed, "random resized crop", epoch), samples.unsqueeze(1) * DRAWS + torch.arange(DRAWS))


def open_folder(settings: DataSettings, seed: int, device: torch.device, pixels: PixelFormat) -> Splits:
    """Open both splits of `settings.root`; they share the loader processes.

    Normalization is by 1,000 of the training images, chosen by the seed, as they are without augmentation.

    Raises:
        UsageError: the folder is not as it must be.
        FaultError: an image that normalization reads is damaged.
    """
    if settings.root is None or settings.classes is None:
        raise UsageError("an image folder needs data.root and data.classes", code="image-folder-unset")
    train_files = list_split(settings.root, "train", settings.classes, seed)
    test_files = list_split(settings.root, "test", settings.classes, seed)
    check_same_classes(train_files, test_files)
    train_files = training_subset(train_files, settings.train_size, seed)
    size = settings.image_size
    decoder: Decoder = LoaderProcesses(settings.loader_workers, size) if settings.loader_workers else InProcessDecoder()
    if settings.normalize:
        plain = FolderSamples(train_files, decoder, size, torch.device("cpu"))
        try:
            pixels = replace(pixels, statistics=statistics_of_parts(_first_images(plain, STATISTICS_SAMPLES)))
        except FaultError:
            decoder.close()
            raise
    return Splits(
        train=FolderSamples(train_files, decoder, size, device, seed, settings.augment, pixels),
        test=FolderSamples(test_files, decoder, size, device, seed, "none", pixels),
        identity=f"{train_files.digest()} {test_files.digest()}",
    )


def _first_images(samples: FolderSamples, count: int) -> Iterator[Tensor]:
    """Yield the first images, which the seed has shuffled to the front, in parts."""
    parts = [BatchRequest(part, None) for part in torch.split(torch.arange(min(count, len(samples))), _STATISTICS_PART)]
    samples.prefetch(parts)
    return map(samples.decoded, parts)
