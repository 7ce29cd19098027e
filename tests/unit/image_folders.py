"""Small image folders for tests."""

from __future__ import annotations

from pathlib import Path

import numpy as np
from PIL import Image

from dist_train.config import DataSettings
from dist_train.data.encoded import list_folder
from dist_train.data.images import Listing, Split

CLASSES = ("ant", "bee", "cat")


def write_image(path: Path, width: int, height: int, seed: int) -> None:
    """Write an image with a smooth gradient and some noise, which depend on `seed`."""
    random = np.random.default_rng(seed)
    rows, columns = np.mgrid[0:height, 0:width]
    tint = random.integers(0, 128, 3)
    pixels = rows[..., None] * 2 + columns[..., None] + tint + random.integers(0, 40, (height, width, 3))
    path.parent.mkdir(parents=True, exist_ok=True)
    Image.fromarray((pixels % 256).astype(np.uint8)).save(path)


def write_folder(
    root: Path, per_class: int = 8, test_per_class: int = 4, suffix: str = ".png", test_name: str = "val"
) -> Path:
    """Write train and test images of three classes, of different sizes, and return `root`."""
    for split, count in (("train", per_class), (test_name, test_per_class)):
        for number, name in enumerate(CLASSES):
            for image in range(count):
                seed = 1000 * number + image + (500 if split == "train" else 0)
                width, height = 16 + 5 * (image % 4), 16 + 3 * (image % 5)
                write_image(root / split / name / f"{image:04}{suffix}", width, height, seed)
    return root


def listed(root: Path, split: Split, classes: int, seed: int) -> Listing:
    """Return the images of a split of the image folder `root`."""
    return list_folder(DataSettings(name="imagefolder", root=root, classes=classes), split, seed)


def damage(path: Path) -> Path:
    """Cut off the second half of `path`."""
    path.write_bytes(path.read_bytes()[: path.stat().st_size // 2])
    return path
