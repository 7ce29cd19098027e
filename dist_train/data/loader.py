"""Delivers the samples of micro-batches on the device, in the network's input format.

Data sets that fit are kept in memory. Samples of all others are made when they are needed, or ahead of time by loader
processes.
"""

from __future__ import annotations

import logging
import math
from abc import ABC, abstractmethod
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass, replace
from pathlib import Path

import torch
from torch import Tensor

from dist_train.config import DataSettings
from dist_train.config.plugins import is_plugin
from dist_train.data.augmentation import (
    ChannelStatistics,
    PixelFormat,
    channel_statistics,
    crop_flip,
    move,
    staging_buffer,
)
from dist_train.data.catalog import load_data
from dist_train.data.decoding import DRAWS, EncodedImages, Work
from dist_train.data.images import BatchRequest, DataSource, ImageSet, Listing, Split, evenly_spread
from dist_train.data.loader_workers import BatchJob, Decoder, LoaderProcesses
from dist_train.data.plan import divided
from dist_train.data.plugin_samples import PluginSamples, Recipe, labels_of
from dist_train.outcome import CodedError, UsageError, check_choice
from dist_train.reproducible import generator, key, uniform

_logger = logging.getLogger("dist_train.data")

_STATISTICS_CHUNK = 4096  # images of which statistics are taken at once
_RESIDENT_FRACTION = 4  # images stay on a GPU if they take less than one in so many parts of its free memory


class SampleSource(ABC):
    """The samples of one split, delivered on the device in the network's input format, without waiting for it."""

    labels: Tensor | None
    """The labels of all samples, int64 [n]; None if they are known only when a sample is read."""

    def __init__(self, device: torch.device, seed: int, augment: str, pixels: PixelFormat | None) -> None:
        """Only `augment` crop-flip is applied here."""
        self._device = device
        self._seed = seed
        self._crops_and_flips = augment == "crop-flip"
        self._pixels = pixels or PixelFormat()

    @abstractmethod
    def __len__(self) -> int: ...

    def read(self, batch: BatchRequest) -> tuple[Tensor, Tensor]:
        """Return inputs [n, C, H, W] and labels int64 [n] of `batch`."""
        images, labels = self._on_device(batch)
        if batch.epoch is not None and self._crops_and_flips:
            images = crop_flip(images, move(batch.indices, self._device), self._seed, batch.epoch)
        return self._pixels.convert(images), labels

    def read_all(self, parts: Iterable[Tensor]) -> Iterator[tuple[Tensor, Tensor]]:
        """Yield inputs and labels of the samples `parts`, int64 each, in order and unaugmented; prefetches them."""
        requests = [BatchRequest(part) for part in parts]
        self.prefetch(requests)
        yield from map(self.read, requests)

    def prefetch(self, batches: Iterable[BatchRequest]) -> None:  # noqa: B027, nothing to prepare if all is in memory
        """Begin to prepare the batches that will be read next, in this order, instead of those of earlier calls."""

    def close(self) -> None:  # noqa: B027
        """Stop preparing samples; may be called again."""

    @abstractmethod
    def _on_device(self, batch: BatchRequest) -> tuple[Tensor, Tensor]:
        """Return images uint8 [n, C, H, W] and labels int64 [n]."""


@dataclass(frozen=True)
class Splits:
    """The splits of a data set."""

    train: SampleSource
    test: SampleSource
    identity: str = ""  # identifies the files of the data set; empty for images that are generated from the settings
    validation: SampleSource | None = None  # the part of the training set that is held out, if the settings ask for one
    normalization: ChannelStatistics | None = None  # by which inputs are normalized, with `data.normalize`
    class_names: tuple[str, ...] = ()  # in the order of labels: the folders of an image folder

    @property
    def present(self) -> dict[Split, SampleSource]:
        """The samples of each split that there is."""
        held_out: dict[Split, SampleSource] = {} if self.validation is None else {"validation": self.validation}
        return {"train": self.train, **held_out, "test": self.test}

    def of(self, split: Split) -> SampleSource:
        """Return the samples of `split`. Raises UsageError if there is no such split, or no validation split."""
        check_choice("split", split, Split)
        if split not in self.present:
            raise UsageError("the run has no validation split: data.validation_size is not set", code="no-validation")
        return self.present[split]

    def differ_from(self, identity: str) -> bool:
        """Whether these are not the data with `identity`; False if either is unknown."""
        return bool(identity and self.identity) and identity != self.identity

    def close(self) -> None:
        """Close all splits."""
        for samples in self.present.values():
            samples.close()


class Samples(SampleSource):
    """The samples of a split that is in memory: on the device if it fits there."""

    labels: Tensor

    def __init__(
        self,
        images: ImageSet,
        device: torch.device,
        seed: int = 0,
        augment: str = "none",
        pixels: PixelFormat | None = None,
        numbers: Tensor | None = None,
    ) -> None:
        """`numbers`: which of the images are the split's, int64, in its order; None: all."""
        super().__init__(device, seed, augment, pixels)
        count = len(images if numbers is None else numbers)
        self._is_resident = _fits(count * math.prod(images.shape), device)
        # In the host's memory these are the mapped pages, of all images: nothing is copied.
        if numbers is not None and self._is_resident and device.type != "cpu":
            images, numbers = images.select(numbers), None
        labels = images.labels if numbers is None else images.labels[numbers]
        self._images, self.labels = (
            tensor.to(device) if self._is_resident else tensor for tensor in (images.images, labels)
        )
        self._numbers = numbers

    def __len__(self) -> int:
        return len(self.labels)

    def _on_device(self, batch: BatchRequest) -> tuple[Tensor, Tensor]:
        indices = move(batch.indices, self._images.device)
        numbers = indices if self._numbers is None else self._numbers[indices]
        if self._is_resident:
            return self._images.index_select(0, numbers), self.labels.index_select(0, indices)
        return self._staged(self._images, numbers), self._staged(self.labels, indices)

    def _staged(self, source: Tensor, indices: Tensor) -> Tensor:
        """Copy rows from host memory to the device, through a pinned buffer, while the device computes."""
        staging = staging_buffer((indices.numel(), *source.shape[1:]), source.dtype, self._device)
        torch.index_select(source, 0, indices, out=staging)
        return staging.to(self._device, non_blocking=True)


def open_splits(
    settings: DataSettings,
    seed: int,
    device: torch.device,
    channels_last: bool = False,
    statistics: ChannelStatistics | None = None,
) -> Splits:
    """Open the splits. Only training samples are augmented.

    With `data.normalize` all splits are normalized by `statistics`, those with which a stored model was trained; None:
    by the training images.

    Raises UsageError if files are missing or damaged, or do not match the settings; FaultError if a sample that is read
    at the start is damaged.
    """
    pixels = PixelFormat(torch.channels_last if channels_last else torch.contiguous_format, statistics)
    names: tuple[Split, ...] = ("train", "test")
    opened = {split: load_data(settings, split, seed) for split in names}
    train, test = opened["train"], opened["test"]
    if isinstance(train, ImageSet):
        kept, held_out = divided(train.labels, settings, seed)
        numbers = kept if len(kept) < len(train) else None
        if settings.normalize and statistics is None:
            parts = (train.images[part] for part in torch.split(kept, _STATISTICS_CHUNK))
            pixels = replace(pixels, statistics=channel_statistics(parts))
        if isinstance(test, ImageSet) and not is_plugin(settings.augment):
            used = kept if held_out is None else torch.cat((kept, held_out))
            if not train.is_mapped and 2 * len(used) <= len(train):  # copy a small part, and free the rest
                train, numbers = train.select(used), torch.arange(len(kept))
                held_out = None if held_out is None else torch.arange(len(kept), len(used))
            return Splits(
                Samples(train, device, seed, settings.augment, pixels, numbers),
                Samples(test, device, seed, pixels=pixels),
                f"{train.identity} {test.identity}".strip(),
                None if held_out is None else Samples(train, device, seed, pixels=pixels, numbers=held_out),
                pixels.statistics,
            )
    return _open(settings, opened, seed, device, pixels)


def training_labels(settings: DataSettings, seed: int) -> Tensor:
    """Return the labels of the training samples, int64 [n], in the order of `open_splits`. Raises UsageError."""
    labels = labels_of(load_data(settings, "train", seed), settings, seed)
    return labels[divided(labels, settings, seed)[0]]


def _fits(needed: int, device: torch.device) -> bool:
    """Whether `needed` bytes are less than a quarter of the free memory; always on CPUs and emulated GPUs."""
    if device.type != "cuda" or not torch.cuda.is_available():
        return True
    free, _ = torch.cuda.mem_get_info(device)
    return needed < free // _RESIDENT_FRACTION


STATISTICS_SAMPLES = 1000
_STATISTICS_PART = 100
_TRIED_SAMPLES = 4


class LoadedSamples(SampleSource):
    """The samples of a split that are made when needed. Augmentation depends on (seed, epoch, sample)."""

    def __init__(
        self,
        split: Split,
        listing: Listing,
        decoder: Decoder,
        settings: DataSettings,
        device: torch.device,
        seed: int = 0,
        pixels: PixelFormat | None = None,
    ) -> None:
        """Make the samples of `listing` by `decoder`, which other splits may share; only training is augmented."""
        is_encoded, augment = settings.data_set.is_encoded, settings.augment if split == "train" else "none"
        super().__init__(device, seed, "none" if is_encoded else augment, pixels)
        self._shape = settings.image_format.shape
        self._split = split
        self._source: Split = "train" if split == "validation" else split
        self._listing = listing
        self.labels = listing.labels
        self._decoder = decoder
        self._is_cropped = is_encoded and augment == "crop-flip"
        # a plug-in may draw random numbers in each epoch
        self._has_epochs = self._is_cropped or (split == "train" and _uses_plugin(settings))

    def __len__(self) -> int:
        return len(self._listing)

    def prefetch(self, batches: Iterable[BatchRequest]) -> None:
        self._decoder.prefetch(map(self._job, batches))

    def close(self) -> None:
        """End the loader processes, which other splits may share."""
        self._decoder.close()

    def _on_device(self, batch: BatchRequest) -> tuple[Tensor, Tensor]:
        count = batch.indices.numel()
        images = staging_buffer((count, *self._shape), torch.uint8, self._device)
        labels = torch.zeros(count, dtype=torch.int64)
        self._decoder.fetch(self._job(batch), images, labels)
        if self._listing.labels is not None:
            labels = self._listing.labels[batch.indices]
        return images.to(self._device, non_blocking=True), move(labels, self._device)

    def _job(self, batch: BatchRequest) -> BatchJob:
        indices = batch.indices
        epoch = batch.epoch if self._has_epochs else None

        def work(start: int, stop: int) -> Work:
            part = indices[start:stop]
            numbers = part.tolist()
            references = [self._listing.reference(sample) for sample in numbers]
            draws = None
            if self._is_cropped and epoch is not None:
                draws = augmentation_draws(part, self._seed, epoch).tolist()
            return Work(references, draws, self._source, numbers, epoch)

        return BatchJob((self._split, epoch, indices.numpy().tobytes()), indices.numel(), work)


def augmentation_draws(samples: Tensor, seed: int, epoch: int) -> Tensor:
    """Return the uniform random numbers that augment `samples`, int64 [n], in `epoch`: float32 [n, DRAWS]."""
    return uniform(key(seed, "random resized crop", epoch), samples.unsqueeze(1) * DRAWS + torch.arange(DRAWS))


def _listings(settings: DataSettings, opened: Mapping[Split, DataSource], seed: int) -> dict[Split, Listing]:
    """Return all splits, of which train is divided, as listings."""
    listings = {split: _listing(settings, split, source) for split, source in opened.items()}
    if (settings.train_size, settings.validation_size) == (None, None):
        return listings
    whole, source = listings["train"], opened["train"]
    kept, held_out = divided(labels_of(source, settings, seed), settings, seed)
    listings["train"] = whole.select(kept)
    if held_out is not None:
        listings["validation"] = whole.select(held_out)
    if isinstance(source, ImageSet):  # the digest is that of the images' source alone, as without a plug-in
        for split in listings.keys() - {"test"}:
            part = listings[split]
            listings[split] = replace(part, refer=part.reference, numbers=torch.arange(len(part)))
    return listings


def _listing(settings: DataSettings, split: Split, source: DataSource) -> Listing:
    if isinstance(source, Listing):
        return source
    samples = torch.arange(len(source))
    if isinstance(source, ImageSet):
        return Listing(int, samples, source.labels, source.identity)
    # without the folder of a plug-in's file, which may move
    return Listing(int, samples, None, f"{Path(settings.name).name} {split}")


def _uses_plugin(settings: DataSettings) -> bool:
    return is_plugin(settings.name) or is_plugin(settings.augment)


def _open(
    settings: DataSettings, opened: Mapping[Split, DataSource], seed: int, device: torch.device, pixels: PixelFormat
) -> Splits:
    """Return the splits of `opened`, made when needed; they share the loader processes."""
    listings = _listings(settings, opened, seed)
    decoder, recipe, loaders = Decoder(EncodedImages()), "", settings.loader_workers
    if _uses_plugin(settings):
        decoder = Decoder(PluginSamples(settings, seed, opened))
        recipe = Recipe(settings=settings, seed=seed).model_dump_json()
        _try_samples(settings, listings, decoder, seed)
    if loaders:
        decoder = LoaderProcesses(loaders, settings.image_format.shape, recipe)
    if settings.normalize and pixels.statistics is None:
        pixels = replace(pixels, statistics=_statistics(settings, listings["train"], decoder, seed))
    samples = {
        split: LoadedSamples(split, listing, decoder, settings, device, seed, pixels)
        for split, listing in listings.items()
    }
    identity = f"{listings['train'].digest()} {listings['test'].digest()}"
    names = listings["train"].class_names
    return Splits(samples["train"], samples["test"], identity, samples.get("validation"), pixels.statistics, names)


def _try_samples(settings: DataSettings, listings: Mapping[Split, Listing], decoder: Decoder, seed: int) -> None:
    """Read a few samples that plug-ins make, evenly spread over each split: mistakes show before the first step.

    Warn of samples that differ when they are read once more.
    """
    tried = {
        split: LoadedSamples(split, listing, decoder, settings, torch.device("cpu"), seed)
        for split, listing in listings.items()
    }
    differing: list[str] = []
    for split, samples in tried.items():
        chosen = evenly_spread(len(samples), min(_TRIED_SAMPLES, len(samples)))
        # The last two are the same samples, since the training split alone has epochs.
        _, images, again = (samples.read(BatchRequest(chosen, epoch))[0] for epoch in (None, 0, 0))
        if not torch.equal(images, again):
            differing.append(split)
    if differing:
        plugins = " or ".join(filter(is_plugin, (settings.name, settings.augment)))
        _logger.warning(
            f"images of {plugins} ({', '.join(differing)}) differ when they are read again: the code draws from a "
            f"generator of its own, as albumentations does, so that results depend on ranks and loaders, and those of "
            f"a resumed run differ; draw from the global generators of torch, NumPy or Python, which are seeded for "
            f"each sample"
        )
    if not is_plugin(settings.name):
        return
    train, test = tried["train"], tried["test"]
    first = BatchRequest(torch.arange(min(_TRIED_SAMPLES, len(train), len(test))))
    images = train.read(first)[0]
    if torch.equal(images, test.read(first)[0]) and not torch.equal(images, images[:1].expand_as(images)):
        _logger.warning(
            f"the splits train and test of {settings.name} begin with the same images: return others if its argument "
            f"split is 'test', and draw random ones from a generator of your own, seeded from the seed and the split, "
            f"since the global generators are seeded alike for both"
        )


def _statistics(settings: DataSettings, listing: Listing, decoder: Decoder, seed: int) -> ChannelStatistics:
    """Return the statistics of 1,000 training images, chosen by the seed and not augmented."""
    samples = LoadedSamples("train", listing, decoder, settings, torch.device("cpu"), seed)
    order = torch.arange(len(samples))
    if not settings.data_set.is_encoded:  # otherwise the listing is shuffled
        order = torch.randperm(len(samples), generator=generator(seed, "statistics"))
    parts = [BatchRequest(part) for part in torch.split(order[:STATISTICS_SAMPLES], _STATISTICS_PART)]
    try:
        samples.prefetch(parts)
        return channel_statistics(samples._on_device(part)[0] for part in parts)
    except CodedError:
        decoder.close()
        raise
