"""CIFAR-10 and CIFAR-100 from their standard python archives, packed or unpacked."""

from __future__ import annotations

import gzip
import io
import pickle
import pickletools
import tarfile
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path, PurePosixPath
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray

from dist_train.data.cache import data_sets_folder, fetch
from dist_train.data.images import ImageSet, Split
from dist_train.outcome import UsageError

VERSION = 1
_SHAPE = (3, 32, 32)
_PIXELS = 3 * 32 * 32
_MEMBER_LIMIT = 1 << 30
_CHUNK = 1 << 20
_MOST_TUPLES = 64
"""A batch has about five; hashing very deeply nested ones overflows the interpreter's stack."""


@dataclass(frozen=True)
class Archive:
    """One of the two data sets: its files, their names, and the digest published for the archive."""

    title: str
    file: str
    folder: str
    batches: Mapping[Split, tuple[str, ...]]
    label_key: str
    classes: int
    url: str
    sha256: str

    def fix(self, root: Path) -> str:
        """Say how to come by the files."""
        return (
            f"Set data.download=true to fetch {self.title}, or put {self.file} (from {self.url}), "
            f"or its unpacked folder {self.folder}, into {root}."
        )


CIFAR10 = Archive(
    title="CIFAR-10",
    file="cifar-10-python.tar.gz",
    folder="cifar-10-batches-py",
    batches={"train": tuple(f"data_batch_{number}" for number in range(1, 6)), "test": ("test_batch",)},
    label_key="labels",
    classes=10,
    url="https://www.cs.toronto.edu/~kriz/cifar-10-python.tar.gz",
    sha256="6d958be074577803d12ecdefd02955f39262c83c16fe9348329d7fe0b5c001ce",
)
CIFAR100 = Archive(
    title="CIFAR-100",
    file="cifar-100-python.tar.gz",
    folder="cifar-100-python",
    batches={"train": ("train",), "test": ("test",)},
    label_key="fine_labels",
    classes=100,
    url="https://www.cs.toronto.edu/~kriz/cifar-100-python.tar.gz",
    sha256="85cd44d02ba6437773c5bbd22e183051d648de2e7d6b014e1ef29b855ba677a7",
)


def root_or_default(root: Path | None) -> Path:
    """Return the folder that holds the archive: `root`, else `datasets` in the cache folder."""
    return data_sets_folder() if root is None else root


def download(archive: Archive, root: Path) -> None:
    """Fetch the archive into `root`, unless it or all unpacked batches are there. Raises UsageError."""
    if any(_missing(archive, root, split) for split in archive.batches):
        fetch(archive.url, root / archive.file, archive.sha256)


def find(archive: Archive, root: Path, split: Split) -> tuple[Path, ...]:
    """Return the unpacked batches of `split` in `root`, else the packed archive.

    Raises UsageError when neither is there.
    """
    unpacked = _unpacked(archive, root, split)
    missing = _missing(archive, root, split)
    if not missing:
        return unpacked
    packed = root / archive.file
    if packed.is_file():
        return (packed,)
    if len(missing) < len(unpacked):
        raise UsageError(f"{archive.title}: {missing[0]} is missing. {archive.fix(root)}", code="data-missing")
    raise UsageError(
        f"{archive.title}: found neither {packed} nor {unpacked[0].parent}. {archive.fix(root)}", code="data-missing"
    )


def decode(archive: Archive, root: Path, files: Sequence[Path], split: Split) -> ImageSet:
    """Return the images and labels in what `find` found; UsageError when anything in it is damaged."""
    packed = files[0].name == archive.file
    fix = (
        f"Delete {files[0] if packed else files[0].parent} and fetch it again: set data.download=true, or "
        f"put {archive.file} (from {archive.url}) into {root}."
    )
    if packed:
        contents = _unpack(files[0], archive, archive.batches[split], fix)
    else:
        contents = {str(path): _read(path, fix) for path in files}
    batches = [_batch(content, place, archive, fix) for place, content in contents.items()]
    pixels = np.concatenate([images for images, _ in batches]).reshape(-1, *_SHAPE)
    labels = np.concatenate([labels for _, labels in batches])
    return ImageSet(torch.from_numpy(pixels), torch.from_numpy(labels), archive.classes)


def _unpacked(archive: Archive, root: Path, split: Split) -> tuple[Path, ...]:
    return tuple(root / archive.folder / name for name in archive.batches[split])


def _missing(archive: Archive, root: Path, split: Split) -> list[Path]:
    return [path for path in _unpacked(archive, root, split) if not path.is_file()]


def _read(path: Path, fix: str) -> bytes:
    try:
        return path.read_bytes()
    except OSError as error:
        raise UsageError(f"cannot read {path}: {error.strerror or error}. {fix}", code="data-unreadable") from error


def _unpack(path: Path, archive: Archive, names: tuple[str, ...], fix: str) -> dict[str, bytes]:
    """Return the members `names` of the packed archive by their place; nothing is written anywhere."""
    found: dict[str, bytes] = {}
    try:
        with gzip.open(path, "rb") as stream:
            with tarfile.open(fileobj=stream, mode="r|") as members:
                for member in members:
                    place = PurePosixPath(member.name)
                    wanted = place.parent.name == archive.folder and place.name in names
                    content = members.extractfile(member) if wanted and member.size <= _MEMBER_LIMIT else None
                    if content is not None:
                        found[place.name] = content.read()
            while stream.read(_CHUNK):
                pass  # gzip compares its checksum only at the end of the stream
    except Exception as error:
        # Damaged archives raise errors of nearly any type, of gzip, zlib and tarfile.
        if isinstance(error, OSError) and error.errno is not None:
            raise UsageError(f"cannot read {path}: {error.strerror}. {fix}", code="data-unreadable") from error
        raise UsageError(
            f"{path} is damaged: it cannot be unpacked ({error}). {fix}", code="data-unpackable"
        ) from error
    missing = [name for name in names if name not in found]
    if missing:
        raise UsageError(f"{path} is damaged: {archive.folder}/{missing[0]} is not in it. {fix}", code="data-missing")
    return {f"{archive.folder}/{name} in {path}": found[name] for name in names}


def _batch(content: bytes, place: str, archive: Archive, fix: str) -> tuple[NDArray[np.uint8], NDArray[np.int64]]:
    def damaged(reason: str, code: str) -> UsageError:
        return UsageError(f"{place} is damaged: {reason}. {fix}", code=code)

    try:
        record = _unpickle(content)
    except Exception as error:
        # Damaged pickles raise errors of nearly any type, MemoryError included.
        reason = error if isinstance(error, pickle.UnpicklingError) else f"no sound pickle ({type(error).__name__})"
        raise damaged(str(reason), code="data-format") from error
    pixels, labels = record.get("data"), record.get(archive.label_key)
    if not isinstance(pixels, np.ndarray) or pixels.ndim != 2 or pixels.shape[1] != _PIXELS:
        raise damaged(f"its data are not rows of {_PIXELS} bytes", code="data-shape")
    if not isinstance(labels, list) or not all(type(label) is int for label in labels):
        raise damaged(f"it has no list of numbers named {archive.label_key}", code="data-labels")
    if len(labels) != len(pixels):
        raise damaged(f"{len(pixels)} images but {len(labels)} labels", code="data-counts")
    outside = next((label for label in labels if not 0 <= label < archive.classes), None)
    if outside is not None:
        raise damaged(f"it holds the label {outside}, not 0 to {archive.classes - 1}", code="data-labels")
    return pixels, np.array(labels, dtype=np.int64)


class _StandIn:
    """An array or an element type as a pickle describes it. NumPy's own crash the interpreter on hostile states."""

    def __init__(self, *arguments: Any) -> None:
        self.arguments = arguments
        self.state: Any = None

    def __setstate__(self, state: Any) -> None:
        self.state = state

    def array(self) -> NDArray[np.uint8] | None:
        """Return the array of bytes that this stands for; None where it is of another type."""
        _, shape, element, is_column_first, content = self.state
        if element.arguments[0] not in (b"u1", "u1"):
            return None
        return np.frombuffer(content, np.uint8).reshape(shape, order="F" if is_column_first else "C")


class _Unpickler(pickle.Unpickler):
    """Admits what a batch needs and refuses every other name, as Python's documentation has it."""

    def find_class(self, module: str, name: str) -> Any:
        # A new function each time: a pickle can set attributes of what it is handed.
        if module.removeprefix("numpy.") in ("core.multiarray", "_core.multiarray") and name == "_reconstruct":
            return lambda *arguments: _StandIn(*arguments)
        if (module, name) in (("numpy", "ndarray"), ("numpy", "dtype")):
            return lambda *arguments: _StandIn(*arguments)
        if (module, name) == ("_codecs", "encode"):
            return lambda text, encoding: str.encode(text, {"latin1": "latin1"}[encoding])
        raise pickle.UnpicklingError(f"it names {module}.{name}, which a batch does not need")


def _unpickle(content: bytes) -> dict[str, object]:
    """Return the dictionary pickled in `content`, arrays of bytes as such; runs nothing that it names."""
    tuples = 0
    for opcode, argument, _ in pickletools.genops(content):  # raises where a length is beyond the end
        tuples += "TUPLE" in opcode.name
        if tuples > _MOST_TUPLES or (
            opcode.name.endswith("PUT") and isinstance(argument, int) and argument > len(content)
        ):
            raise pickle.UnpicklingError("it has more tuples, or a higher memo number, than a batch needs")
    record = _Unpickler(io.BytesIO(content), encoding="bytes").load()
    named = {key.decode() if isinstance(key, bytes) else key: value for key, value in record.items()}
    return {name: value.array() if isinstance(value, _StandIn) else value for name, value in named.items()}
