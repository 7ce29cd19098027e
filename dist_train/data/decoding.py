"""From an image file to bytes of one size. No torch here: loader processes start fast and stay small.

It reads slot numbers from one pipe, which all loaders share, and writes them to another when they are
done. The first pipe closes when the training process ends, however it ends: so does the loader then.
"""

from __future__ import annotations

import json
import math
import mmap
import os
import sys
from collections.abc import Sequence
from dataclasses import dataclass

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
        raise FaultError(
            f"the image {name} cannot be read ({_in_words(error)}): repair or remove it", code="image-unreadable"
        ) from error
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


RECORD = 4
"""Bytes of a slot number in a pipe: written and read in one go, so that records never mix."""

_LENGTH = 4
_LONGEST_PATH = 4096
_WORDS = 6 * _LONGEST_PATH + 32 * DRAWS + 64
"""Bytes that one image's path and draws take at most."""


@dataclass(frozen=True)
class Work:
    """Images to decode: their files, and each one's draws (none: no augmentation)."""

    paths: Sequence[str]
    draws: Sequence[Sequence[float]] | None

    def encode(self) -> bytes:
        """Return it as a message; every number comes back bit-identically, every path to the byte."""
        return json.dumps([self.paths, self.draws]).encode()


def decode_all(work: Work, pixels: NDArray[np.uint8]) -> None:
    """Decode the images of `work` into `pixels` [n, 3, size, size]. Raises FaultError as `decode` does."""
    for place, path in enumerate(work.paths):
        pixels[place] = decode(path, pixels.shape[-1], None if work.draws is None else work.draws[place])


@dataclass(frozen=True)
class SlotForm:
    """How a slot lies in the shared memory: a message, then `images` images of uint8 [3, size, size]."""

    images: int
    size: int

    @property
    def message_bytes(self) -> int:
        """Space for a message; pages that are never written take no memory."""
        return _whole_pages(_LENGTH + 1024 + self.images * _WORDS)

    @property
    def image_bytes(self) -> int:
        """Bytes of an image."""
        return CHANNELS * self.size * self.size

    @property
    def slot_bytes(self) -> int:
        """Bytes of a slot."""
        return self.message_bytes + _whole_pages(self.images * self.image_bytes)


class Slots:
    """Slots of `form` in the shared memory behind a file descriptor."""

    def __init__(self, memory: int, form: SlotForm) -> None:
        self._form = form
        self._map = mmap.mmap(memory, 0)

    def write_message(self, slot: int, message: bytes) -> None:
        """Put `message`, cut off where a slot ends, into a slot."""
        message = message[: self._form.message_bytes - _LENGTH]
        start = slot * self._form.slot_bytes
        self._map[start : start + _LENGTH] = len(message).to_bytes(_LENGTH, "little")
        self._map[start + _LENGTH : start + _LENGTH + len(message)] = message

    def message(self, slot: int) -> bytes:
        """Return the message in a slot."""
        start = slot * self._form.slot_bytes
        length = int.from_bytes(self._map[start : start + _LENGTH], "little")
        return self._map[start + _LENGTH : start + _LENGTH + length]

    def pixels(self, slot: int, images: int) -> NDArray[np.uint8]:
        """Return the first `images` images of a slot, uint8 [images, 3, size, size], a view."""
        form = self._form
        flat = np.frombuffer(
            self._map, np.uint8, images * form.image_bytes, slot * form.slot_bytes + form.message_bytes
        )
        return flat.reshape(images, CHANNELS, form.size, form.size)


def serve(requests: int, replies: int, slots: Slots) -> None:
    """Decode until the pipe of requests is closed."""
    while record := os.read(requests, RECORD):
        slot = int.from_bytes(record, "little", signed=True)
        try:
            work = Work(*json.loads(slots.message(slot)))
            decode_all(work, slots.pixels(slot, len(work.paths)))
        except FaultError as error:
            # The record of a slot that failed is its complement; the reason is its message.
            slots.write_message(slot, str(error).encode(errors="replace"))
            slot = ~slot
        try:
            os.write(replies, slot.to_bytes(RECORD, "little", signed=True))
        except BrokenPipeError:
            return


def _whole_pages(length: int) -> int:
    return -(-length // mmap.PAGESIZE) * mmap.PAGESIZE


def main(arguments: Sequence[str]) -> None:
    """Serve: the arguments are three file descriptors, and a slot's images and their size."""
    requests, replies, memory, images, size = map(int, arguments)
    serve(requests, replies, Slots(memory, SlotForm(images, size)))


if __name__ == "__main__":
    main(sys.argv[1:])
