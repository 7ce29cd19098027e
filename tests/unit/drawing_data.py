"""Data sets and augmentations that draw from the global generators, as users' own do."""

from __future__ import annotations

import random
from typing import Any

import numpy as np
import torch
from torch import Tensor
from torch.utils.data import Dataset, TensorDataset, random_split

SIZE = 12


class Drawing(Dataset[Any]):
    """Images of two classes that differ at each reading, and count how often they are read."""

    def __init__(self, count: int) -> None:
        self.count = count
        self.readings = 0

    def __len__(self) -> int:
        return self.count

    def __getitem__(self, index: int) -> tuple[Tensor, int]:
        self.readings += 1
        image = torch.randint(0, 100, (3, SIZE, SIZE), dtype=torch.uint8)
        image[:, :, index % 2 :: 2] += 100
        image[0, 0, 0] = random.randrange(256)
        image[1, 0, 0] = int(np.random.randint(256))
        return image, index % 2


def drawing(settings: Any, split: str, seed: int, options: dict[str, Any]) -> Dataset[Any]:
    return Drawing(options.get(split, 24))


class Numbered(Dataset[Any]):
    """Images of one colour each, its number, and two classes, in an order that is drawn at the start."""

    def __init__(self) -> None:
        python, numpy = list(range(48)), np.random.permutation(48)
        random.shuffle(python)
        self.order = [int(numpy[each]) for each in python]

    def __len__(self) -> int:
        return len(self.order)

    def __getitem__(self, index: int) -> tuple[Tensor, int]:
        return torch.full((3, SIZE, SIZE), self.order[index], dtype=torch.uint8), index % 2


def halves(settings: Any, split: str, seed: int) -> Dataset[Any]:
    """Return one half of a data set that is divided at random."""
    train, test = random_split(Numbered(), [24, 24])
    return train if split == "train" else test


def generated(settings: Any, split: str, seed: int) -> Dataset[Any]:
    """Return images that are drawn at the start."""
    images = torch.randint(256, (8, 3, SIZE, SIZE), dtype=torch.uint8)
    return TensorDataset(images, torch.arange(8) % 2)


def raised(images: Any) -> Any:
    """Add a number to each image that is drawn once."""
    added = int(torch.randint(100, ())) + random.randrange(50) + int(np.random.randint(50))
    return lambda image: image + added


class OwnDraws:
    """Mirrors images, drawn from a generator of its own, as albumentations does."""

    def __init__(self) -> None:
        self.generator = np.random.default_rng(0)

    def __call__(self, image: Tensor) -> Tensor:
        return image.flip(-1) if self.generator.random() < 0.5 else image


def mirrored(images: Any) -> Any:
    return OwnDraws()


class Mirrored(Drawing):
    """A data set that is augmented by draws of its own."""

    mirror = OwnDraws()

    def __getitem__(self, index: int) -> tuple[Tensor, int]:
        image, label = super().__getitem__(index)
        return self.mirror(image), label


def mirroring(settings: Any, split: str, seed: int) -> Dataset[Any]:
    return Mirrored(24) if split == "test" else Drawing(24)


def erased(images: Any, options: dict[str, Any]) -> Any:
    """Crop to the size that is wanted, mirror, and erase a part: all drawn by torchvision."""
    from torchvision.transforms import v2

    size = images.shape[1:]
    steps = [v2.PILToTensor(), v2.RandomResizedCrop(size, antialias=True), v2.RandomHorizontalFlip()]
    return v2.Compose([*steps, v2.RandomErasing(options.get("chance", 0.5))])


def inverted(images: Any) -> Any:
    """Invert an image, a tensor or an array, in place."""

    def invert(image: Any) -> Any:
        image[:] = 255 - image
        return image

    return invert


def failing(images: Any) -> Any:
    return lambda image: image.no_such_method()


def floats(images: Any) -> Any:
    return lambda image: torch.zeros(images.shape)


def as_array(images: Any, options: dict[str, Any]) -> Any:
    """Return the image with its axes in the order of the option `axes`, as a NumPy array or a tensor."""
    convert = torch.from_numpy if options.get("as_tensor") else np.asarray
    return lambda image: convert(image.numpy().transpose(options["axes"]))


def nothing(images: Any) -> None:
    return None


def broken(settings: Any, split: str, seed: int, options: dict[str, Any]) -> Any:
    """Return a data set of which one sample is not as it must be."""

    class Broken(Drawing):
        def __getitem__(self, index: int) -> tuple[Tensor, int]:
            image, label = super().__getitem__(index)
            if index != options["index"]:
                return image, label
            if options["how"] == "raises":
                raise KeyError("no such picture")
            if options["how"] == "interrupts":
                raise OSError("cannot be read")
            return {"label": (image, 9), "shape": (image[:, 1:], 0), "float": (image / 255, 0)}[options["how"]]

    return Broken(24)
