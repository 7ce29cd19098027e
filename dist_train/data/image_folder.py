"""A folder of images, one subfolder a class: its files in an order that the seed shuffles, and their samples.

Images are decoded when they are due, ahead of time where there are loader processes.
"""

from __future__ import annotations

import hashlib
import os
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass, replace
from pathlib import Path

import torch
from torch import Tensor

from dist_train.config import DataSettings
from dist_train.data.decoders import Decoder, LoaderProcesses, Order
from dist_train.data.decoding import CHANNELS, DRAWS, Work
from dist_train.data.images import BatchRequest, Split, Splits
from dist_train.data.pixels import PixelFormat, move, staging_buffer, statistics_of_parts
from dist_train.data.plan import balanced_choice, others, stratified_choice
from dist_train.outcome import FaultError, UsageError
from dist_train.randomness import generator, key, uniform

STATISTICS_SAMPLES = 1000
_STATISTICS_PART = 100
SUFFIXES = (".jpg", ".jpeg", ".png", ".ppm", ".bmp", ".pgm", ".tif", ".tiff", ".webp")

_FOLDERS: dict[Split, tuple[str, ...]] = {"train": ("train",), "validation": ("train",), "test": ("val", "test")}
_LAYOUT = "an image folder holds train/CLASS/*.jpg and val/CLASS/*.jpg (or test/...)"


@dataclass(frozen=True)
class Listing:
    """The files of a split, in the order of its samples: class names, and each file's name and class."""

    folder: Path
    classes: tuple[str, ...]
    names: Sequence[str]
    labels: Tensor
    """int64 [files]"""

    def __len__(self) -> int:
        return len(self.names)

    def path(self, sample: int) -> str:
        """Return the file of `sample`."""
        return os.path.join(self.folder, self.classes[int(self.labels[sample])], self.names[sample])

    def digest(self) -> str:
        """Return what names this listing: its classes and files in their order, not what is in the files."""
        hashed = hashlib.sha256("\0".join((*self.classes, *self.names)).encode("utf-8", "surrogateescape"))
        hashed.update(self.labels.numpy().tobytes())
        return hashed.hexdigest()[:16]

    def select(self, samples: Tensor) -> Listing:
        """Return the listing of `samples`, int64, in their order."""
        names = [self.names[sample] for sample in samples.tolist()]
        return Listing(self.folder, self.classes, names, self.labels[samples])


def list_split(root: Path, split: Split, classes: int, seed: int) -> Listing:
    """Return the files of `split` below `root`, shuffled by the seed: any first part of them is of all classes.

    Classes are numbered by their sorted names. Nothing depends on the order in which the file system lists.

    Raises:
        UsageError: a folder is missing, a class is empty, or there are not `classes` classes.
    """
    listing = _scan(_folder(root, split), classes)
    return listing.select(torch.randperm(len(listing), generator=generator(seed, "image folder", split)))


def training_subset(listing: Listing, size: int | None, seed: int) -> Listing:
    """Return `size` files, as many of each class as there are, in their old order; all of them without `size`.

    Raises:
        UsageError: there are fewer.
    """
    if size is None:
        return listing
    return listing.select(balanced_choice(listing.labels, size, len(listing.classes), seed))


def held_out(listing: Listing, size: int | None, seed: int) -> tuple[Listing, Listing | None]:
    """Return the files that are trained on, and the `size` ones held out of them, in the classes' shares.

    Raises:
        UsageError: none would be left.
    """
    if size is None:
        return listing, None
    chosen = stratified_choice(listing.labels, size, len(listing.classes), seed)
    return listing.select(others(chosen, len(listing))), listing.select(chosen)


def check_same_classes(train: Listing, test: Listing) -> None:
    """Raise UsageError where the two splits name their classes differently."""
    differing = sorted(set(train.classes) ^ set(test.classes))
    if differing:
        raise UsageError(
            f"{train.folder} and {test.folder} hold different classes: {differing[0]} is in one of them alone",
            code="classes-differ",
        )


def _folder(root: Path, split: Split) -> Path:
    candidates = [root / name for name in _FOLDERS[split]]
    found = next((folder for folder in candidates if folder.is_dir()), None)
    if found is None:
        raise UsageError(
            f"there is no folder {' or '.join(map(str, candidates))}: {_LAYOUT}; set data.root to it",
            code="image-folder-missing",
        )
    return found


def _scan(folder: Path, classes: int) -> Listing:
    try:
        with os.scandir(folder) as entries:
            class_names = sorted(entry.name for entry in entries if _is_visible(entry) and entry.is_dir())
        files = [_images_in(folder / name) for name in class_names]
    except OSError as error:
        raise UsageError(
            f"cannot list {error.filename or folder}: {error.strerror or error}", code="image-folder-unreadable"
        ) from error
    if len(class_names) != classes:
        fix = f"set data.classes to {len(class_names)}" if len(class_names) > 1 else _LAYOUT
        raise UsageError(
            f"{folder} holds {len(class_names)} class folders, but data.classes is {classes}: {fix}", code="class-count"
        )
    for name, images in zip(class_names, files, strict=True):
        if not images:
            raise UsageError(
                f"the class folder {folder / name} holds no image ({', '.join(SUFFIXES)}): "
                f"fill it, or remove it and set data.classes to {classes - 1}",
                code="class-empty",
            )
    counts = torch.tensor([len(images) for images in files])
    names = [name for images in files for name in images]
    return Listing(folder, tuple(class_names), names, torch.arange(classes).repeat_interleave(counts))


def _images_in(folder: Path) -> list[str]:
    with os.scandir(folder) as entries:
        return sorted(entry.name for entry in entries if _is_visible(entry) and entry.name.lower().endswith(SUFFIXES))


def _is_visible(entry: os.DirEntry[str]) -> bool:
    return not entry.name.startswith(".")


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

    def read(self, batch: BatchRequest) -> tuple[Tensor, Tensor]:
        """Return inputs [n, C, H, W] and labels int64 [n] of `batch`."""
        images = self.decoded(batch).to(self._device, non_blocking=True)
        labels = move(self._listing.labels[batch.indices], self._device)
        return self._pixels.convert(images), labels

    def prefetch(self, batches: Iterable[BatchRequest]) -> None:
        """Have the loader processes begin what will be asked for next."""
        self._decoder.prefetch(map(self._order, batches))

    def close(self) -> None:
        """End the loader processes, also for those who share them."""
        self._decoder.close()

    def decoded(self, batch: BatchRequest) -> Tensor:
        """Return images as bytes, uint8 [n, C, H, W], ready to be copied to the device."""
        images = staging_buffer((batch.indices.numel(), *self.shape), torch.uint8, self._device)
        self._decoder.fetch(self._order(batch), images)
        return images

    def _order(self, batch: BatchRequest) -> Order:
        indices = batch.indices
        epoch = batch.epoch if self._augments else None

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
    assert settings.root is not None
    assert settings.classes is not None
    train_files = list_split(settings.root, "train", settings.classes, seed)
    test_files = list_split(settings.root, "test", settings.classes, seed)
    check_same_classes(train_files, test_files)
    train_files, validation_files = held_out(train_files, settings.validation_size, seed)
    train_files = training_subset(train_files, settings.train_size, seed)
    size = settings.image_size
    decoder = LoaderProcesses(settings.loader_workers, size) if settings.loader_workers else Decoder()
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
        validation=None
        if validation_files is None
        else FolderSamples(validation_files, decoder, size, device, seed, "none", pixels),
        identity=f"{train_files.digest()} {test_files.digest()}",
    )


def _first_images(samples: FolderSamples, count: int) -> Iterator[Tensor]:
    """Yield the first images, which the seed has shuffled to the front, in parts."""
    parts = [BatchRequest(part) for part in torch.split(torch.arange(min(count, len(samples))), _STATISTICS_PART)]
    samples.prefetch(parts)
    return map(samples.decoded, parts)
