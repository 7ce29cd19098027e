"""Making samples: in the training process, or ahead of it in loader processes, each of which runs this module.

A loader process reads slot numbers from one pipe, which all loaders share, makes the samples of each slot, puts them
into memory that it shares, and writes the number to another pipe. The first pipe closes when the training process ends,
however it ends: so does the loader then. No torch here, nor pydantic, where images are decoded by the program alone:
such loaders start fast and stay small.
"""

from __future__ import annotations

import json
import math
import mmap
import os
import select
import signal
import subprocess
import sys
from collections import deque
from collections.abc import Callable, Hashable, Iterable, Sequence
from dataclasses import dataclass, field
from typing import TYPE_CHECKING

import numpy as np
from numpy.typing import NDArray

from dist_train.data.decoding import DRAWS, EncodedImages, Reader, Work
from dist_train.outcome import CodedError, FaultError, UsageError

if TYPE_CHECKING:
    from torch import Tensor

_SLOT_BYTES = 1 << 20
_MOST_IMAGES = 32
_MEMORY_BYTES = 1 << 28
_MOST_SLOTS = 256
_WAIT_MILLISECONDS = 200
_WITHHELD = {signal.SIGINT, signal.SIGTERM, signal.SIGHUP, signal.SIGUSR1, signal.SIGUSR2}


@dataclass(frozen=True)
class Order:
    """A batch of samples to make. Orders of one `key` give the same; `work(start, stop)` is a part of it."""

    key: Hashable
    images: int
    work: Callable[[int, int], Work]


class Decoder:
    """Makes batches of samples; what is announced may be done ahead. Here: by `reader`, in the calling process."""

    def __init__(self, reader: Reader) -> None:
        self._reader = reader

    def prefetch(self, orders: Iterable[Order]) -> None:
        """Announce what will be fetched next, in this order; replaces earlier announcements."""

    def fetch(self, order: Order, images: Tensor, labels: Tensor) -> None:
        """Put a batch into `images`, uint8 [n, C, H, W], and, where they are not known, `labels`, int64 [n].

        Raises FaultError where a sample cannot be read, or a loader process is gone; UsageError where a sample is not
        of the form that the settings say.
        """
        self._reader.read(order.work(0, order.images), images.numpy(), labels.numpy())

    def close(self) -> None:
        """End the processes, if there are any; may be called again."""


@dataclass(eq=False)
class _Part:
    """A part of a batch, as large as a slot takes."""

    start: int
    stop: int
    slot: int | None = None
    is_done: bool = False
    failure: CodedError | None = None


@dataclass(eq=False)
class _Batch:
    order: Order
    parts: list[_Part] = field(default_factory=list)


class LoaderProcesses(Decoder):
    """Makes images of `shape` in processes of its own, which start at the first use and stay.

    Parts of batches are handed out in the order of the batches, so that the one that is waited for is
    always under way. What is done and not fetched yet is bounded by the slots: 256 MiB at most, unless a
    single image is very large.
    """

    def __init__(self, processes: int, shape: tuple[int, int, int], recipe: str = "") -> None:
        """Take the `recipe` of samples that a user's code reads or augments (`plugin_samples.Recipe`)."""
        assert processes >= 1
        self._images = max(1, min(_MOST_IMAGES, _SLOT_BYTES // math.prod(shape)))
        self._shape = shape
        self._recipe = recipe
        slot_bytes = slot_form(self._images, shape).itemsize
        self._slot_count = max(2 * processes, min(_MOST_SLOTS, _MEMORY_BYTES // slot_bytes))
        self._memory_bytes = self._slot_count * slot_bytes
        self._free = list(range(self._slot_count))
        self._count = processes
        self._processes: list[subprocess.Popen[bytes]] = []
        self._batches: deque[_Batch] = deque()
        self._under_way: dict[int, _Part | None] = {}
        """By slot; None for a part that is no longer wanted."""

    def prefetch(self, orders: Iterable[Order]) -> None:
        """Begin to decode what will be fetched next; FaultError where a loader process is gone."""
        self._start()
        earlier, self._batches = self._batches, deque()
        for order in orders:
            # Only what keeps its order is kept: parts under way must never stand behind others that are not.
            while earlier and earlier[0].order.key != order.key:
                self._forget(earlier.popleft())
            self._batches.append(earlier.popleft() if earlier else self._cut(order))
        for batch in earlier:
            self._forget(batch)
        self._receive(wait=False)
        self._check_alive()
        self._hand_out()

    def fetch(self, order: Order, images: Tensor, labels: Tensor) -> None:
        """Return when the batch is in `images` and `labels`."""
        if not any(batch.order.key == order.key for batch in self._batches):
            self.prefetch([order])
        while self._batches[0].order.key != order.key:
            self._forget(self._batches.popleft())
        pixels, numbers = images.numpy(), labels.numpy()
        for part in self._batches[0].parts:
            while not part.is_done:
                self._hand_out()
                self._receive(wait=True)
            if part.failure is not None:
                raise part.failure
            assert part.slot is not None
            # NumPy copies in this thread: torch's others would wait for cores that the loaders need.
            taken, count = slice(part.start, part.stop), part.stop - part.start
            pixels[taken], numbers[taken] = self._slots.pixels(part.slot, count), self._slots.labels(part.slot, count)
            self._free.append(part.slot)
            part.slot = None
        self._batches.popleft()
        self._receive(wait=False)
        self._hand_out()

    def close(self) -> None:
        """End the processes at once: they hold nothing that could be lost."""
        if not self._processes:
            return
        for process in self._processes:
            process.kill()
        for process in self._processes:
            process.wait()
        self._processes = []
        for descriptor in (self._requests, self._replies):
            os.close(descriptor)
        del self._slots
        self._batches.clear()
        self._free = list(range(self._slot_count))
        self._under_way.clear()

    def _start(self) -> None:
        if self._processes:
            return
        memory = os.memfd_create("dist_train-images")
        os.ftruncate(memory, self._memory_bytes)
        self._slots = Slots(memory, self._images, self._shape)
        their_requests, self._requests = os.pipe()
        self._replies, their_replies = os.pipe()
        os.set_blocking(self._requests, False)
        os.set_blocking(self._replies, False)
        theirs = (their_requests, their_replies, memory)
        arguments = [*map(str, (*theirs, self._images, *self._shape)), self._recipe]
        environment = os.environ | {"PYTHONPATH": os.pathsep.join(map(os.path.abspath, sys.path))}
        environment |= {"OMP_NUM_THREADS": "1", "OPENBLAS_NUM_THREADS": "1"}  # loaders use one core each
        # A signal to the whole job asks the training process to stop, which still needs its loaders then.
        before = signal.pthread_sigmask(signal.SIG_BLOCK, _WITHHELD)
        try:
            for _ in range(self._count):
                self._processes.append(
                    subprocess.Popen(
                        [sys.executable, "-P", "-m", "dist_train.data.decoders", *arguments],
                        pass_fds=theirs,
                        stdin=subprocess.DEVNULL,
                        stdout=subprocess.DEVNULL,
                        env=environment,
                    )
                )
        finally:
            signal.pthread_sigmask(signal.SIG_SETMASK, before)
            for descriptor in theirs:
                os.close(descriptor)

    def _cut(self, order: Order) -> _Batch:
        starts = range(0, order.images, self._images)
        return _Batch(order, [_Part(start, min(start + self._images, order.images)) for start in starts])

    def _hand_out(self) -> None:
        """Hand out parts, in order, while there are slots for them."""
        parts = [(batch.order, part) for batch in self._batches for part in batch.parts]
        for order, part in parts:
            if part.slot is not None or part.is_done:
                continue
            if not self._free:
                return
            slot = self._free.pop()
            self._slots.write_message(slot, order.work(part.start, part.stop).encode())
            try:
                os.write(self._requests, slot.to_bytes(RECORD, "little", signed=True))
            except BlockingIOError:
                self._free.append(slot)
                return
            except BrokenPipeError:
                self._check_alive()
                raise
            part.slot = slot
            self._under_way[slot] = part

    def _receive(self, *, wait: bool) -> None:
        """Note the parts that are done; with `wait`, at least one."""
        while True:
            try:
                records = os.read(self._replies, RECORD * _MOST_SLOTS)
            except BlockingIOError:
                if not wait:
                    return
                self._check_alive()
                poller = select.poll()
                poller.register(self._replies, select.POLLIN)
                poller.poll(_WAIT_MILLISECONDS)
                continue
            if not records:
                self._check_alive(all_gone=True)
            for place in range(0, len(records), RECORD):
                self._note(int.from_bytes(records[place : place + RECORD], "little", signed=True))
            wait = False

    def _note(self, record: int) -> None:
        slot = ~record if record < 0 else record
        part = self._under_way.pop(slot)
        if part is None:
            self._free.append(slot)
            return
        part.is_done = True
        if record < 0:
            is_usage, code, text = json.loads(self._slots.message(slot))
            part.failure = (UsageError if is_usage else FaultError)(text, code=code)

    def _forget(self, batch: _Batch) -> None:
        """Have the slots back, now or when they are done."""
        for part in batch.parts:
            if part.slot is None:
                continue
            if part.is_done:
                self._free.append(part.slot)
            else:
                self._under_way[part.slot] = None

    def _check_alive(self, *, all_gone: bool = False) -> None:
        for process in self._processes:
            code = process.wait() if all_gone else process.poll()
            if code is None:
                continue
            how = f"was ended by {signal.Signals(-code).name}" if code < 0 else f"ended with exit code {code}"
            fix = ": where the machine ran out of memory, fewer data.loader_workers need less" if code < 0 else ""
            raise FaultError(f"the loader process {process.pid}, which makes samples, {how}{fix}", code="loader-ended")


RECORD = 4
"""Bytes of a slot number in a pipe: written and read in one go, so that records never mix."""

_LONGEST_PATH = 4096
_WORDS = 2 * 6 * _LONGEST_PATH + 32 * DRAWS + 128
"""Bytes that one image's path, name, place and draws take at most."""


def slot_form(images: int, shape: tuple[int, int, int]) -> np.dtype[np.void]:
    """Return how a slot lies in the shared memory: a message, and `images` labels and images of `shape`.

    Both begin a page; pages that are never written take no memory.
    """
    length = np.dtype(np.uint32).itemsize
    message, samples = _whole_pages(length + 1024 + images * _WORDS), images * (8 + math.prod(shape))
    fields = [
        ("length", np.uint32),
        ("message", np.uint8, (message - length,)),
        ("labels", np.int64, (images,)),
        ("pixels", np.uint8, (images, *shape)),
        ("padding", np.uint8, (_whole_pages(samples) - samples,)),
    ]
    return np.dtype(fields)


class Slots:
    """Slots of a `slot_form` in the shared memory behind a file descriptor."""

    def __init__(self, memory: int, images: int, shape: tuple[int, int, int]) -> None:
        self._slots = np.frombuffer(mmap.mmap(memory, 0), slot_form(images, shape))

    def write_message(self, slot: int, message: bytes) -> None:
        """Put `message`, cut off where its place in the slot ends, into a slot."""
        written = np.frombuffer(message, np.uint8)[: self._slots["message"].shape[1]]
        self._slots["length"][slot] = len(written)
        self._slots["message"][slot, : len(written)] = written

    def message(self, slot: int) -> bytes:
        """Return the message in a slot."""
        found: bytes = self._slots["message"][slot, : self._slots["length"][slot]].tobytes()
        return found

    def pixels(self, slot: int, images: int) -> NDArray[np.uint8]:
        """Return the first `images` images of a slot, uint8 [images, C, H, W], a view."""
        pixels: NDArray[np.uint8] = self._slots["pixels"][slot, :images]
        return pixels

    def labels(self, slot: int, images: int) -> NDArray[np.int64]:
        """Return the labels of the first `images` images of a slot, int64 [images], a view."""
        labels: NDArray[np.int64] = self._slots["labels"][slot, :images]
        return labels


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
    from dist_train.data.plugin_samples import PluginSamples, Recipe

    found = Recipe.model_validate_json(recipe)
    return PluginSamples(found.settings, found.seed, {})


def _whole_pages(length: int) -> int:
    return -(-length // mmap.PAGESIZE) * mmap.PAGESIZE


def main(arguments: Sequence[str]) -> None:
    """Serve: the arguments are three file descriptors, a slot's images, their shape, and the recipe of the samples."""
    *numbers, recipe = arguments
    requests, replies, memory, images, channels, height, width = map(int, numbers)
    serve(requests, replies, Slots(memory, images, (channels, height, width)), recipe)


if __name__ == "__main__":
    main(sys.argv[1:])
