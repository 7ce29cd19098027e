"""Makes samples in the training process, or ahead of time in loader processes, each of which runs this module.

A loader process reads slot numbers from a pipe that all loaders share, writes the samples of each slot to shared
memory, and writes the slot number to another pipe. When the training process ends, for whatever reason, the first pipe
is closed and the loaders end too. Unless plug-ins are used, loaders import neither torch nor pydantic: they start fast
and stay small.
"""

from __future__ import annotations

import ctypes
import json
import math
import mmap
import os
import select
import signal
import struct
import subprocess
import sys
from collections import deque
from collections.abc import Callable, Hashable, Iterable, Sequence
from contextlib import suppress
from dataclasses import dataclass
from typing import TYPE_CHECKING, TypeAlias

import numpy as np
from numpy.typing import NDArray

from dist_train.data.decoding import DRAWS, EncodedImages, Work
from dist_train.outcome import CodedError, FaultError, UsageError, signal_name

if TYPE_CHECKING:
    from torch import Tensor

    from dist_train.data.plugin_samples import PluginSamples

    Reader: TypeAlias = EncodedImages | PluginSamples

_SLOT_BYTES = 1 << 20
_MAX_IMAGES = 32  # of a slot
_MEMORY_BYTES = 1 << 28
_MAX_SLOTS = 256
_RECORD = struct.Struct("i")  # a slot number in a pipe, which has room for all; written at once, so that none mix
_WAIT_MILLISECONDS = 200
_CLOSED_BY_EXEC = 1  # MFD_CLOEXEC, as os.memfd_create sets it
_BLOCKED_SIGNALS = {signal.SIGINT, signal.SIGTERM, signal.SIGHUP, signal.SIGUSR1, signal.SIGUSR2}


@dataclass(frozen=True)
class BatchJob:
    """A batch of samples to make, identified by `key`; `work(start, stop)` is a part of it."""

    key: Hashable
    size: int
    work: Callable[[int, int], Work]


class Decoder:
    """Makes batches of samples with `reader` in the calling process. `LoaderProcesses` makes them ahead of time."""

    def __init__(self, reader: Reader) -> None:
        self._reader = reader

    def prefetch(self, jobs: Iterable[BatchJob]) -> None:
        """Announce which batches will be fetched next, in this sequence; replaces earlier announcements."""

    def fetch(self, job: BatchJob, images: Tensor, labels: Tensor) -> None:
        """Write a batch to `images`, uint8 [n, C, H, W], and its labels to `labels`, int64 [n], if the reader has them.

        Raises FaultError if a sample cannot be read or a loader process has ended; UsageError if a sample does not have
        the form that the settings require.
        """
        self._reader.read(job.work(0, job.size), images.numpy(), labels.numpy())

    def close(self) -> None:
        """End the loader processes, if there are any; may be called again."""


@dataclass(eq=False)
class _Part:
    """A part of a batch that fits a slot."""

    start: int
    stop: int
    slot: int | None = None
    is_done: bool = False
    failure: CodedError | None = None


@dataclass(eq=False)
class _Batch:
    job: BatchJob
    parts: list[_Part]


class LoaderProcesses(Decoder):
    """Makes images of `shape` in loader processes, which start at the first use and stay.

    Parts of batches are dispatched in the order of the batches, so that the batch that is waited for is always in
    progress. The slots bound the memory of finished parts: at most 256 MiB, unless a single image is very large.
    """

    def __init__(self, processes: int, shape: tuple[int, int, int], recipe: str = "") -> None:
        """`recipe`: a `plugin_samples.Recipe` as JSON, if a plug-in reads or augments samples."""
        assert processes >= 1
        self._slot_size = max(1, min(_MAX_IMAGES, _SLOT_BYTES // math.prod(shape)))  # in images
        self._shape = shape
        self._recipe = recipe
        slot_bytes = slot_form(self._slot_size, shape).itemsize
        self._slot_count = max(2 * processes, min(_MAX_SLOTS, _MEMORY_BYTES // slot_bytes))
        self._memory_bytes = self._slot_count * slot_bytes
        self._free = list(range(self._slot_count))
        self._count = processes
        self._processes: list[subprocess.Popen[bytes]] = []
        self._batches: deque[_Batch] = deque()
        self._in_flight: dict[int, _Part | None] = {}  # by slot; None: no longer needed

    def prefetch(self, jobs: Iterable[BatchJob]) -> None:
        """Begin to make the batches that will be fetched next; raises FaultError if a loader process has ended."""
        self._start()
        earlier, self._batches = self._batches, deque()
        for job in jobs:
            # Keep batches only while their sequence stays the same: parts in flight must not follow parts that are not.
            while earlier and earlier[0].job.key != job.key:
                self._release(earlier.popleft())
            self._batches.append(earlier.popleft() if earlier else self._cut(job))
        for batch in earlier:
            self._release(batch)
        self._receive()
        self._check_alive()
        self._dispatch()

    def fetch(self, job: BatchJob, images: Tensor, labels: Tensor) -> None:
        if not any(batch.job.key == job.key for batch in self._batches):
            self.prefetch([job])
        while self._batches[0].job.key != job.key:
            self._release(self._batches.popleft())
        pixels, numbers = images.numpy(), labels.numpy()
        for part in self._batches[0].parts:
            while not part.is_done:
                self._dispatch()
                self._await_reply()
                self._receive()
            if part.failure is not None:
                raise part.failure
            assert part.slot is not None
            # NumPy copies in this thread; torch would use further threads, and these need cores that loaders occupy.
            target, count = slice(part.start, part.stop), part.stop - part.start
            pixels[target] = self._slots.pixels[part.slot, :count]
            numbers[target] = self._slots.labels[part.slot, :count]
            self._free.append(part.slot)
            part.slot = None
        self._batches.popleft()
        self._receive()
        self._dispatch()

    def close(self) -> None:
        """Kill the processes: they hold nothing that could be lost."""
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
        self._in_flight.clear()

    def _start(self) -> None:
        if self._processes:
            return
        memory = _memory_file("dist_train-images")
        os.ftruncate(memory, self._memory_bytes)
        self._slots = Slots(memory, self._slot_size, self._shape)
        their_requests, self._requests = os.pipe()
        self._replies, their_replies = os.pipe()
        os.set_blocking(self._replies, False)
        # Everybody can read a command line, which may not be long either; options may hold a token.
        recipe = _memory_file("dist_train-recipe")
        with open(recipe, "wb", closefd=False) as file:
            file.write(self._recipe.encode())
        theirs = (their_requests, their_replies, memory, recipe)
        arguments = list(map(str, (*theirs, self._slot_size, *self._shape)))
        environment = os.environ | {"PYTHONPATH": os.pathsep.join(map(os.path.abspath, sys.path))}
        environment |= {"OMP_NUM_THREADS": "1", "OPENBLAS_NUM_THREADS": "1"}  # loaders use one core each
        # Signals to the whole job request a stop; until then, the training process still needs its loaders.
        before = signal.pthread_sigmask(signal.SIG_BLOCK, _BLOCKED_SIGNALS)
        try:
            for _ in range(self._count):
                self._processes.append(
                    subprocess.Popen(
                        [sys.executable, "-P", "-m", "dist_train.data.loader_workers", *arguments],
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

    def _cut(self, job: BatchJob) -> _Batch:
        starts = range(0, job.size, self._slot_size)
        return _Batch(job, [_Part(start, min(start + self._slot_size, job.size)) for start in starts])

    def _dispatch(self) -> None:
        """Send parts to the loaders, in order, while there are free slots."""
        # An evaluation announces a whole split: look at no more parts than there are slots.
        parts = ((batch.job, part) for batch in self._batches for part in batch.parts)
        for job, part in parts:
            if part.slot is not None or part.is_done:
                continue
            if not self._free:
                return
            slot = self._free.pop()
            self._slots.write_message(slot, json.dumps(job.work(part.start, part.stop)).encode())
            try:
                os.write(self._requests, _RECORD.pack(slot))
            except BrokenPipeError:
                self._check_alive()
                raise
            part.slot = slot
            self._in_flight[slot] = part

    def _await_reply(self) -> None:
        """Wait until a loader has replied, or all have ended."""
        poller = select.poll()
        poller.register(self._replies, select.POLLIN)
        while not poller.poll(_WAIT_MILLISECONDS):
            self._check_alive()

    def _receive(self) -> None:
        """Process the replies that have arrived."""
        with suppress(BlockingIOError):  # no more
            while records := os.read(self._replies, _RECORD.size * _MAX_SLOTS):
                for (record,) in _RECORD.iter_unpack(records):
                    self._finish(record)
            self._check_alive(all_gone=True)

    def _finish(self, record: int) -> None:
        """Mark the part in slot `record` as done; a negative record, the complement of the slot, means failure."""
        slot = ~record if record < 0 else record
        part = self._in_flight.pop(slot)
        if part is None:
            self._free.append(slot)
            return
        part.is_done = True
        if record < 0:
            is_usage, code, text = json.loads(self._slots.message(slot))
            part.failure = (UsageError if is_usage else FaultError)(text, code=code)

    def _release(self, batch: _Batch) -> None:
        """Free the slots of a batch that is no longer needed, now or when its loader is done."""
        for part in batch.parts:
            if part.slot is None:
                continue
            if part.is_done:
                self._free.append(part.slot)
            else:
                self._in_flight[part.slot] = None

    def _check_alive(self, *, all_gone: bool = False) -> None:
        for process in self._processes:
            code = process.wait() if all_gone else process.poll()
            if code is None:
                continue
            how = f"was ended by {signal_name(-code)}" if code < 0 else f"ended with exit code {code}"
            fix = ": if the machine ran out of memory, set fewer data.loader_workers" if code < 0 else ""
            raise FaultError(f"the loader process {process.pid}, which makes samples, {how}{fix}", code="loader-ended")


_LONGEST_PATH = 4096
_BYTES_PER_IMAGE = 2 * 6 * _LONGEST_PATH + 32 * DRAWS + 128  # an image's path, name, place and draws


def slot_form(images: int, shape: tuple[int, int, int]) -> np.dtype[np.void]:
    """Return the layout of a slot: a message, and on pages of their own labels and images; unused pages are free."""
    length = np.dtype(np.uint32).itemsize
    message, samples = _whole_pages(length + 1024 + images * _BYTES_PER_IMAGE), images * (8 + math.prod(shape))
    fields = [
        ("length", np.uint32),
        ("message", np.uint8, (message - length,)),
        ("labels", np.int64, (images,)),
        ("pixels", np.uint8, (images, *shape)),
        ("padding", np.uint8, (_whole_pages(samples) - samples,)),
    ]
    return np.dtype(fields)


class Slots:
    """Access to the slots in the shared memory of a file descriptor; `slot_form` describes them."""

    def __init__(self, memory: int, images: int, shape: tuple[int, int, int]) -> None:
        slots = np.frombuffer(mmap.mmap(memory, 0), slot_form(images, shape))
        self.pixels: NDArray[np.uint8] = slots["pixels"]  # [slots, images, C, H, W]
        self.labels: NDArray[np.int64] = slots["labels"]  # [slots, images]
        self._messages: NDArray[np.uint8] = slots["message"]
        self._lengths: NDArray[np.uint32] = slots["length"]

    def write_message(self, slot: int, message: bytes) -> None:
        """Write `message` to a slot, cut to the space for it."""
        written = np.frombuffer(message, np.uint8)[: self._messages.shape[1]]
        self._lengths[slot] = len(written)
        self._messages[slot, : len(written)] = written

    def message(self, slot: int) -> bytes:
        """Return the message in a slot."""
        return self._messages[slot, : self._lengths[slot]].tobytes()


def serve(requests: int, replies: int, slots: Slots, recipe: str) -> None:
    """Make samples until the pipe of requests is closed; their source is opened at the first request."""
    reader: Reader | None = None
    while record := os.read(requests, _RECORD.size):
        [slot] = _RECORD.unpack(record)
        try:
            reader = reader or _reader(recipe)
            work = Work(*json.loads(slots.message(slot)))
            images = len(work.references)
            reader.read(work, slots.pixels[slot, :images], slots.labels[slot, :images])
        except CodedError as error:
            # On failure the reply is the complement of the slot number, and the slot's message is the reason.
            failure = [isinstance(error, UsageError), error.code, str(error)[:_LONGEST_PATH]]
            slots.write_message(slot, json.dumps(failure).encode())
            slot = ~slot
        try:
            os.write(replies, _RECORD.pack(slot))
        except BrokenPipeError:
            return


def _reader(recipe: str) -> Reader:
    """Return the reader of samples: `PluginSamples` for a `recipe`, else the decoder of image files."""
    if not recipe:
        return EncodedImages()
    from dist_train.data.plugin_samples import PluginSamples, Recipe

    parsed = Recipe.model_validate_json(recipe)
    return PluginSamples(parsed.settings, parsed.seed, {})


def _memory_file(name: str) -> int:
    """Return the descriptor of a new file in memory, which ends with its last descriptor."""
    if hasattr(os, "memfd_create"):
        return os.memfd_create(name)
    # Pythons that are built for old systems, such as Miniforge's, lack it.
    descriptor: int = ctypes.CDLL(None, use_errno=True).memfd_create(name.encode(), _CLOSED_BY_EXEC)
    if descriptor < 0:
        raise OSError(ctypes.get_errno(), "cannot create a file in memory")
    return descriptor


def _whole_pages(length: int) -> int:
    return -(-length // mmap.PAGESIZE) * mmap.PAGESIZE


def main(arguments: Sequence[str]) -> None:
    """Run a loader process. Arguments: four file descriptors, the images of a slot, and their shape."""
    requests, replies, memory, recipe, images, channels, height, width = map(int, arguments)
    # The loaders share the position in the file.
    text = os.pread(recipe, os.fstat(recipe).st_size, 0).decode()
    serve(requests, replies, Slots(memory, images, (channels, height, width)), text)


if __name__ == "__main__":
    main(sys.argv[1:])
