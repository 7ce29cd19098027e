"""Fashion-MNIST, from its four IDX files, and CIFAR-10 and CIFAR-100, from their Python archives.

The files of Fashion-MNIST are those of Debian's package, or lie in a folder of the user. Archives may be unpacked.
"""

from __future__ import annotations

import gzip
import math
import pickletools
import struct
import tarfile
import zlib
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path, PurePosixPath

import numpy as np
import torch
from numpy.typing import NDArray

from dist_train.config import DataSettings
from dist_train.data.cache import Source, data_sets_folder, decoded_folder, decoded_once, fetch
from dist_train.data.images import ImageSet, Split
from dist_train.outcome import UsageError, reading

_CHUNK = 1 << 20


def read_idx(path: Path, dimensions: int) -> NDArray[np.uint8]:
    """Return the array of unsigned bytes, with `dimensions` dimensions, in `path` (gzip if it ends in .gz).

    Raises UsageError if the file cannot be read, is shorter or longer than its header says, or is not an IDX file of
    unsigned bytes with as many dimensions.
    """
    start, content = 4 + 4 * dimensions, bytearray()
    with reading(path, _FASHION_MNIST_FIX):
        try:
            with gzip.open(path, "rb") if path.suffix == ".gz" else path.open("rb") as file:
                header = file.read(start)
                magic, *shape = struct.unpack(f">{1 + dimensions}I", header.ljust(start, b"\0"))
                if len(header) == start and magic != 0x0800 | dimensions:
                    raise _damaged(path, f"it begins with {magic:08x}, not as an IDX file does", code="data-format")
                announced = math.prod(shape)
                # Little more than that, so that no file can fill the memory.
                while len(content) <= announced and (chunk := file.read(_CHUNK)):
                    content += chunk
        except (gzip.BadGzipFile, EOFError, zlib.error) as error:
            raise _damaged(path, f"gzip cannot unpack it ({error})", code="data-unpackable") from error
    if len(header) < start or len(content) != announced:
        what, length = " x ".join(map(str, shape)), "longer" if len(content) > announced else "shorter"
        reason = f"its header announces {what} bytes, {start + announced} in all, but it is {length}"
        raise _damaged(path, reason, code="data-length")
    return np.frombuffer(content, np.uint8).reshape(shape)


def _damaged(path: Path, reason: str, code: str) -> UsageError:
    return UsageError(f"{path} is damaged: {reason}. {_FASHION_MNIST_FIX}", code=code)


FASHION_MNIST_VERSION = 2
FASHION_MNIST_CLASSES = 10
DEBIAN_FOLDER = Path("/usr/share/datasets/fashion-mnist")

_STEMS = {
    "train": ("train-images-idx3-ubyte", "train-labels-idx1-ubyte"),
    "test": ("t10k-images-idx3-ubyte", "t10k-labels-idx1-ubyte"),
}
_SIDE = 28
_FASHION_MNIST_FIX = (
    "Fetch the files with `apt-get install dataset-fashion-mnist` (without root, on Debian and Ubuntu: "
    "`docker/fashion_mnist.sh`), or set data.root to a folder that holds the four IDX files (plain or .gz) of "
    "github.com/zalandoresearch/fashion-mnist."
)


def read_fashion_mnist(settings: DataSettings, split: Split, seed: int) -> ImageSet:
    """Return the images of a split, from the cache if possible. Raises UsageError."""
    files = find_fashion_mnist(settings.root, split)
    source = Source("fashion-mnist", split, FASHION_MNIST_VERSION, files, FASHION_MNIST_CLASSES)
    return decoded_once(decoded_folder(), source, lambda: decode_fashion_mnist(files))


def find_fashion_mnist(root: Path | None, split: Split) -> tuple[Path, Path]:
    """Return the images' and labels' file, from `root`, or Debian's or the cache's folder. Raises UsageError."""
    folders = [root.absolute()] if root is not None else [DEBIAN_FOLDER, data_sets_folder() / "fashion-mnist"]
    for folder in folders:
        images, labels = (_existing(folder, stem) for stem in _STEMS[split])
        if images is not None and labels is not None:
            return images, labels
    missing = [stem for stem in _STEMS[split] if all(_existing(folder, stem) is None for folder in folders)]
    names = " and ".join(f"{stem}[.gz]" for stem in missing or _STEMS[split])
    places = " or ".join(map(str, folders))
    raise UsageError(f"Fashion-MNIST: {names} not found in {places}. {_FASHION_MNIST_FIX}", code="data-missing")


def decode_fashion_mnist(files: tuple[Path, Path]) -> ImageSet:
    """Return the images and labels in the two files; raise UsageError if these are damaged or do not match."""
    images_file, labels_file = files
    pixels = read_idx(images_file, 3)
    labels = read_idx(labels_file, 1)
    if len(pixels) == 0 or pixels.shape[1:] != (_SIDE, _SIDE):
        shape = " x ".join(map(str, pixels.shape))
        raise _damaged(images_file, f"it holds {shape} pixels, not images of 28 x 28", code="data-shape")
    if len(labels) != len(pixels):
        raise UsageError(
            f"{images_file} holds {len(pixels)} images but {labels_file} holds {len(labels)} labels: "
            f"one of them is damaged. {_FASHION_MNIST_FIX}",
            code="data-counts",
        )
    if (largest := np.max(labels)) >= FASHION_MNIST_CLASSES:
        raise _damaged(
            labels_file, f"it holds the label {largest}, not 0 to {FASHION_MNIST_CLASSES - 1}", code="data-labels"
        )
    # The arrays are views of bytearrays and thus writable, so torch accepts them without a copy.
    return ImageSet(torch.from_numpy(pixels).unsqueeze(1), torch.from_numpy(labels).long(), FASHION_MNIST_CLASSES)


def _existing(folder: Path, stem: str) -> Path | None:
    candidates = (folder / stem, folder / f"{stem}.gz")
    return next((path for path in candidates if path.is_file()), None)


CIFAR_VERSION = 2
_SHAPE = (3, 32, 32)
_PIXELS = 3 * 32 * 32
_MEMBER_LIMIT = 1 << 30


@dataclass(frozen=True)
class Archive:
    """CIFAR-10 or CIFAR-100: the names of its files, and the published digest of the archive."""

    title: str
    file: str
    folder: str
    batches: Mapping[Split, tuple[str, ...]]
    label_key: str
    classes: int
    url: str
    sha256: str

    def fix(self, root: Path) -> str:
        """Return how to get the files, for messages."""
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


_ARCHIVES: Mapping[str, Archive] = {"cifar10": CIFAR10, "cifar100": CIFAR100}


def read_cifar(settings: DataSettings, split: Split, seed: int) -> ImageSet:
    """Return the images of a split, from the cache if possible; downloads them if so set. Raises UsageError."""
    archive, root = _ARCHIVES[settings.name], (settings.root or data_sets_folder()).absolute()
    if settings.download:
        download_archive(archive, root)
    files = find_archive(archive, root, split)
    source = Source(settings.name, split, CIFAR_VERSION, files, archive.classes)
    return decoded_once(decoded_folder(), source, lambda: decode_archive(archive, root, files, split))


def find_cifar(settings: DataSettings, split: Split) -> tuple[Path, ...]:
    """Return the files of a split. Raises UsageError if they are missing."""
    return find_archive(_ARCHIVES[settings.name], (settings.root or data_sets_folder()).absolute(), split)


def download_archive(archive: Archive, root: Path) -> None:
    """Download the archive into `root` unless it or all unpacked batches are there. Raises UsageError."""
    if not all(path.is_file() for split in archive.batches for path in _unpacked(archive, root, split)):
        fetch(archive.url, root / archive.file, archive.sha256)


def find_archive(archive: Archive, root: Path, split: Split) -> tuple[Path, ...]:
    """Return the unpacked batches of `split` in `root`, or else the packed archive. Raises UsageError."""
    unpacked = _unpacked(archive, root, split)
    missing = [path for path in unpacked if not path.is_file()]
    if not missing:
        return unpacked
    packed = root / archive.file
    if packed.is_file():
        return (packed,)
    is_partial = len(missing) < len(unpacked)
    what = f"{missing[0]} is missing" if is_partial else f"found neither {packed} nor {unpacked[0].parent}"
    raise UsageError(f"{archive.title}: {what}. {archive.fix(root)}", code="data-missing")


def decode_archive(archive: Archive, root: Path, files: Sequence[Path], split: Split) -> ImageSet:
    """Return the images and labels in `files`, the result of `find_archive`; raise UsageError if they are damaged."""
    packed = files[0].name == archive.file
    fix = f"Delete {files[0] if packed else files[0].parent}. {archive.fix(root)}"
    if packed:
        contents = _unpack(files[0], archive, archive.batches[split], fix)
    else:
        contents = {}
        for path in files:
            with reading(path, fix):
                contents[str(path)] = path.read_bytes()
    batches = [_batch(content, place, archive, fix) for place, content in contents.items()]
    pixels = np.concatenate([images for images, _ in batches]).reshape(-1, *_SHAPE)
    labels = np.concatenate([labels for _, labels in batches])
    return ImageSet(torch.from_numpy(pixels), torch.from_numpy(labels), archive.classes)


def _unpacked(archive: Archive, root: Path, split: Split) -> tuple[Path, ...]:
    return tuple(root / archive.folder / name for name in archive.batches[split])


def _unpack(path: Path, archive: Archive, names: tuple[str, ...], fix: str) -> dict[str, bytes]:
    """Return the members `names` of the packed archive, by their name for messages; nothing is written to disk."""
    contents: dict[str, bytes] = {}
    try:
        with gzip.open(path, "rb") as stream:
            with tarfile.open(fileobj=stream, mode="r|") as members:
                for member in members:
                    inside = PurePosixPath(member.name)
                    is_batch = inside.parent.name == archive.folder and inside.name in names
                    content = members.extractfile(member) if is_batch and member.size <= _MEMBER_LIMIT else None
                    if content is not None:
                        contents[inside.name] = content.read()
            while stream.read(_CHUNK):
                pass  # gzip verifies its checksum only at the end of the stream
    except Exception as error:
        # Damaged archives raise errors of nearly any type, of gzip, zlib and tarfile.
        if isinstance(error, OSError) and error.errno is not None:
            with reading(path, fix):
                raise
        raise UsageError(
            f"{path} is damaged: it cannot be unpacked ({error}). {fix}", code="data-unpackable"
        ) from error
    missing = [name for name in names if name not in contents]
    if missing:
        raise UsageError(f"{path} is damaged: {archive.folder}/{missing[0]} is missing. {fix}", code="data-missing")
    return {f"{archive.folder}/{name} in {path}": contents[name] for name in names}


def _batch(content: bytes, place: str, archive: Archive, fix: str) -> tuple[NDArray[np.uint8], NDArray[np.int64]]:
    def damaged(reason: str, code: str) -> UsageError:
        return UsageError(f"{place} is damaged: {reason}. {fix}", code=code)

    try:
        pixels, labels = _contents(content, archive.label_key)
    except Exception as error:
        # Damaged pickles raise errors of nearly any type.
        raise damaged(f"not a valid pickle ({type(error).__name__})", code="data-format") from error
    if pixels is None:
        raise damaged(f"its data are not rows of {_PIXELS} bytes", code="data-shape")
    if len(labels) != len(pixels):
        raise damaged(f"{len(pixels)} images but {len(labels)} numbers in {archive.label_key}", code="data-counts")
    outside = next((label for label in labels if not 0 <= label < archive.classes), None)
    if outside is not None:
        raise damaged(f"it holds the label {outside}, not 0 to {archive.classes - 1}", code="data-labels")
    return pixels, np.array(labels, dtype=np.int64)


def _contents(content: bytes, label_key: str) -> tuple[NDArray[np.uint8] | None, list[int]]:
    """Return the pixels in a pickled batch, uint8 [rows, 3072], and the labels; no pixels if it holds no such array.

    The pickle's instructions are read, not executed, as a sequence of texts, each with the integers after it and the
    last boolean before it. Labels follow their key. Pixels are the only long text; before it come (1, rows, columns),
    the type u1, and whether the array is stored by columns.
    """
    texts: list[tuple[str, list[int], bool | None]] = [("", [], None)]
    latest = None
    for opcode, argument, _ in pickletools.genops(content):
        if isinstance(argument, str | bytes):
            texts.append((argument if isinstance(argument, str) else argument.decode("latin1"), [], latest))
        elif isinstance(argument, bool) or opcode.name in ("NEWTRUE", "NEWFALSE"):
            latest = argument is True or opcode.name == "NEWTRUE"
        elif isinstance(argument, int) and any(pushed.name.startswith("int") for pushed in opcode.stack_after):
            texts[-1][1].append(argument)
    integers = {text: after for text, after, _ in texts}
    labels = integers.get(label_key, [])
    long = [(text.encode("latin1"), is_by_column) for text, _, is_by_column in texts if len(text) >= _PIXELS]
    match long:
        case [(data, bool() as is_by_column)] if "u1" in integers:
            shape = (len(data) // _PIXELS, _PIXELS)
            if [1, *shape] in integers.values():
                return np.frombuffer(data, np.uint8).reshape(shape, order="F" if is_by_column else "C"), labels
    return None, labels
