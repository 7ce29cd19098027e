"""A loader process: it decodes what it finds in a slot of shared memory, and leaves the pixels there.

It reads slot numbers from one pipe, which all loaders share, and writes them to another when they are
done. The first pipe closes when the training process ends, however it ends: so does the loader then.
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

from dist_train.data.decoding import CHANNELS, DRAWS, decode
from dist_train.outcome import FaultError

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


def decode_work(message: bytes) -> Work:
    """Return the work that `Work.encode` has made a message of."""
    paths, draws = json.loads(message)
    return Work(paths, draws)


@dataclass(frozen=True)
class SlotForm:
    """How a slot lies in the shared memory: a message, then `images` images of uint8 [3, size, size]."""

    images: int
    size: int

    @property
    def message_bytes(self) -> int:
        """Room for a message; memory that is never written takes none."""
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
        """Put `message`, cut off where there is no more room, into a slot."""
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


def done(slot: int, *, failed: bool) -> bytes:
    """Return the record that a slot is done; one that failed holds the reason as its message."""
    return (~slot if failed else slot).to_bytes(RECORD, "little", signed=True)


def serve(requests: int, replies: int, slots: Slots, size: int) -> None:
    """Decode until nobody asks any more."""
    while record := os.read(requests, RECORD):
        slot = int.from_bytes(record, "little", signed=True)
        failed = False
        try:
            _decode_all(decode_work(slots.message(slot)), slots, slot, size)
        except FaultError as error:
            slots.write_message(slot, str(error).encode(errors="replace"))
            failed = True
        try:
            os.write(replies, done(slot, failed=failed))
        except BrokenPipeError:
            return


def _decode_all(work: Work, slots: Slots, slot: int, size: int) -> None:
    pixels = slots.pixels(slot, len(work.paths))
    for place, path in enumerate(work.paths):
        pixels[place] = decode(path, size, None if work.draws is None else work.draws[place])


def _whole_pages(length: int) -> int:
    return -(-length // mmap.PAGESIZE) * mmap.PAGESIZE


def main(arguments: Sequence[str]) -> None:
    """Serve: the arguments are three file descriptors, and a slot's images and their size."""
    requests, replies, memory, images, size = map(int, arguments)
    serve(requests, replies, Slots(memory, SlotForm(images, size)), size)


if __name__ == "__main__":
    main(sys.argv[1:])
