"""The images of a small image folder in each form in which people keep images, for tests."""

from __future__ import annotations

import io
import tarfile
from collections.abc import Sequence
from pathlib import Path

import numpy as np
import pyarrow
from numpy.typing import NDArray
from pyarrow import parquet

from dist_train.config import DataSettings
from dist_train.data.catalog import load_data
from dist_train.data.decoding import EncodedImages, Part, fitted
from dist_train.data.images import ImageSet, Split
from tests.unit.image_folders import listed

SPLITS: dict[Split, str] = {"train": "train", "test": "validation"}


def decode(path: str | Part, size: int, draws: Sequence[float] | None) -> NDArray[np.uint8]:
    """Return the image in a file, or in a part of one, as uint8 [3, size, size]."""
    return fitted(EncodedImages().image(path), size, draws)


def load_images(settings: DataSettings, split: Split, seed: int) -> ImageSet:
    """Return the images of a data set that is held in memory."""
    images = load_data(settings, split, seed)
    assert isinstance(images, ImageSet)
    return images


def in_class_order(root: Path, split: Split, classes: int) -> list[tuple[bytes, int]]:
    """Return the files and labels of a split by class and name: what an image folder's listing shuffles."""
    listing = listed(root, split, classes, seed=0)
    assert listing.labels is not None
    files = sorted((int(listing.labels[sample]), listing.reference(sample)) for sample in range(len(listing)))
    return [(Path(path).read_bytes(), label) for label, path in files]


def write_parquet(folder: Path, root: Path, classes: int, files: int = 2) -> Path:
    """Write the images of the image folder `root` as Parquet files, a column of bytes and one of {bytes, path}."""
    folder.mkdir(parents=True, exist_ok=True)
    for split, name in SPLITS.items():
        samples = in_class_order(root, split, classes)
        for number, part in enumerate(parts(samples, files)):
            images = [{"bytes": content, "path": None} for content, _ in part] if number else [each for each, _ in part]
            table = pyarrow.table({"image": images, "label": [label for _, label in part]})
            parquet.write_table(table, folder / f"{name}-{number:05}-of-{files:05}.parquet", row_group_size=5)
    return folder


def write_shards(folder: Path, root: Path, classes: int, files: int = 2, suffix: str = "png") -> Path:
    """Write the images of the image folder `root` as WebDataset's shards."""
    for split, name in SPLITS.items():
        (folder / name).mkdir(parents=True)
        samples = in_class_order(root, split, classes)
        for number, part in enumerate(parts(samples, files)):
            with tarfile.open(folder / name / f"shard-{number:04}.tar", "w") as archive:
                for place, (content, label) in enumerate(part):
                    for kind, data in ((suffix, content), ("cls", str(label).encode())):
                        member = tarfile.TarInfo(f"some.folder/{number:02}{place:04}.{kind}")
                        member.size = len(data)
                        archive.addfile(member, io.BytesIO(data))
    return folder


def write_arrays(folder: Path, root: Path, classes: int, size: int, seed: int) -> Path:
    """Write the pixels of the image folder `root`, resized as without augmentation, in the order of the seed."""
    folder.mkdir()
    for split, name in SPLITS.items():
        listing = listed(root, split, classes, seed)
        assert listing.labels is not None
        pixels = [decode(listing.reference(sample), size, None) for sample in range(len(listing))]
        np.save(folder / f"{name}_images.npy", np.stack(pixels).transpose(0, 2, 3, 1))
        np.save(folder / f"{name}_labels.npy", listing.labels.numpy())
    return folder


def write_saved(folder: Path, root: Path, classes: int) -> Path:
    """Write the images of the image folder `root` as Hugging Face's `save_to_disk` does, by that."""
    import datasets

    features = datasets.Features({"image": datasets.Image(), "label": datasets.ClassLabel(num_classes=classes)})
    made = {}
    for split, name in SPLITS.items():
        samples = in_class_order(root, split, classes)
        columns = {
            "image": [{"bytes": each, "path": None} for each, _ in samples],
            "label": [each for _, each in samples],
        }
        made[name] = datasets.Dataset.from_dict(columns, features=features)
    datasets.DatasetDict(made).save_to_disk(folder, num_shards=dict.fromkeys(made, 2))
    return folder


def write_index(shard: Path) -> Path:
    """Write an index beside a shard, as DALI's wds2idx does."""
    lines: dict[str, list[str]] = {}
    with tarfile.open(shard) as archive:
        for member in archive:
            folder, _, base = member.name.rpartition("/")
            stem, _, suffix = base.partition(".")
            lines.setdefault(f"{folder}/{stem}", []).append(
                f"{suffix} {member.offset_data} {member.size} {member.name}"
            )
    index = shard.with_suffix(".idx")
    index.write_text(f"v1.2 {len(lines)}\n" + "".join(" ".join(words) + "\n" for words in lines.values()))
    return index


def parts(samples: list[tuple[bytes, int]], count: int) -> list[list[tuple[bytes, int]]]:
    """Return `samples` in `count` parts, in their order."""
    cut = -(-len(samples) // count)
    return [samples[start : start + cut] for start in range(0, len(samples), cut)]
