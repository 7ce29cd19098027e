"""Numbers that depend on nothing but what they stand for: random draws, and sums whose value no order changes.

Randomness is a pure function of (seed, purpose, indices): nothing to save, nothing to replay. Every random choice of a
run takes its own generator from here, so that any step can be reproduced alone, on any rank. Layers such as dropout
know only torch's global generators: `LayerRng` seeds these for each micro-batch, and leaves them as it found them.

Sums are of floats as 64-bit integers at a power-of-two scale. Floating-point addition is not associative, so a float
sum depends on how its terms are dealt out to ranks. Integer addition is associative. A power of two scales a float32
exactly, so one rounding, that of the value itself to a multiple of 2^-bits, is all that is lost.
"""

from __future__ import annotations

import hashlib
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass

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

_CACHED = 1 << 16  # hashes of 32 bits that, with what is made of them, a core's own cache holds


def key(seed: int, purpose: str, *indices: int | str) -> int:
    """Return the 63-bit key of (seed, purpose, indices); different arguments give unrelated keys."""
    text = "\x1f".join([str(seed), purpose, *(f"{type(index).__name__}:{index}" for index in indices)])
    return int.from_bytes(hashlib.blake2b(text.encode(), digest_size=8).digest(), "little") >> 1


def generator(seed: int, purpose: str, *indices: int | str) -> torch.Generator:
    """Return a generator on the CPU whose stream depends on (seed, purpose, indices) alone."""
    return torch.Generator().manual_seed(key(seed, purpose, *indices))


class LayerRng:
    """torch's global generators, from which dropout and other layers draw, seeded for each micro-batch.

    What they draw does not depend on how micro-batches are dealt to ranks, and all passes over a micro-batch in an
    update, also a repeated one, have the same masks.
    """

    def __init__(self, seed: int, device: torch.device) -> None:
        self._seed = seed
        self._generators = [torch.default_generator]
        if device.type == "cuda":
            first = device.index or 0
            self._generators += torch.cuda.default_generators[first : first + 1]

    @contextmanager
    def preserved(self) -> Iterator[None]:
        """Return a context which restores the global generators at its end: they are the caller's."""
        states = [each.get_state() for each in self._generators]
        try:
            yield
        finally:
            for each, state in zip(self._generators, states, strict=True):
                each.set_state(state)

    def seed(self, step: int, start: int) -> None:
        """Seed the generators for a pass over the micro-batch that starts with sample `start` of its global batch."""
        number = key(self._seed, "layers", step, start)
        for each in self._generators:
            each.manual_seed(number)


def bits(stream: int, count: int, device: torch.device) -> Iterator[torch.Tensor]:
    """Yield `count` int16 of random bits, `count` even, on `device`: the same ones on every kind of device.

    Two of each 32-bit integer hash of (the key `stream`, position): lowbias32 (github.com/skeeto/hash-prospector) of a
    Weyl sequence, half of the key added before the first multiplication and the other half after it. Integer operations
    wrap alike everywhere. On a CPU by NumPy, in parts that stay in the cache and that the next one overwrites; on a GPU
    at once.
    """
    assert count % 2 == 0, "two of each hash"
    if device.type == "cpu":
        numbers = numpy.arange(min(count // 2, _CACHED), dtype=numpy.uint32) * numpy.uint32(_HASH_GOLDEN)
        buffers = numpy.empty_like(numbers), numpy.empty_like(numbers)
        for start in range(0, count // 2, _CACHED):
            part = min(_CACHED, count // 2 - start)
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

    The value of a counter does not depend on which others are asked for, hence not on how samples are
    grouped into micro-batches.
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
    """A representation with `bits` binary places: |value| < 2^(62 - bits) fits, with room for a sign."""

    bits: int

    @property
    def limit(self) -> float:
        """Absolute values from here on are out of range, also as a sum."""
        return 2.0 ** (62 - self.bits)

    def encode(self, values: torch.Tensor) -> torch.Tensor:
        """Return float `values` as int64, rounded towards zero; they must be within the limit."""
        return values.mul(2.0**self.bits).to(torch.int64)

    def decode(self, integers: torch.Tensor) -> torch.Tensor:
        """Return int64 `integers` as float64."""
        return integers.to(torch.float64).mul_(2.0**-self.bits)


GRADIENTS = FixedPoint(48)  # gradients of the mean loss: resolution 3.6e-15, range 16,384

STATISTICS = FixedPoint(24)  # sums over samples of means and variances of activations: resolution 6e-8, range 2.7e11

LOSSES = FixedPoint(28)  # sums of losses over samples: resolution 3.7e-9, range 1.7e10
