"""Random numbers and sums that depend neither on the number of ranks nor on any order.

Randomness is a pure function of (seed, purpose, indices): every random choice of a run has its own generator, so any
step can be reproduced alone, on any rank, and a checkpoint needs no random state. Layers such as dropout draw from
torch's global generators: `LayerRng` seeds these for each micro-batch and restores them afterwards. Plug-ins may draw
from Python's and NumPy's, too: `seeded_generators` makes that a function of the seed.

Floats are summed as 64-bit integers at a power-of-two scale, since integer addition is associative. Scaling a float32
by a power of two is exact; the only loss is the rounding of each value to a multiple of 2^-bits.
"""

from __future__ import annotations

import hashlib
import random
from collections.abc import Iterator
from contextlib import contextmanager, nullcontext
from dataclasses import dataclass
from threading import Lock

import numpy
import torch
from numpy.typing import NDArray

from dist_train.kernels import operators

_Uint32 = NDArray[numpy.uint32]

_LOW = 0xFFFFFFFF

_GOLDEN = 0x9E3779B97F4A7C15
_MIX_1 = 0xBF58476D1CE4E5B9
_MIX_2 = 0x94D049BB133111EB

_HASH_GOLDEN = 0x9E3779B9
_HASH_MIX_1 = 0x7FEB352D
_HASH_MIX_2 = 0x846CA68B

_HASHES_AT_ONCE = 1 << 16  # on a CPU: they stay in a core's cache


def key(seed: int, purpose: str, *indices: int | str) -> int:
    """Return the 63-bit key of (seed, purpose, indices); different arguments give unrelated keys."""
    text = "\x1f".join([str(seed), purpose, *(f"{type(index).__name__}:{index}" for index in indices)])
    return int.from_bytes(hashlib.blake2b(text.encode(), digest_size=8).digest(), "little") >> 1


def generator(seed: int, purpose: str, *indices: int | str) -> torch.Generator:
    """Return a generator on the CPU whose stream depends only on (seed, purpose, indices)."""
    return torch.Generator().manual_seed(key(seed, purpose, *indices))


_GENERATOR_LOCK = Lock()
"""Held while a global generator's state is read or set. Torch (2.13, 2.15) may wait for the interpreter's lock while it
holds the generator's own one, so that two threads, one of which sets a seed, would wait for each other forever."""


def generator_state(source: torch.Generator) -> torch.Tensor:
    """Return the state of `source`, which other threads may use meanwhile."""
    with _GENERATOR_LOCK:
        return source.get_state()


def set_generator_state(source: torch.Generator, state: torch.Tensor) -> None:
    """Set the state of `source`, which other threads may use meanwhile."""
    with _GENERATOR_LOCK:
        source.set_state(state)


def seed_generator(source: torch.Generator, seed: int) -> None:
    """Seed `source`, which other threads may use meanwhile."""
    with _GENERATOR_LOCK:
        source.manual_seed(seed)


def shown_state(source: object) -> object:
    """Return the state of a generator of Python, torch or NumPy as a value that shows a change; None for all else."""
    if isinstance(source, random.Random):
        return source.getstate()
    if isinstance(source, torch.Generator):
        return generator_state(source).tolist()
    return repr(source.bit_generator.state) if isinstance(source, numpy.random.Generator) else None


@contextmanager
def preserved_generators() -> Iterator[None]:
    """Restore the global generators of torch, on the CPU, of Python and of NumPy after the block."""
    torch_state, python_state = generator_state(torch.default_generator), random.getstate()
    numpy_state = numpy.random.get_state()
    try:
        yield
    finally:
        set_generator_state(torch.default_generator, torch_state)
        random.setstate(python_state)
        numpy.random.set_state(numpy_state)


def seed_generators(seed: int) -> None:
    """Seed the global generators of torch, on the CPU, of Python and of NumPy."""
    seed_generator(torch.default_generator, seed)
    _seed_others(seed)


def _seed_others(seed: int) -> None:
    random.seed(seed)
    numpy.random.seed(seed % 2**32)


@contextmanager
def seeded_generators(seed: int) -> Iterator[None]:
    """Seed the global generators of torch, on the CPU, of Python and of NumPy, and restore them after the block."""
    with preserved_generators():
        seed_generators(seed)
        yield


class LayerRng:
    """Seeds torch's global generators, from which dropout and other layers draw, for each micro-batch or batch.

    Draws then do not depend on which rank computes a micro-batch, and all passes over it in an update, a repeated one
    included, have the same masks. With `of_plugin`, Python's and NumPy's global generators are seeded, too, since a
    plug-in may draw from them. Restoring these takes 0.1 ms per update, which built-in models are spared.
    """

    def __init__(self, seed: int, device: torch.device, *, of_plugin: bool = False) -> None:
        self._seed = seed
        self._of_plugin = of_plugin
        self._generators = [torch.default_generator]
        if device.type == "cuda":
            first = device.index or 0
            self._generators += torch.cuda.default_generators[first : first + 1]

    @contextmanager
    def preserved(self) -> Iterator[None]:
        """Restore the global generators after the block."""
        states = [generator_state(each) for each in self._generators]
        try:
            with preserved_generators() if self._of_plugin else nullcontext():
                yield
        finally:
            for each, state in zip(self._generators, states, strict=True):
                set_generator_state(each, state)

    def seed(self, step: int, start: int) -> None:
        """Seed the generators for a pass over the micro-batch that starts with sample `start` of its global batch."""
        number = key(self._seed, "layers", step, start)
        for each in self._generators:
            seed_generator(each, number)
        if self._of_plugin:
            _seed_others(number)

    def has_drawn(self, step: int, start: int) -> bool:
        """Whether anything has been drawn since `seed(step, start)`; leaves the generators as that call did."""
        found = []
        for _ in range(2):
            draws = [float(torch.rand((), generator=each, device=each.device)) for each in self._generators]
            found.append((draws, random.random(), numpy.random.random()))  # nosec B311
            self.seed(step, start)
        return found[0] != found[1]

    @contextmanager
    def seeded_for_update(self, step: int) -> Iterator[None]:
        """Seed the generators for the block, in which a plug-in's optimizer makes update `step`; then restore them."""
        with self.preserved():
            self.seed(step, -1)  # no micro-batch starts there
            yield


def bits(stream: int, count: int, device: torch.device) -> Iterator[torch.Tensor]:
    """Yield parts of `count` int16 of random bits (`count` is even) on `device`: the same on every kind of device.

    Each 32-bit hash of (the key `stream`, position) gives two: lowbias32 (github.com/skeeto/hash-prospector) of a Weyl
    sequence, with half of the key added before the first multiplication and the other half after it. On a CPU, NumPy
    computes parts that stay in the cache, each overwritten by the next; a GPU computes all at once.
    """
    assert count % 2 == 0, "each hash gives two"
    if device.type == "cpu":
        numbers = numpy.arange(min(count // 2, _HASHES_AT_ONCE), dtype=numpy.uint32) * numpy.uint32(_HASH_GOLDEN)
        buffers = numpy.empty_like(numbers), numpy.empty_like(numbers)
        for start in range(0, count // 2, _HASHES_AT_ONCE):
            part = min(_HASHES_AT_ONCE, count // 2 - start)
            hashes, scratch = buffers[0][:part], buffers[1][:part]
            numpy.add(numbers[:part], numpy.uint32((start * _HASH_GOLDEN + stream) & _LOW), out=hashes)
            yield torch.from_numpy(_hash_by_numpy(hashes, scratch, stream >> 32).view(numpy.int16))
        return
    if device.type == "cuda" and operators.has_triton():
        drawn = torch.empty(count // 2, dtype=torch.int32, device=device)
        torch.ops.dist_train.random_bits_(drawn, _signed(stream & _LOW, 32), _signed(stream >> 32, 32))
    else:
        drawn = hash_by_torch(torch.arange(count // 2, dtype=torch.int32, device=device), stream)
    yield drawn.view(torch.int16)


def _hash_by_numpy(state: _Uint32, scratch: _Uint32, second: int) -> _Uint32:
    """Return `state`, hashed in place."""
    state ^= numpy.right_shift(state, 16, out=scratch)
    state *= numpy.uint32(_HASH_MIX_1)
    state += numpy.uint32(second)
    state ^= numpy.right_shift(state, 15, out=scratch)
    state *= numpy.uint32(_HASH_MIX_2)
    state ^= numpy.right_shift(state, 16, out=scratch)
    return state


def hash_by_torch(numbers: torch.Tensor, stream: int) -> torch.Tensor:
    """Return the hashes of `stream` at positions `numbers`, int32, which are overwritten; on any device."""
    state = numbers.mul_(_signed(_HASH_GOLDEN, 32)).add_(_signed(stream & _LOW, 32))
    # Shifts of signed integers repeat the sign, which is then masked out.
    state ^= (state >> 16) & 0xFFFF
    state.mul_(_signed(_HASH_MIX_1, 32)).add_(_signed(stream >> 32, 32))
    state ^= (state >> 15) & 0x1FFFF
    state.mul_(_signed(_HASH_MIX_2, 32))
    state ^= (state >> 16) & 0xFFFF
    return state


def uniform(stream: int, counters: torch.Tensor) -> torch.Tensor:
    """Return one float32 in [0, 1) for each int64 counter: SplitMix64 of (stream, counter).

    A counter's value does not depend on the other counters, and so not on how samples are grouped into micro-batches.
    """
    state = (counters + 1) * _signed(_GOLDEN, 64) + _signed(stream, 64)
    state = (state ^ _shift_right(state, 30)) * _signed(_MIX_1, 64)
    state = (state ^ _shift_right(state, 27)) * _signed(_MIX_2, 64)
    state = state ^ _shift_right(state, 31)
    return _shift_right(state, 40).to(torch.float32) * 2.0**-24


def _signed(value: int, width: int) -> int:
    return value - (1 << width) if value >= 1 << (width - 1) else value


def _shift_right(value: torch.Tensor, bits: int) -> torch.Tensor:
    return (value >> bits) & ((1 << (64 - bits)) - 1)


@dataclass(frozen=True)
class FixedPoint:
    """Numbers as 64-bit integers with `bits` binary places; |value| < 2^(62 - bits)."""

    bits: int

    @property
    def limit(self) -> float:
        """Absolute values, and sums of them, must be below it."""
        return 2.0 ** (62 - self.bits)

    def encode(self, values: torch.Tensor) -> torch.Tensor:
        """Return float `values`, within the limit, as int64, rounded towards zero."""
        return values.mul(2.0**self.bits).to(torch.int64)

    def decode(self, integers: torch.Tensor) -> torch.Tensor:
        """Return int64 `integers` as float64."""
        return integers.to(torch.float64).mul_(2.0**-self.bits)


GRADIENTS = FixedPoint(48)  # gradients of the mean loss: resolution 3.6e-15, range 16,384

STATISTICS = FixedPoint(24)  # sums over samples of means and variances of activations: resolution 6e-8, range 2.7e11

LOSSES = FixedPoint(28)  # sums of losses over samples: resolution 3.7e-9, range 1.7e10
