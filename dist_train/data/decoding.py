"""Decodes images, from files or parts of them, to arrays of one size, without torch: see `loader_workers.py`."""

from __future__ import annotations

import io
import math
import os
import weakref
from collections.abc import Sequence
from functools import lru_cache
from typing import Any, NamedTuple

import numpy as np
from numpy.typing import NDArray
from PIL import Image, UnidentifiedImageError

from dist_train.outcome import FaultError, UsageError

ATTEMPTS = 10
DRAWS = 2 * ATTEMPTS + 3  # per image: area and aspect of each attempt, then top, left, mirror

_SMALLEST_AREA = 0.08
_LARGEST_ASPECT = 4 / 3
_MARGIN = 256 / 224

Box = tuple[int, int, int, int]  # left, top, right, bottom, in pixels
Part = tuple[str, int, int, str]  # an image in a file: the file, offset and length in bytes, name for messages

_OPEN_FILES = 64

_FORMATS = ("JPEG", "PNG", "BMP", "GIF", "PPM", "TIFF", "WEBP", "JPEG2000")
"""Formats that Pillow decodes by itself: for PostScript, which is not among them, it starts Ghostscript."""


def fitted(image: Image.Image, size: int, draws: Sequence[float] | None) -> NDArray[np.uint8]:
    """Return an RGB image as uint8 [3, size, size].

    With `draws`, uniform in [0, 1): a random resized crop (0.08 to 1 of the area, aspect 3/4 to 4/3), mirrored with
    probability 1/2. Without: the shorter side is resized to size * 256/224, then the centre is cropped.
    """
    if draws is None:
        pixels = np.asarray(_centre(image, size))
    else:
        cropped = image.crop(random_box(*image.size, draws))
        pixels = np.asarray(cropped.resize((size, size), Image.Resampling.BILINEAR))
        if draws[-1] < 0.5:
            pixels = pixels[:, ::-1]
    return pixels.transpose(2, 0, 1)


class _OpenFile:
    """A file from which parts are read; closed when it is garbage-collected."""

    def __init__(self, path: str) -> None:
        self._descriptor = os.open(path, os.O_RDONLY | os.O_CLOEXEC)
        weakref.finalize(self, os.close, self._descriptor)

    def read(self, offset: int, length: int) -> bytes:
        """Return `length` bytes at `offset`. Raises OSError if the file is shorter."""
        content = os.pread(self._descriptor, length, offset)
        if len(content) != length:
            raise OSError(f"the file ends {length - len(content)} bytes too early")
        return content


def random_box(width: int, height: int, draws: Sequence[float]) -> Box:
    """Return a box of random area, aspect and position: the first attempt that fits, else the centre."""
    top, left = draws[2 * ATTEMPTS : 2 * ATTEMPTS + 2]
    log_aspect = math.log(_LARGEST_ASPECT)
    for attempt in range(ATTEMPTS):
        area = width * height * (_SMALLEST_AREA + (1 - _SMALLEST_AREA) * draws[2 * attempt])
        aspect = math.exp(log_aspect * (2 * draws[2 * attempt + 1] - 1))
        wide, high = round(math.sqrt(area * aspect)), round(math.sqrt(area / aspect))
        if 0 < wide <= width and 0 < high <= height:
            x, y = int(left * (width - wide + 1)), int(top * (height - high + 1))
            break
    else:
        wide = min(width, max(1, round(height * _LARGEST_ASPECT)))
        high = min(height, max(1, round(width * _LARGEST_ASPECT)))
        x, y = (width - wide) // 2, (height - high) // 2
    return x, y, x + wide, y + high


def _centre(image: Image.Image, size: int) -> Image.Image:
    """Resize and crop the centre in one operation, so that a long thin image is never enlarged as a whole."""
    width, height = image.size
    shorter = max(size, round(size * _MARGIN))
    scale = shorter / min(width, height)
    wide, high = max(shorter, int(width * scale)), max(shorter, int(height * scale))
    left, top = round((wide - size) / 2), round((high - size) / 2)
    across, down = width / wide, height / high
    box = (left * across, top * down, min(width, (left + size) * across), min(height, (top + size) * down))
    return image.resize((size, size), Image.Resampling.BILINEAR, box=box)


class Work(NamedTuple):
    """Samples to make; as JSON, a message to a loader process, which keeps every number and path exactly."""

    references: Sequence[Any]  # indices of samples of a data set in Python; otherwise paths or `Part`s
    draws: Sequence[Sequence[float]] | None = None  # of each sample; None: no augmentation
    split: str = ""  # this and all below are for plug-ins
    numbers: Sequence[int] = ()  # of the samples in the split
    epoch: int | None = None  # None: no augmentation


class EncodedImages:
    """Decodes image files, and images within larger files, which it keeps open."""

    def __init__(self) -> None:
        self._open_file = lru_cache(_OPEN_FILES)(_OpenFile)

    def image(self, reference: str | Part) -> Image.Image:
        """Return the image in a file, or in a part of one, in RGB.

        Raises FaultError, which names it, if it is damaged; UsageError if it is grayscale of more than 8 bits.
        """
        name = os.fsencode(reference if isinstance(reference, str) else reference[3]).decode(errors="replace")
        try:
            with Image.open(io.BytesIO(self._content(reference)), formats=_FORMATS) as image:
                if image.mode.startswith(("I", "F")):
                    # Pillow would clip their values to 0..255.
                    raise UsageError(
                        f"the image {name} has more than 8 bits per pixel (Pillow's mode {image.mode}): "
                        f"convert to 8 bits",
                        code="image-depth",
                    )
                is_masked = image.mode == "P" and "transparency" in image.info
                return (image.convert("RGBA") if is_masked else image).convert("RGB")
        except (MemoryError, UsageError):
            raise
        except Exception as error:
            # Damaged files raise errors of many types: OSError, SyntaxError, ValueError, struct.error, ...
            reason, fix = " ".join(str(error).split()) or type(error).__name__, "repair or remove it"
            if isinstance(error, UnidentifiedImageError):
                reason = f"it is none of {', '.join(_FORMATS)}"
            elif isinstance(error, Image.DecompressionBombError):
                fix = "make it smaller"
            elif isinstance(error, OSError) and error.strerror:
                reason = error.strerror
            raise FaultError(f"the image {name} cannot be read ({reason}): {fix}", code="image-unreadable") from error

    def _content(self, reference: str | Part) -> bytes:
        """Return an encoded image, read at once: Pillow would make many small reads."""
        if isinstance(reference, str):
            with open(reference, "rb", buffering=0) as file:
                return file.read()
        path, offset, length, _ = reference
        return self._open_file(path).read(offset, length)

    def read(self, work: Work, pixels: NDArray[np.uint8], labels: NDArray[np.int64]) -> None:
        """Write the images of `work` to `pixels` [n, C, H, W]; the caller's listing has the labels."""
        for index, reference in enumerate(work.references):
            draws = None if work.draws is None else work.draws[index]
            pixels[index] = fitted(self.image(reference), pixels.shape[-1], draws)
