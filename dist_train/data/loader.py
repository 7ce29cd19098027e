"""What a training step asks for: samples of its micro-batch, on the device, as the network reads them.

Data sets that fit are in memory; samples of all others are made one by one when they are due, ahead of time where there
are loader processes.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass, replace
from typing import Any, Protocol, TypeVar

import torch
from torch import Tensor

from dist_train.config import ENCODED, DataSettings
from dist_train.config.plugins import is_plugin
from dist_train.data.augmentation import (
    AUGMENTATIONS,
    PixelFormat,
    channel_statistics,
    move,
    staging_buffer,
    statistics_of_parts,
    unchanged,
)
from dist_train.data.catalog import load_data
from dist_train.data.columns import list_parquet, list_saved
from dist_train.data.decoders import Decoder, LoaderProcesses, Order
from dist_train.data.decoding import DRAWS, EncodedImages, Work
from dist_train.data.image_folder import Listing as FolderListing
from dist_train.data.image_folder import check_same_classes, list_split
from dist_train.data.images import BatchRequest, ImageSet, MapDataset, Split, Splits
from dist_train.data.packed import PackedListing, list_shards
from dist_train.data.plan import divided
from dist_train.data.plugin_samples import PluginSamples, Recipe, labels_of
from dist_train.outcome import CodedError
from dist_train.reproducible import generator, key, uniform

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
        if self._is_resident:
            there = move(batch.indices, self._images.device)
            images, labels = self._images.index_select(0, there), self._labels.index_select(0, there)
        else:
            images, labels = (self._staged(source, batch.indices) for source in (self._images, self._labels))
        if batch.epoch is not None and self._augment is not unchanged:
            images = self._augment(images, move(batch.indices, self._device), self._seed, batch.epoch)
        return self._pixels.convert(images), labels

    def prefetch(self, batches: Iterable[BatchRequest]) -> None:
        """Do nothing: all samples are at hand."""

    def close(self) -> None:
        """Do nothing."""

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
        return _open(settings, _in_files(settings, seed), {}, seed, device, pixels)
    names: tuple[Split, ...] = ("train", "test", *(("validation",) if settings.validation_size is not None else ()))
    opened = {split: load_data(settings, split, seed) for split in names}
    in_memory = {split: images for split, images in opened.items() if isinstance(images, ImageSet)}
    if settings.normalize and "train" in in_memory:
        pixels = PixelFormat(dtype, memory_format, channel_statistics(in_memory["train"].images))
    if len(in_memory) < len(opened) or is_plugin(settings.augment):
        return _open(settings, _in_python(settings, opened, seed), opened, seed, device, pixels)
    made = {
        split: Samples(images, device, seed, settings.augment if split == "train" else "none", pixels)
        for split, images in in_memory.items()
    }
    identity = f"{in_memory['train'].identity} {in_memory['test'].identity}".strip()
    return Splits(train=made["train"], test=made["test"], validation=made.get("validation"), identity=identity)


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


STATISTICS_SAMPLES = 1000
_STATISTICS_PART = 100
_TRIED = 4

_Listed = TypeVar("_Listed", bound="Listing")


class Listing(Protocol):
    """The samples of a split, in their order: what each is made from, and its label."""

    @property
    def labels(self) -> Tensor | None:
        """Int64 [n]; none where a label is known once its sample has been read."""

    def __len__(self) -> int: ...

    def reference(self, sample: int) -> Any:
        """Return what a sample is made from: a path, a part of a file, or an index in a data set."""

    def select(self: _Listed, samples: Tensor) -> _Listed:
        """Return the listing of `samples`, int64, in their order."""

    def digest(self) -> str:
        """Return what names this listing."""


@dataclass(frozen=True)
class IndexListing:
    """Samples of a data set in Python, by their index in it."""

    name: str
    indices: Tensor
    """int64 [n]"""
    labels: Tensor | None = None

    def __len__(self) -> int:
        return len(self.indices)

    def reference(self, sample: int) -> int:
        """Return the index of a sample in the data set."""
        return int(self.indices[sample])

    def select(self, samples: Tensor) -> IndexListing:
        """Return the listing of `samples`, int64, in their order."""
        return IndexListing(self.name, self.indices[samples], None if self.labels is None else self.labels[samples])

    def digest(self) -> str:
        """Return its name and length; what a user's code reads is not looked into."""
        return f"{self.name} {len(self)}"


class LoadedSamples:
    """The samples of one split. What is augmented, and how, depends on (seed, epoch, sample)."""

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
        """Take samples of `listing` from `decoder`, which it may share with others; training alone is augmented."""
        self.classes = settings.image_format.classes
        self.shape = settings.image_format.shape
        self._split = split
        # what is held out of a Dataset is a part of its training split
        self._source: Split = "train" if split == "validation" and listing.labels is None else split
        self._listing = listing
        self._decoder = decoder
        self._device = device
        self._seed = seed
        self._pixels = PixelFormat() if pixels is None else pixels
        is_encoded, augment = settings.name in ENCODED, settings.augment if split == "train" else "none"
        self._is_cropped = is_encoded and augment == "crop-flip"
        # a user's code may draw anew each epoch
        self._has_epochs = self._is_cropped or (split == "train" and _is_by_plugin(settings))
        self.has_own_order = not is_encoded
        """Whether the seed has not shuffled it."""
        self._augment = unchanged if is_encoded or is_plugin(augment) else AUGMENTATIONS[augment]

    def __len__(self) -> int:
        return len(self._listing)

    def read(self, batch: BatchRequest) -> tuple[Tensor, Tensor]:
        """Return inputs [n, C, H, W] and labels int64 [n] of `batch`."""
        made, labels = self.made(batch)
        images = made.to(self._device, non_blocking=True)
        if batch.epoch is not None and self._augment is not unchanged:
            images = self._augment(images, move(batch.indices, self._device), self._seed, batch.epoch)
        return self._pixels.convert(images), move(labels, self._device)

    def prefetch(self, batches: Iterable[BatchRequest]) -> None:
        """Have the loader processes begin what will be asked for next."""
        self._decoder.prefetch(map(self._order, batches))

    def close(self) -> None:
        """End the loader processes, also for those who share them."""
        self._decoder.close()

    def made(self, batch: BatchRequest) -> tuple[Tensor, Tensor]:
        """Return images as bytes, uint8 [n, C, H, W], ready to be copied to the device, and labels, int64 [n]."""
        count = batch.indices.numel()
        images = staging_buffer((count, *self.shape), torch.uint8, self._device)
        labels = torch.zeros(count, dtype=torch.int64)
        self._decoder.fetch(self._order(batch), images, labels)
        return images, labels if self._listing.labels is None else self._listing.labels[batch.indices]

    def _order(self, batch: BatchRequest) -> Order:
        indices = batch.indices
        epoch = batch.epoch if self._has_epochs else None

        def work(start: int, stop: int) -> Work:
            part = indices[start:stop]
            numbers = part.tolist()
            references = [self._listing.reference(sample) for sample in numbers]
            is_cropped = self._is_cropped and epoch is not None
            draws = augmentation_draws(part, self._seed, epoch or 0).tolist() if is_cropped else None
            return Work(references, draws, self._source, numbers, epoch)

        return Order((self._split, epoch, indices.numpy().tobytes()), indices.numel(), work)


def augmentation_draws(samples: Tensor, seed: int, epoch: int) -> Tensor:
    """Return the uniforms that augment each of `samples`, int64 [n], in `epoch`: float32 [n, DRAWS]."""
    return uniform(key(seed, "random resized crop", epoch), samples.unsqueeze(1) * DRAWS + torch.arange(DRAWS))


def list_encoded(settings: DataSettings, split: Split, seed: int) -> Listing:
    """Return the images of a split of data sets in `config.ENCODED`, all of them.

    Raises:
        UsageError: files are missing, or are not as they must be.
    """
    if settings.name == "imagefolder":
        return list_split(settings.folder, split, settings.image_format.classes, seed)
    of_files = {"parquet": list_parquet, "webdataset": list_shards, "huggingface": list_saved}[settings.name]
    listing: PackedListing = of_files(settings, split, seed)
    return listing


def _in_files(settings: DataSettings, seed: int) -> dict[Split, Listing]:
    """Return the splits of encoded images. Raises UsageError where the files are not as they must be."""
    train, test = (list_encoded(settings, split, seed) for split in ("train", "test"))
    if isinstance(train, FolderListing) and isinstance(test, FolderListing):
        check_same_classes(train, test)
    assert train.labels is not None
    listings: dict[Split, Listing] = {"train": train, "test": test}
    return listings | _divided(train, train.labels, settings, seed)


def _in_python(
    settings: DataSettings, opened: Mapping[Split, ImageSet | MapDataset], seed: int
) -> dict[Split, Listing]:
    """Return the splits of map-style Datasets, or of image sets that a user's code augments."""
    listings: dict[Split, Listing] = {}
    for split, source in opened.items():
        labels = source.labels if isinstance(source, ImageSet) else None
        name = source.identity if isinstance(source, ImageSet) else f"{settings.name} {split}"
        listings[split] = IndexListing(name, torch.arange(len(source)), labels)
    source, is_divided = opened["train"], (settings.train_size, settings.validation_size) != (None, None)
    if is_divided and not isinstance(source, ImageSet):
        listings |= _divided(listings["train"], labels_of(source, settings, "train", seed), settings, seed)
    return listings


def _divided(whole: Listing, labels: Tensor, settings: DataSettings, seed: int) -> dict[Split, Listing]:
    kept, held_out = divided(labels, settings, seed)
    parts: dict[Split, Listing] = {"train": whole.select(kept)}
    if held_out is not None:
        parts["validation"] = whole.select(held_out)
    return parts


def _is_by_plugin(settings: DataSettings) -> bool:
    return is_plugin(settings.name) or is_plugin(settings.augment)


def _open(
    settings: DataSettings,
    listings: dict[Split, Listing],
    opened: Mapping[Split, ImageSet | MapDataset],
    seed: int,
    device: torch.device,
    pixels: PixelFormat,
) -> Splits:
    """Return the samples of `listings`, which share the loader processes.

    Some samples of a user's code are read at once, so that a mistake in it is found before the first step. Images of
    files are normalized by 1,000 of the training images, chosen by the seed, as they are without augmentation.
    """
    shape, loaders, recipe = settings.image_format.shape, settings.loader_workers, ""
    here = Decoder(EncodedImages())
    if _is_by_plugin(settings):
        here = Decoder(PluginSamples(settings, seed, opened))
        recipe = Recipe(settings=settings, seed=seed).model_dump_json()
    decoder = LoaderProcesses(loaders, shape, recipe) if loaders else here
    if recipe:
        for split, listing in listings.items():
            tried = LoadedSamples(split, listing, here, settings, torch.device("cpu"), seed)
            # from all over the split
            chosen = torch.linspace(0, len(tried) - 1, min(_TRIED, len(tried))).long()
            for epoch in (None, 0):
                tried.read(BatchRequest(chosen, epoch))
    if settings.normalize and pixels.statistics is None:
        plain = LoadedSamples("train", listings["train"], decoder, settings, torch.device("cpu"), seed)
        try:
            pixels = replace(pixels, statistics=statistics_of_parts(_some_images(plain, seed)))
        except CodedError:
            decoder.close()
            raise
    made = {
        split: LoadedSamples(split, listing, decoder, settings, device, seed, pixels)
        for split, listing in listings.items()
    }
    identity = f"{listings['train'].digest()} {listings['test'].digest()}"
    return Splits(train=made["train"], test=made["test"], validation=made.get("validation"), identity=identity)


def _some_images(samples: LoadedSamples, seed: int) -> Iterator[Tensor]:
    """Yield images that the seed has chosen, in parts: of files the first, which it has shuffled to the front."""
    order = torch.arange(len(samples))
    if samples.has_own_order:
        order = torch.randperm(len(samples), generator=generator(seed, "statistics"))
    parts = [BatchRequest(part) for part in torch.split(order[:STATISTICS_SAMPLES], _STATISTICS_PART)]
    samples.prefetch(parts)
    return (samples.made(part)[0] for part in parts)
