"""From an image file to bytes of one size. No torch here: loader processes start fast and stay small."""

from __future__ import annotations

import math
import os
from collections.abc import Sequence

import numpy as np
from numpy.typing import NDArray
from PIL import Image

from dist_train.outcome import FaultError

CHANNELS = 3
ATTEMPTS = 10
DRAWS = 2 * ATTEMPTS + 3
"""Uniforms that an augmented image takes: area and aspect for each attempt, then top, left, mirror."""

_SMALLEST_AREA = 0.08
_LARGEST_ASPECT = 4 / 3
_MARGIN = 256 / 224

Box = tuple[int, int, int, int]
"""Left, top, right, bottom, in pixels."""


def decode(path: str, size: int, draws: Sequence[float] | None) -> NDArray[np.uint8]:
    """Return the image in `path` as uint8 [3, size, size].

    With `draws`, uniforms in [0, 1): a random resized crop (0.08 to 1 of the area, aspect 3/4 to 4/3),
    mirrored every second time. Without: the shorter side is resized to size * 256/224, the centre cropped.

    Raises:
        FaultError: the file cannot be read, or is damaged; its text names it.
    """
    try:
        with Image.open(path) as opened:
            image = _to_rgb(opened)
    except MemoryError:
        raise
    except Exception as error:
        # Damaged files raise errors of many types: OSError, SyntaxError, ValueError, struct.error, ...
        name = os.fsencode(path).decode(errors="replace")
        raise FaultError(f"the image {name} cannot be read ({_in_words(error)}): repair or remove it") from error
    if draws is None:
        pixels = np.asarray(_centre(image, size))
    else:
        cropped = image.crop(random_box(*image.size, draws))
        pixels = np.asarray(cropped.resize((size, size), Image.Resampling.BILINEAR))
        if draws[-1] < 0.5:
            pixels = pixels[:, ::-1]
    return pixels.transpose(2, 0, 1)


def random_box(width: int, height: int, draws: Sequence[float]) -> Box:
    """Return a box of random area, aspect and place: the first of the attempts that fits, else the centre."""
    top, left = draws[2 * ATTEMPTS : 2 * ATTEMPTS + 2]
    widest = math.log(_LARGEST_ASPECT)
    for attempt in range(ATTEMPTS):
        area = width * height * (_SMALLEST_AREA + (1 - _SMALLEST_AREA) * draws[2 * attempt])
        aspect = math.exp(widest * (2 * draws[2 * attempt + 1] - 1))
        wide, high = round(math.sqrt(area * aspect)), round(math.sqrt(area / aspect))
        if 0 < wide <= width and 0 < high <= height:
            return _placed(int(left * (width - wide + 1)), int(top * (height - high + 1)), wide, high)
    wide = min(width, max(1, round(height * _LARGEST_ASPECT)))
    high = min(height, max(1, round(width * _LARGEST_ASPECT)))
    return _placed((width - wide) // 2, (height - high) // 2, wide, high)


def _placed(left: int, top: int, width: int, height: int) -> Box:
    return left, top, left + width, top + height


def _centre(image: Image.Image, size: int) -> Image.Image:
    """Resize and crop in one go: a long thin image is never blown up as a whole."""
    width, height = image.size
    shorter = max(size, round(size * _MARGIN))
    scale = shorter / min(width, height)
    wide, high = max(shorter, int(width * scale)), max(shorter, int(height * scale))
    left, top = round((wide - size) / 2), round((high - size) / 2)
    across, down = width / wide, height / high
    box = (left * across, top * down, min(width, (left + size) * across), min(height, (top + size) * down))
    return image.resize((size, size), Image.Resampling.BILINEAR, box=box)


def _to_rgb(image: Image.Image) -> Image.Image:
    if image.mode == "P" and "transparency" in image.info:
        image = image.convert("RGBA")
    return image.convert("RGB")


def _in_words(error: Exception) -> str:
    if isinstance(error, OSError) and error.strerror:
        return error.strerror
    return " ".join(str(error).split()) or type(error).__name__
