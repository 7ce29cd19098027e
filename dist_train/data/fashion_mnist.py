"""Fashion-MNIST from its four IDX files, as Debian's package installs them or in a folder of the user's."""

from __future__ import annotations

from pathlib import Path

import torch

from dist_train.data.folders import data_sets_folder
from dist_train.data.idx import read_idx
from dist_train.data.images import ImageSet, Split
from dist_train.outcome import UsageError

VERSION = 1
CLASSES = 10
DEBIAN_FOLDER = Path("/usr/share/datasets/fashion-mnist")

_STEMS = {
    "train": ("train-images-idx3-ubyte", "train-labels-idx1-ubyte"),
    "test": ("t10k-images-idx3-ubyte", "t10k-labels-idx1-ubyte"),
}
_SIDE = 28
_FIX = (
    "Fetch the files with `apt-get install dataset-fashion-mnist` (without root: `docker/fashion_mnist.sh`), "
    "or set data.root to a folder that holds the four IDX files (plain or .gz)."
)


def find(root: Path | None, split: Split) -> tuple[Path, Path]:
    """Return the files with the images and the labels of `split`.

    Without `root`, Debian's folder is searched, then `datasets/fashion-mnist` in the cache folder.
    Raises UsageError when a file is missing.
    """
    folders = [root] if root is not None else [DEBIAN_FOLDER, data_sets_folder() / "fashion-mnist"]
    for folder in folders:
        images, labels = (_existing(folder, stem) for stem in _STEMS[split])
        if images is not None and labels is not None:
            return images, labels
    missing = [stem for stem in _STEMS[split] if all(_existing(folder, stem) is None for folder in folders)]
    names = " and ".join(f"{stem}[.gz]" for stem in missing or _STEMS[split])
    places = " or ".join(map(str, folders))
    raise UsageError(f"Fashion-MNIST: {names} not found in {places}. {_FIX}")


def decode(files: tuple[Path, Path]) -> ImageSet:
    """Return the images and labels in the two files; UsageError when they are damaged or do not fit."""
    images_file, labels_file = files
    pixels = read_idx(images_file, 3, _FIX)
    labels = read_idx(labels_file, 1, _FIX)
    if len(pixels) == 0 or pixels.shape[1:] != (_SIDE, _SIDE):
        found = " x ".join(map(str, pixels.shape))
        raise UsageError(f"{images_file} is damaged: it holds {found} pixels, not images of 28 x 28. {_FIX}")
    if len(labels) != len(pixels):
        raise UsageError(
            f"{images_file} holds {len(pixels)} images but {labels_file} holds {len(labels)} labels: "
            f"one of them is damaged. {_FIX}"
        )
    if labels.max() >= CLASSES:
        raise UsageError(f"{labels_file} is damaged: it holds the label {labels.max()}, not 0 to {CLASSES - 1}. {_FIX}")
    # The arrays are views of bytearrays, hence writable, so that torch takes them as they are.
    return ImageSet(torch.from_numpy(pixels).unsqueeze(1), torch.from_numpy(labels).long(), CLASSES)


def _existing(folder: Path, stem: str) -> Path | None:
    candidates = (folder / stem, folder / f"{stem}.gz")
    return next((path for path in candidates if path.is_file()), None)
