"""Columnar data sets: Parquet files, data sets written by Hugging Face's `save_to_disk`, and NumPy arrays.

The first two are read by pyarrow. Images in Arrow files are read in place. Parquet compresses groups of rows, so that
single rows cannot be read: the encoded images of each file are copied once, one after the other, into a file of the
cache. Arrays in .npy files are mapped: all ranks of a node share the pages.
"""

from __future__ import annotations

import errno
import json
import warnings
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray

from dist_train.config import DataSettings
from dist_train.data.cache import cache_folder
from dist_train.data.encoded import SPLIT_NAMES, Index, cached_index, split_files
from dist_train.data.images import ImageSet, Split, channels_first, check_labels, digest_of, evenly_spread
from dist_train.outcome import DISK_FAILED, UsageError, reading
from dist_train.rundir.atomic import replacing

_ROWS = 256


def parquet_index(path: Path, settings: DataSettings) -> tuple[Path, Index]:
    """Return the copy of a Parquet file's images in the cache, and its index.

    Raises UsageError or FaultError; OSError if the file's size and time cannot be read.
    """
    image, label = _columns(settings)
    try:
        return cached_index("parquet", path, f"{image} {label}", partial(_unpack, path, image, label))
    except OSError as error:
        if error.filename == str(path):  # which was to be copied
            raise
        fix = "set DIST_TRAIN_CACHE to a folder on a local disk"
        if error.errno in (errno.ENOSPC, errno.EDQUOT):
            fix = f"the images of {path} need as much space again: set DIST_TRAIN_CACHE to a folder with enough"
        raise UsageError(
            f"cannot write {cache_folder()} ({error.strerror or error}): {fix}", code="cache-unwritable"
        ) from error


def find_parquet(settings: DataSettings, split: Split) -> list[Path]:
    """Return the Parquet files of a split after checking their columns. Raises UsageError."""
    paths = split_files(settings.folder, split, ".parquet")
    for path in paths:
        _check_columns(path, _parquet_file(path).schema_arrow, *_columns(settings))
    return paths


def find_saved(settings: DataSettings, split: Split) -> list[Path]:
    """Return the Arrow files of a split. Raises UsageError if there are none."""
    _pyarrow()
    folders = [settings.folder / name for name in SPLIT_NAMES[split]]
    folder = next((each for each in folders if (each / "state.json").is_file()), None)
    if folder is None:
        raise UsageError(
            f"there is no {' or '.join(str(each / 'state.json') for each in folders)}: set data.root to the folder "
            f"that DatasetDict.save_to_disk wrote, with these splits",
            code="data-missing",
        )
    with reading(folder / "state.json"):
        state = (folder / "state.json").read_bytes()
    try:
        paths = [folder / file["filename"] for file in json.loads(state)["_data_files"]]
    except (ValueError, KeyError, TypeError) as error:
        raise UsageError(f"{folder / 'state.json'} cannot be read: {error}", code="data-unreadable") from error
    missing = next((path for path in paths if not path.is_file()), None)
    if missing or not paths:
        raise UsageError(f"{missing or folder} is missing: save the data set again", code="data-missing")
    return paths


def _columns(settings: DataSettings) -> tuple[str, str]:
    return settings.image_column or "image", settings.label_column or "label"


def _pyarrow() -> Any:
    try:
        import pyarrow
    except ImportError:
        raise UsageError(
            "Parquet and Hugging Face files need pyarrow, which is not installed: pip install 'dist_train[arrow]'",
            code="pyarrow-missing",
        ) from None
    return pyarrow


@contextmanager
def _reading_as(form: str, path: Path) -> Iterator[None]:
    """Turn errors of pyarrow in the block, of which some are OSErrors, into a UsageError; into a FaultError if the disk
    has failed.
    """
    try:
        yield
    except (OSError, UnicodeError, _pyarrow().ArrowException) as error:  # it opens no file whose name is not UTF-8
        if isinstance(error, OSError) and error.errno in DISK_FAILED:
            with reading(path):
                raise
        raise UsageError(f"{path} cannot be read as {form}: {error}", code="data-format") from error


def _parquet_file(path: Path) -> Any:
    _pyarrow()
    from pyarrow import parquet

    with _reading_as("Parquet", path):
        return parquet.ParquetFile(path)


def _check_columns(path: Path, schema: Any, image: str, label: str) -> None:
    """Raise UsageError if a column is not there once, or has a type that cannot be encoded images or labels."""
    types = _pyarrow().types
    for setting, column in (("image_column", image), ("label_column", label)):
        if (count := schema.names.count(column)) != 1:
            raise UsageError(
                f"{path} has {count or 'no'} column{'s' * (count > 1)} {column}: it has {', '.join(schema.names)}; "
                f"set data.{setting}",
                code="column-missing",
            )
    kind = schema.field(image).type
    if types.is_struct(kind) and kind.get_field_index("bytes") >= 0:
        kind = kind.field("bytes").type
    if not (types.is_binary(kind) or types.is_large_binary(kind)):
        raise UsageError(
            f"the column {image} of {path} is {kind}, not encoded images: set data.image_column, or save the images' "
            f"files as binary",
            code="data-format",
        )
    if not types.is_integer(schema.field(label).type):
        raise UsageError(
            f"the column {label} of {path} is {schema.field(label).type}, not whole numbers: set data.label_column, or "
            f"number the classes from 0",
            code="data-labels",
        )


def _unpack(path: Path, image: str, label: str, content: Path) -> Index:
    """Write the encoded images of a Parquet file to `content`; return their index."""
    lengths, labels = [], []
    with replacing(content) as file:
        for images, batch_labels in _columns_of(path, _batches(path, [image, label]), image, label):
            for each in images:
                encoded = each.as_buffer()
                file.write(encoded)
                lengths.append(encoded.size)
            labels += batch_labels.to_pylist()
    sizes = np.array(lengths, np.int64)
    try:
        return np.stack([np.cumsum(sizes) - sizes, sizes, np.array(labels, np.int64)], axis=1)
    except OverflowError as error:
        raise UsageError(
            f"the column {label} of {path} holds {max(labels)}: labels count from 0, below data.classes",
            code="data-labels",
        ) from error


def _batches(path: Path, columns: list[str]) -> Iterator[Any]:
    """Yield the rows of a Parquet file. Raises UsageError if it is damaged."""
    with _reading_as("Parquet", path):
        yield from _parquet_file(path).iter_batches(_ROWS, columns=columns)


def saved_index(path: Path, settings: DataSettings) -> tuple[Path, Index]:
    """Return an Arrow file and its index: images lie in the buffers of columns, which are mapped, not copied."""
    arrow, (image, label) = _pyarrow(), _columns(settings)
    with _reading_as("an Arrow stream", path), arrow.memory_map(str(path)) as mapped:
        size, start = mapped.size(), mapped.read_buffer(1).address
        mapped.seek(0)
        table = arrow.ipc.open_stream(mapped).read_all()
    _check_columns(path, table.schema, image, label)
    parts = []
    for images, labels in _columns_of(path, table.to_batches(), image, label):
        if len(images):
            _, offsets, data = images.buffers()
            wide = np.int64 if arrow.types.is_large_binary(images.type) else np.int32
            ends = np.frombuffer(offsets, wide)[images.offset : images.offset + len(images) + 1].astype(np.int64)
            numbers = labels.to_numpy(zero_copy_only=False).astype(np.int64)
            parts.append(np.stack([ends[:-1] + (data.address - start), np.diff(ends), numbers], axis=1))
    index = np.concatenate(parts) if parts else np.empty((0, 3), np.int64)
    if len(index) and not 0 <= np.min(index[:, 0]) <= np.max(index[:, 0] + index[:, 1]) <= size:
        raise UsageError(f"{path} is compressed: save the data set without compression", code="data-format")
    return path, index


def _columns_of(path: Path, batches: Iterable[Any], image: str, label: str) -> Iterator[tuple[Any, Any]]:
    """Yield the encoded images and the labels of each batch of rows. Raises UsageError if one is missing.

    Images are a column, or its field `bytes` in Hugging Face's {bytes, path}.
    """
    rows = 0
    for batch in batches:
        images, labels = (batch.column(batch.schema.get_field_index(name)) for name in (image, label))
        if _pyarrow().types.is_struct(images.type):
            images = images.flatten()[images.type.get_field_index("bytes")]
        for column in (images, labels):
            if column.null_count:
                row = rows + column.is_null().to_pylist().index(True)
                raise UsageError(
                    f"row {row} of {path} has no image or label in the file: repair or remove it", code="column-missing"
                )
        rows += len(batch)
        yield images, labels


_DIGESTED = 64


def read_arrays(settings: DataSettings, split: Split) -> ImageSet:
    """Return the images of a split, uint8 [N, C, H, W], [N, H, W, C] or [N, H, W], and labels. Raises UsageError."""
    (images_file, images_name), (labels_file, labels_name) = find_arrays(settings, split)
    images, labels = _array(images_file, images_name), _array(labels_file, labels_name)
    image_format = settings.image_format
    if images.dtype != np.uint8:
        raise UsageError(f"{images_file} holds {images.dtype}, not uint8: convert to 8 bits", code="data-shape")
    pixels = channels_first(images, image_format.shape)
    if pixels is None:
        raise UsageError(
            f"{images_file} holds an array of {list(images.shape)}, not images of {list(image_format.shape)}, "
            f"channels first or last: set data.shape accordingly",
            code="data-shape",
        )
    if labels.shape != images.shape[:1] or labels.dtype.kind not in "iu":
        raise UsageError(
            f"{labels_file} holds {labels.dtype} of {list(labels.shape)}, not an integer for each of {len(images)} "
            f"images: number the classes from 0, in an array [{len(images)}]",
            code="data-counts",
        )
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", "The given NumPy array is not writable")
        tensors = torch.from_numpy(pixels), torch.from_numpy(labels.astype(np.int64))
    check_labels(tensors[1], image_format.classes, str(labels_file))
    # Of the labels and of some images, since reading all of them takes as long as an epoch.
    digested = evenly_spread(max(1, len(labels)), _DIGESTED)[: len(labels)]
    identity = digest_of(f"{pixels.shape}", tensors[1], tensors[0][digested])
    return ImageSet(*tensors, image_format.classes, identity, is_mapped=images_file.suffix == ".npy")


def find_arrays(settings: DataSettings, split: Split) -> tuple[tuple[Path, str], tuple[Path, str]]:
    """Return the file and the array name of the images, and those of the labels.

    For a split NAME they are in NAME.npz, in NAME/images.npy and NAME/labels.npy, or in NAME_images.npy and
    NAME_labels.npy. Raises UsageError if there are no such files.
    """
    image, label = settings.image_column or "images", settings.label_column or "labels"
    for name in SPLIT_NAMES[split]:
        if (both := settings.folder / f"{name}.npz").is_file():
            return (both, image), (both, label)
        for prefix in (f"{name}/", f"{name}_"):
            images, labels = (settings.folder / f"{prefix}{each}.npy" for each in (image, label))
            if images.is_file() and labels.is_file():
                return (images, image), (labels, label)
    name = SPLIT_NAMES[split][0]
    raise UsageError(
        f"{settings.folder} holds no {split} arrays: {name}.npz, or {name}_{image}.npy and {name}_{label}.npy "
        f"(for test: {', '.join(SPLIT_NAMES['test'])}); set data.root",
        code="data-missing",
    )


def _array(path: Path, name: str) -> NDArray[Any]:
    try:
        if path.suffix == ".npy":
            # Read-only: writable pages of our own would count as memory, and more than the machine has are refused.
            return np.lib.format.open_memmap(path, mode="r")  # np.load would also open an archive
        with np.load(path, allow_pickle=False) as archive:
            if name not in archive:
                raise UsageError(
                    f"{path} has no array {name}: it has {', '.join(archive)}; "
                    f"set data.image_column and data.label_column",
                    code="column-missing",
                )
            return archive[name]  # type: ignore[no-any-return]
    except UsageError:
        raise
    except OSError as error:
        if error.errno == errno.EINVAL:  # a place before the beginning, in a damaged archive
            raise UsageError(f"{path} is damaged or not a NumPy file: {error}", code="data-format") from error
        with reading(path):
            raise
    except MemoryError as error:
        raise UsageError(
            f"{path} does not fit the memory: {error}. Save its arrays as .npy files, which are mapped",
            code="data-unreadable",
        ) from error
    except Exception as error:
        # Damaged files raise errors of nearly any type.
        raise UsageError(f"{path} is damaged or not a NumPy file: {error}", code="data-format") from error
