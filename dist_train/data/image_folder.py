"""Image folders with a subfolder for each class: lists their files, shuffled by the seed."""

from __future__ import annotations

import os
from pathlib import Path

import torch

from dist_train.data.images import Listing, Split, digest_of
from dist_train.outcome import UsageError, reading
from dist_train.reproducible import generator

SUFFIXES = (".jpg", ".jpeg", ".png", ".ppm", ".bmp", ".pgm", ".tif", ".tiff", ".webp")

_FOLDERS: dict[Split, tuple[str, ...]] = {"train": ("train",), "validation": ("train",), "test": ("val", "test")}
_LAYOUT = "an image folder holds train/CLASS/*.jpg and val/CLASS/*.jpg (or test/...)"


def list_split(root: Path, split: Split, classes: int, seed: int) -> Listing:
    """Return the files of `split` below `root`, shuffled by the seed, so that any prefix has images of all classes.

    Classes are numbered by their sorted names. Nothing depends on the order in which the file system lists files.
    Raises UsageError if a folder is missing, a class is empty, or the number of classes is not `classes`.
    """
    listing = _scan(_folder(root, split), classes)
    return listing.select(torch.randperm(len(listing), generator=generator(seed, "image folder", split)))


def check_same_classes(root: Path) -> None:
    """Raise UsageError if the two splits below `root` have different class names."""
    train, test = (_folder(root, split) for split in ("train", "test"))
    if differing := sorted(set(_classes(train)) ^ set(_classes(test))):
        raise UsageError(
            f"{train} and {test} hold different classes: only one of them has {differing[0]}", code="classes-differ"
        )


def _folder(root: Path, split: Split) -> Path:
    candidates = [root / name for name in _FOLDERS[split]]
    folder = next((each for each in candidates if each.is_dir()), None)
    if folder is None:
        raise UsageError(
            f"there is no folder {' or '.join(map(str, candidates))}: {_LAYOUT}; set data.root to it",
            code="image-folder-missing",
        )
    return folder


def _classes(folder: Path) -> list[str]:
    with reading(folder, code="image-folder-unreadable"), os.scandir(folder) as entries:
        return sorted(entry.name for entry in entries if _is_visible(entry) and entry.is_dir())


def _scan(folder: Path, classes: int) -> Listing:
    class_names = _classes(folder)
    with reading(folder, code="image-folder-unreadable"):
        files = [_images_in(folder / name) for name in class_names]
    if len(class_names) != classes:
        fix = f"set data.classes to {len(class_names)}" if len(class_names) > 1 else _LAYOUT
        raise UsageError(
            f"{folder} holds {len(class_names)} class folders, but data.classes is {classes}: {fix}", code="class-count"
        )
    for name, images in zip(class_names, files, strict=True):
        if not images:
            raise UsageError(
                f"the class folder {folder / name} holds no image ({', '.join(SUFFIXES)}): "
                "fill it, or remove it and lower data.classes",
                code="class-empty",
            )
    counts = torch.tensor([len(images) for images in files])
    paths = [os.path.join(name, image) for name, images in zip(class_names, files, strict=True) for image in images]
    labels, source = torch.arange(classes).repeat_interleave(counts), digest_of("\0".join(paths))
    return Listing(lambda number: os.path.join(folder, paths[number]), torch.arange(len(paths)), labels, source)


def _images_in(folder: Path) -> list[str]:
    """Return the images in `folder` and the folders below it, as sorted paths relative to it."""
    with os.scandir(folder) as entries:
        visible = [entry for entry in entries if _is_visible(entry)]
    images = [entry.name for entry in visible if entry.name.lower().endswith(SUFFIXES)]
    below = [entry.name for entry in visible if not entry.name.lower().endswith(SUFFIXES) and entry.is_dir()]
    images.extend(os.path.join(name, image) for name in below for image in _images_in(folder / name))
    return sorted(images)


def _is_visible(entry: os.DirEntry[str]) -> bool:
    return not entry.name.startswith(".")
