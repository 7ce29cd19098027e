"""`python -m benchmarks.loading [--images N] [--pairs P]`: rows of decoding JPEGs, against torch's DataLoader.

Both sides crop, resize and mirror at random, in equally many processes, and return float32 batches. The images are
synthetic, written once, and kept in the cache folder. In a pair each side reads a random tenth of them.
"""

from __future__ import annotations

import argparse
import io
import shutil
import tarfile
from collections.abc import Iterator, Sequence
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import torch
from PIL import Image
from torch import Tensor
from torch.utils.data import DataLoader, Sampler
from torchvision.datasets import ImageFolder
from torchvision.transforms import v2

from benchmarks.timing import Ratio, compare
from dist_train.config import DataSettings
from dist_train.data.cache import cache_folder
from dist_train.data.images import BatchRequest
from dist_train.data.loader import Splits, open_splits

IMAGES = 20_000
_SIDE = 256
_SIZE = 224
_DISTINCT = 500
_CLASSES = 10
_BATCH = 64
_AHEAD = 8
_PARTS = 10
_PROCESSES = 2
_QUALITY = 90


def rows(pairs: int, images: int = IMAGES, processes: int = _PROCESSES) -> Iterator[Ratio]:
    """Yield a row for each form of the data, and one with torchvision's transforms instead of ours."""
    root = write_images(cache_folder() / "benchmarks" / f"jpeg-{_SIDE}-{images}", images)
    settings = {"classes": _CLASSES, "image_size": _SIZE, "loader_workers": processes}
    forms: dict[str, dict[str, Any]] = {
        "image folder, crop-flip": {"name": "imagefolder", "root": root / "folder", "augment": "crop-flip"},
        "WebDataset, crop-flip": {"name": "webdataset", "root": root / "shards", "augment": "crop-flip"},
        "image folder, transforms v2": {
            "name": "imagefolder",
            "root": root / "folder",
            "augment": "benchmarks.loading:transform",
        },
    }
    for form, data in forms.items():
        splits = open_splits(DataSettings.model_validate({**settings, **data}), 0, torch.device("cpu"))
        theirs = _Theirs(root / "folder", processes)
        ours = _Ours(splits)
        try:
            part = max(1, images // _PARTS)
            for reader in (ours, theirs):
                reader.read(min(part, 4 * _BATCH))  # starts the processes
            yield compare(
                f"loading {images:,} JPEGs of {_SIDE} pixels, {processes} processes",
                (form, partial(ours.read, part)),
                ("DataLoader, ImageFolder, transforms v2", partial(theirs.read, part)),
                pairs=pairs,
                bar=1.0,
                warm_up=0,
                images=part,
            )
        finally:
            splits.close()
            theirs.close()


def transform(images: Any) -> Any:
    """Return torchvision transforms that crop, resize and mirror as `augment: crop-flip` does."""
    return v2.Compose([v2.RandomResizedCrop(images.shape[1:]), v2.RandomHorizontalFlip(), v2.PILToTensor()])


class _Ours:
    """Reads with our loader processes; the next batches are prefetched, as in training."""

    def __init__(self, splits: Splits) -> None:
        self._samples = splits.train
        self._epoch = 0

    def read(self, count: int) -> None:
        """Read `count` images, others each time."""
        self._epoch += 1
        order = torch.randperm(len(self._samples), generator=torch.Generator().manual_seed(self._epoch))[:count]
        batches = [BatchRequest(part, self._epoch) for part in torch.split(order, _BATCH)]
        for number, batch in enumerate(batches):
            self._samples.prefetch(batches[number : number + _AHEAD])
            self._samples.read(batch)


class _Order(Sampler[int]):
    """A sampler with a settable order, for a loader with persistent processes."""

    def __init__(self) -> None:
        self.order: list[int] = []

    def __iter__(self) -> Iterator[int]:
        return iter(self.order)

    def __len__(self) -> int:
        return len(self.order)


class _Theirs:
    """The same by torch's DataLoader."""

    def __init__(self, root: Path, processes: int) -> None:
        steps = [v2.RandomResizedCrop(_SIZE), v2.RandomHorizontalFlip(), v2.PILToTensor()]
        self._order = _Order()
        self._epoch = 0
        self._images = ImageFolder(str(root / "train"), v2.Compose(steps))
        self._loader: DataLoader[Tensor] | None = DataLoader(
            self._images,
            _BATCH,
            sampler=self._order,
            num_workers=processes,
            persistent_workers=True,
            prefetch_factor=_AHEAD // processes,
        )

    def read(self, count: int) -> None:
        """Read `count` images, others each time."""
        assert self._loader is not None
        self._epoch += 1
        order = torch.randperm(len(self._images), generator=torch.Generator().manual_seed(self._epoch))[:count]
        self._order.order = order.tolist()
        for images, _labels in self._loader:
            images.to(torch.float32).div_(255)

    def close(self) -> None:
        """End its processes."""
        self._loader = None


def write_images(folder: Path, count: int) -> Path:
    """Write `count` images into `folder`, as an image folder and as shards, unless it exists."""
    if folder.exists():
        return folder
    random = np.random.default_rng(0)
    contents = [_jpeg(random) for _ in range(min(count, _DISTINCT))]
    part = folder.with_name(f".{folder.name}.part")
    shutil.rmtree(part, ignore_errors=True)
    (part / "shards").mkdir(parents=True)
    for split, wanted in (("train", count), ("val", _CLASSES)):
        for label in range(_CLASSES):
            (part / "folder" / split / f"class{label}").mkdir(parents=True)
        with tarfile.open(part / "shards" / f"{split}-0000.tar", "w") as shard:
            for number in range(wanted):
                content, label = contents[number % len(contents)], number % _CLASSES
                (part / "folder" / split / f"class{label}" / f"{number:06}.jpg").write_bytes(content)
                for suffix, data in (("jpg", content), ("cls", b"%d" % label)):
                    member = tarfile.TarInfo(f"{number:06}.{suffix}")
                    member.size = len(data)
                    shard.addfile(member, io.BytesIO(data))
    part.rename(folder)
    return folder


def _jpeg(random: np.random.Generator) -> bytes:
    """Return a JPEG of coarse shapes with some noise, about 25 kB, like a photograph of this size."""
    coarse = Image.fromarray(random.integers(0, 256, (16, 16, 3), dtype=np.uint8))
    smooth = np.asarray(coarse.resize((_SIDE, _SIDE), Image.Resampling.BICUBIC)).astype(np.int16)
    noisy = smooth + random.normal(0, 6, smooth.shape)
    written = io.BytesIO()
    Image.fromarray(noisy.clip(0, 255).astype(np.uint8)).save(written, "JPEG", quality=_QUALITY)
    return written.getvalue()


def main(argv: Sequence[str] | None = None) -> None:
    """Measure and print the rows."""
    parser = argparse.ArgumentParser(prog="python -m benchmarks.loading", description=__doc__)
    parser.add_argument("--images", type=int, default=IMAGES, help="JPEGs on disk")
    parser.add_argument("--pairs", type=int, default=10, help="pairs of timings, ours and theirs")
    parser.add_argument("--processes", type=int, default=_PROCESSES, help="processes of each side")
    arguments = parser.parse_args(argv)
    for row in rows(arguments.pairs, arguments.images, arguments.processes):
        print(
            f"{row.row}: {row.ours} / {row.theirs}: {row.median:.3f} ({row.lower:.3f}-{row.upper:.3f}), "
            f"{row.images_per_second:,.0f} images/s"
        )


if __name__ == "__main__":
    main()
