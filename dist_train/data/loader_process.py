"""A loader process: makes the samples that it is asked for, and puts them into memory that it shares.

It reads slot numbers from one pipe, which all loaders share, and writes them to another when they are
done. The first pipe closes when the training process ends, however it ends: so does the loader then.
No torch here, nor pydantic, where images are decoded by the program alone: such loaders start fast and stay small.
"""

from __future__ import annotations

import json
import mmap
import os
import sys
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from dist_train.data.decoding import DRAWS, EncodedImages, Reader, Work
from dist_train.outcome import CodedError, UsageError

RECORD = 4
"""Bytes of a slot number in a pipe: written and read in one go, so that records never mix."""

_LENGTH = 4
_LONGEST_PATH = 4096
_WORDS = 2 * 6 * _LONGEST_PATH + 32 * DRAWS + 128
"""Bytes that one image's path, name, place and draws take at most."""


@dataclass(frozen=True)
class SlotForm:
    """How a slot lies in the shared memory: a message, `images` labels of int64, as many images of uint8 `shape`."""

    images: int
    shape: tuple[int, int, int]

    @property
    def message_bytes(self) -> int:
        """Space for a message; pages that are never written take no memory."""
        return _whole_pages(_LENGTH + 1024 + self.images * _WORDS)

    @property
    def image_bytes(self) -> int:
        """Bytes of an image."""
        channels, height, width = self.shape
        return channels * height * width

    @property
    def label_bytes(self) -> int:
        """Bytes of the labels."""
        return 8 * self.images

    @property
    def slot_bytes(self) -> int:
        """Bytes of a slot."""
        return self.message_bytes + _whole_pages(self.label_bytes + self.images * self.image_bytes)


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
        """Return the first `images` images of a slot, uint8 [images, C, H, W], a view."""
        form = self._form
        start = slot * form.slot_bytes + form.message_bytes + form.label_bytes
        return np.frombuffer(self._map, np.uint8, images * form.image_bytes, start).reshape(images, *form.shape)

    def labels(self, slot: int, images: int) -> NDArray[np.int64]:
        """Return the labels of the first `images` images of a slot, int64 [images], a view."""
        form = self._form
        return np.frombuffer(self._map, np.int64, images, slot * form.slot_bytes + form.message_bytes)


def serve(requests: int, replies: int, slots: Slots, recipe: str) -> None:
    """Make samples until the pipe of requests is closed; the first request opens what they are made from."""
    reader: Reader | None = None
    while record := os.read(requests, RECORD):
        slot = int.from_bytes(record, "little", signed=True)
        try:
            reader = reader or _reader(recipe)
            work = Work.decoded(slots.message(slot))
            images = len(work.references)
            reader.read(work, slots.pixels(slot, images), slots.labels(slot, images))
        except CodedError as error:
            # The record of a slot that failed is its complement; the reason is its message.
            failure = [isinstance(error, UsageError), error.code, str(error)[:_LONGEST_PATH]]
            slots.write_message(slot, json.dumps(failure).encode())
            slot = ~slot
        try:
            os.write(replies, slot.to_bytes(RECORD, "little", signed=True))
        except BrokenPipeError:
            return


def _reader(recipe: str) -> Reader:
    """Return what makes samples; without a `recipe`, what decodes images of files."""
    if not recipe:
        return EncodedImages()
    from dist_train.data.plugin_samples import reader_of_recipe

    return reader_of_recipe(recipe)


def _whole_pages(length: int) -> int:
    return -(-length // mmap.PAGESIZE) * mmap.PAGESIZE


def main(arguments: Sequence[str]) -> None:
    """Serve: the arguments are three file descriptors, a slot's images, their shape, and the recipe of the samples."""
    *numbers, recipe = arguments
    requests, replies, memory, images, channels, height, width = map(int, numbers)
    serve(requests, replies, Slots(memory, SlotForm(images, (channels, height, width))), recipe)


if __name__ == "__main__":
    main(sys.argv[1:])
