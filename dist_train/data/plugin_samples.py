"""Samples that a plug-in reads (from a map-style Dataset, one at a time) or augments (images of any data set).

The plug-in may draw from the global generators of torch, NumPy and Python. They are seeded before each sample from
(seed, split, epoch, sample), so that draws do not depend on which process makes the sample, or what it made before. So
are they before the plug-in is called for its data set or transform, which each process does for itself.
"""

from __future__ import annotations

import copy
import logging
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from typing import Any, cast

import numpy as np
import torch
from numpy.typing import NDArray
from PIL import Image
from pydantic import BaseModel
from torch import Tensor

from dist_train.config import DataSettings
from dist_train.config.plugins import call_plugin, failing_clearly, is_plugin
from dist_train.data.catalog import load_data
from dist_train.data.decoding import EncodedImages, Work, fitted
from dist_train.data.images import DataSource, ImageSet, Listing, Split, channels_first
from dist_train.outcome import PluginResultError, UsageError
from dist_train.reproducible import key, preserved_generators, seed_generators, seeded_generators

_NOT_COLOURS = ("P", "PA", "1")  # modes of Pillow: numbers of colours in a palette, or one bit
_COLOURS = ("L", "LA", "RGB", "RGBA", "CMYK")

_MANY = 10_000  # samples, which may take minutes to hours to read

Augment = Callable[[Any], Any]
_logger = logging.getLogger("dist_train.data")


class Recipe(BaseModel):
    """What a loader process needs to know to make samples."""

    settings: DataSettings
    seed: int


class PluginSamples:
    """Makes samples with the plug-ins that `settings` name."""

    def __init__(self, settings: DataSettings, seed: int, opened: Mapping[Split, DataSource]) -> None:
        self._settings = settings
        self._shape = settings.image_format.shape
        self._seed = seed
        self._opened = dict(opened)
        self._files = EncodedImages()
        self._augment = _augment_of(settings, seed)

    def read(self, work: Work, pixels: NDArray[np.uint8], labels: NDArray[np.int64]) -> None:
        """Write the samples of `work` to `pixels` [n, C, H, W] and `labels` [n]; seeds the generators for each."""
        split = cast(Split, work.split)
        with preserved_generators():
            for index, (reference, number) in enumerate(zip(work.references, work.numbers, strict=True)):
                seed_generators(key(self._seed, "sample", split, "plain" if work.epoch is None else work.epoch, number))
                draws = None if work.draws is None else work.draws[index]
                augment = None if work.epoch is None else self._augment
                if isinstance(reference, int):
                    name = f"sample {reference} of {self._settings.name} ({split})"
                    image, labels[index] = self._sample(split, reference, name)
                    if augment is not None:  # it may write to the image, a view of the data set's memory
                        with _naming(name, self._settings.name):
                            image = image.clone() if isinstance(image, Tensor) else copy.copy(image)
                else:
                    path = reference if isinstance(reference, str) else reference[3]
                    image, name = self._files.image(reference), f"the image {path}"
                    if augment is None:
                        pixels[index] = fitted(image, self._shape[-1], draws)
                        continue
                if augment is not None:
                    with _naming(name, self._settings.augment):
                        image = augment(image)
                pixels[index] = self._checked_pixels(image, name)

    def _sample(self, split: Split, index: int, name: str) -> tuple[Any, int]:
        if split not in self._opened:
            self._opened[split] = load_data(self._settings, split, self._seed)
        source = self._opened[split]
        if isinstance(source, ImageSet):
            return source.images[index], int(source.labels[index])
        assert not isinstance(source, Listing), "encoded images are decoded"
        with _naming(name, self._settings.name):
            match source[index]:
                case (image, label):
                    given = label.numpy(force=True) if isinstance(label, Tensor) else np.asarray(label)
                    # an integer, or one integer in an array or tensor, as in MedMNIST
                    number = int(given.item()) if given.size == 1 and given.dtype.kind in "iu" else None
                case other:
                    length = f" of length {len(other)}" if isinstance(other, tuple | list) else ""
                    raise UsageError(
                        f"the Dataset returned {type(other).__name__}{length}, not a pair (image, label)",
                        code="plugin-data-form",
                    )
        if number is None:
            shown = f"{given.dtype} of {list(given.shape)}" if given.ndim else f"{label!r:.60}"
            raise UsageError(
                f"{name} has the label {shown}, not a whole number: each image has one class (of several labels, "
                f"make each set of them a class, as docs/extending.md shows)",
                code="plugin-data-form",
            )
        if not 0 <= number < self._settings.image_format.classes:
            raise UsageError(
                f"{name} has the label {number}: data.classes is {self._settings.image_format.classes}, "
                f"labels count from 0",
                code="plugin-data-form",
            )
        return image, number

    def _checked_pixels(self, image: Any, name: str) -> NDArray[np.uint8]:
        """Return the pixels [C, H, W] of a plug-in's PIL image, array or tensor, the last two also [H, W, C] or [H, W].

        Raises UsageError if their form is wrong.
        """
        if isinstance(image, Image.Image):
            wanted = {1: "L", 3: "RGB"}.get(self._shape[0])
            if image.mode in _NOT_COLOURS or (wanted and image.mode in _COLOURS and image.mode != wanted):
                fix = f"convert({wanted!r})" if wanted else "convert('RGB'), or convert('L')"
                raise UsageError(
                    f"{name} is a PIL image of mode {image.mode}: return image.{fix}", code="plugin-data-form"
                )
        try:
            returned = image.numpy(force=True) if isinstance(image, Tensor) else np.asarray(image)
            if returned.dtype == object:
                raise TypeError("it is no array of numbers")
        except Exception as error:  # of a type that NumPy lacks, of a ragged list, or of the image's own code
            raise UsageError(
                f"{name} is {type(image).__name__}, which cannot be converted to an array ({error}): return a PIL "
                f"image, or uint8 of {list(self._shape)}",
                code="plugin-data-form",
            ) from error
        pixels = channels_first(returned[None], self._shape)
        if pixels is None or pixels.dtype != np.uint8:
            fix = "set data.shape or data.image_size accordingly, or resize it in the plug-in"
            if returned.dtype != np.uint8:
                fix = "return pixels from 0 to 255, without ToTensor, ToDtype and Normalize: see data.normalize"
            raise UsageError(
                f"{name} is {returned.dtype} of {list(returned.shape)}, not uint8 of {list(self._shape)}: {fix}",
                code="plugin-data-form",
            )
        return pixels.reshape(self._shape)


def labels_of(source: DataSource, settings: DataSettings, seed: int) -> Tensor:
    """Return all labels of the training set, int64 [n]; a Dataset's are its `targets`, as in torchvision, or read."""
    if isinstance(source, ImageSet | Listing):
        assert source.labels is not None
        return source.labels
    classes = settings.image_format.classes
    try:
        labels = np.asarray(getattr(source, "targets", None))
    except Exception:  # of the Dataset's own code, or of targets that are no array: labels are then read
        labels = np.empty(0)
    if labels.shape == (len(source),) and labels.dtype.kind in "iu" and 0 <= labels.min() <= labels.max() < classes:
        return torch.from_numpy(labels.astype(np.int64))
    _logger.log(
        logging.WARNING if len(source) > _MANY else logging.INFO,
        f"all {len(source)} samples of {settings.name} are read for their labels: give it their list, `targets`",
    )
    reader = PluginSamples(settings.model_copy(update={"augment": "none"}), seed, {"train": source})
    pixels, read = np.empty((1, *settings.image_format.shape), np.uint8), np.empty(len(source), np.int64)
    for index in range(len(source)):
        reader.read(Work([index], split="train", numbers=[index]), pixels, read[index : index + 1])
    return torch.from_numpy(read)


def _augment_of(settings: DataSettings, seed: int) -> Augment | None:
    if not is_plugin(settings.augment):
        return None
    with seeded_generators(key(seed, "augmentation")):
        augment = call_plugin(settings.augment, settings.augment_options, object, settings.image_format)
    if not callable(augment):
        raise PluginResultError(f"{settings.augment} returned {type(augment).__name__}, not a function of an image")
    return cast(Augment, augment)


@contextmanager
def _naming(name: str, plugin: str) -> Iterator[None]:
    """Turn errors of the `plugin` in the block into UsageErrors that begin with the `name` of the sample."""
    try:
        with failing_clearly(plugin):
            yield
    except UsageError as error:
        raise UsageError(f"{name}: {error}", code=error.code) from error
