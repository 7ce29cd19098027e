"""The readers of data sets, by name, and the synthetic data set.

A new data set is a reader and a row here, a row in `config.DATA_SETS`, and its name in `DataSettings`.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, replace

import torch
from torch import Tensor
from torch.utils.data import Dataset

from dist_train.config import DataSettings
from dist_train.config.plugins import call_plugin, failing_clearly, is_plugin
from dist_train.data.columns import find_arrays, find_parquet, find_saved, parquet_index, read_arrays, saved_index
from dist_train.data.encoded import FileFinder, FileIndexer, list_folder, packed_listing, shard_index, split_files
from dist_train.data.images import DataSource, ImageSet, Listing, MapDataset, Split, check_labels
from dist_train.data.plan import divided
from dist_train.data.published import find_cifar, find_fashion_mnist, read_cifar, read_fashion_mnist
from dist_train.outcome import PluginResultError, UsageError
from dist_train.reproducible import generator, key, seeded_generators


@dataclass(frozen=True)
class Reader:
    """How the files of a data set are read; both functions raise UsageError if they are missing or damaged."""

    read: Callable[[DataSettings, Split, int], ImageSet | Listing]  # of settings, split, seed; a listing if encoded
    find: Callable[[DataSettings, Split], object] | None = None  # reads no image; None without files


def load_data(settings: DataSettings, split: Split, seed: int) -> DataSource:
    """Return all images of train or test; encoded ones are listed, shuffled by the seed, and a Dataset is not read yet.

    `plan.divided` says which of the training images are trained on. Raises UsageError if files are missing or damaged,
    or hold no image.
    """
    images = (_plugin if is_plugin(settings.name) else READERS[settings.name].read)(settings, split, seed)
    if len(images) == 0:
        place = f" in {settings.folder}" if settings.root is not None else ""
        raise UsageError(f"{settings.name} holds no {split} images{place}: both splits need some", code="data-counts")
    if isinstance(images, ImageSet):
        assert images.shape == settings.image_format.shape
        assert images.classes == settings.image_format.classes
    return images


def find_data(settings: DataSettings) -> None:
    """Check that the files of both splits are there, without reading their images. Raises UsageError."""
    reader = READERS.get(settings.name)
    if reader is not None and reader.find is not None:
        train, _ = (reader.find(settings, split) for split in ("train", "test"))
        if isinstance(train, Listing) and train.labels is not None:
            divided(train.labels, settings, seed=0)


def _packed(find: FileFinder, index_of: FileIndexer) -> Reader:
    return Reader(lambda settings, split, seed: packed_listing(settings, split, seed, find, index_of), find)


def _synthetic(settings: DataSettings, split: Split, seed: int) -> ImageSet:
    samples = settings.synthetic_samples if split == "train" else max(1, settings.synthetic_samples // 4)
    return make_synthetic(settings.synthetic_shape, settings.synthetic_classes, samples, split, seed)


def _plugin(settings: DataSettings, split: Split, seed: int) -> ImageSet | MapDataset:
    # both splits have the same draws: the parts of a permutation then do not overlap
    with seeded_generators(key(seed, "data set")):
        images: ImageSet | MapDataset = call_plugin(settings.name, settings.options, object, settings, split, seed)
    if not isinstance(images, ImageSet):
        has_both = hasattr(images, "__len__") and hasattr(images, "__getitem__")
        if has_both and getattr(type(images), "__getitem__", None) is not Dataset.__getitem__:  # torch's, which raises
            with failing_clearly(settings.name):
                len(images)
            return images
        raise PluginResultError(
            f"{settings.name} returned {type(images).__name__} for {split}, neither an ImageSet nor a map-style "
            f"Dataset (with __len__ and __getitem__)"
        )
    if (images.shape, images.classes) != (settings.shape, settings.classes):
        raise UsageError(
            f"{settings.name} returned images of shape {list(images.shape)} in {images.classes} classes: "
            f"set data.shape and data.classes accordingly",
            code="plugin-data-form",
        )
    check_labels(images.labels, images.classes, f"{settings.name} ({split})", code="plugin-data-form")
    return replace(images, identity=images.identity or images.digest())


READERS: Mapping[str, Reader] = {
    "fashion-mnist": Reader(read_fashion_mnist, lambda settings, split: find_fashion_mnist(settings.root, split)),
    **dict.fromkeys(("cifar10", "cifar100"), Reader(read_cifar, find_cifar)),
    "imagefolder": Reader(list_folder, list_folder),
    "parquet": _packed(find_parquet, parquet_index),
    "webdataset": _packed(lambda settings, split: split_files(settings.folder, split, ".tar"), shard_index),
    "huggingface": _packed(find_saved, saved_index),
    "numpy": Reader(lambda settings, split, seed: read_arrays(settings, split), find_arrays),
    "synthetic": Reader(_synthetic),
}


_GRID = 4
_CONTRAST = 48
_NOISE = 64
_GREY = 128
_CHUNK = 4096


def make_synthetic(shape: tuple[int, int, int], classes: int, samples: int, split: Split, seed: int) -> ImageSet:
    """Return `samples` images, each with the coarse pattern of its class, common to both splits, plus noise.

    Only integers are drawn and added, so that every machine makes the same bytes. Classes are as equal in size as
    `samples` allows.
    """
    patterns = _patterns(shape, classes, seed)
    shuffle = torch.randperm(samples, generator=generator(seed, "synthetic labels", split))
    labels = (torch.arange(samples) % classes)[shuffle]
    images = torch.empty((samples, *shape), dtype=torch.uint8)
    for index, start in enumerate(range(0, samples, _CHUNK)):
        part = slice(start, min(start + _CHUNK, samples))
        source = generator(seed, "synthetic noise", split, index)
        noise = torch.randint(-_NOISE, _NOISE + 1, images[part].shape, dtype=torch.int16, generator=source)
        images[part] = noise.add_(patterns[labels[part]]).clamp_(0, 255).to(torch.uint8)
    return ImageSet(images, labels, classes)


def _patterns(shape: tuple[int, int, int], classes: int, seed: int) -> Tensor:
    """Return a pattern of coarse blocks for each class, int16 [classes, C, H, W]."""
    channels, height, width = shape
    source = generator(seed, "synthetic patterns")
    blocks = torch.randint(
        -_CONTRAST, _CONTRAST + 1, (classes, channels, _GRID, _GRID), dtype=torch.int16, generator=source
    )
    rows = torch.arange(height) * _GRID // height
    columns = torch.arange(width) * _GRID // width
    return blocks[:, :, rows][:, :, :, columns] + _GREY
