"""Randomness as a pure function of (seed, purpose, indices): nothing to save, nothing to replay.

Every random choice of a run takes its own generator from here, so that no global generator is read
and any step can be reproduced alone, on any worker.
"""

from __future__ import annotations

import hashlib
from collections.abc import Iterator

import numpy
import torch

_GOLDEN = 0x9E3779B97F4A7C15
_MIX_1 = 0xBF58476D1CE4E5B9
_MIX_2 = 0x94D049BB133111EB

_CACHED = 1 << 18
"""Elements of 16 bits, and as many of 32 made of them, that a core's own cache holds."""


def key(seed: int, purpose: str, *indices: int | str) -> int:
    """Return the 63-bit key of (seed, purpose, indices); different arguments give unrelated keys."""
    text = "\x1f".join([str(seed), purpose, *(f"{type(index).__name__}:{index}" for index in indices)])
    return int.from_bytes(hashlib.blake2b(text.encode(), digest_size=8).digest(), "little") >> 1


def generator(seed: int, purpose: str, *indices: int | str, device: torch.device | str = "cpu") -> torch.Generator:
    """Return a generator on `device` whose stream depends on (seed, purpose, indices) alone."""
    return torch.Generator(device=device).manual_seed(key(seed, purpose, *indices))


def bits(stream: int, count: int, device: torch.device) -> Iterator[torch.Tensor]:
    """Yield `count` int16 of random bits, `count` a multiple of 4, on `device`; they depend on the key `stream` alone.

    On a CPU by NumPy's SFC64, whose stream NumPy keeps the same between versions and which is three times as fast as
    torch's Mersenne twister, in parts that stay in the cache until they are used. On a GPU by torch's Philox, at once.
    """
    assert count % 4 == 0, "four of each 64-bit number"
    if device.type == "cpu":
        source = numpy.random.SFC64(stream)
        for start in range(0, count, _CACHED):
            part = min(_CACHED, count - start)
            yield torch.from_numpy(source.random_raw(part // 4).view(numpy.int16))
        return
    fours = torch.empty(count // 4, dtype=torch.int64, device=device)
    fours.random_(-(2**63), None, generator=torch.Generator(device).manual_seed(stream))
    yield fours.view(torch.int16)


def uniform(stream: int, counters: torch.Tensor) -> torch.Tensor:
    """Return one float32 in [0, 1) for each int64 counter: SplitMix64 of (stream, counter).

    The value of a counter does not depend on which others are asked for, hence not on how samples are
    grouped into micro-batches.
    """
    state = (counters + 1) * _signed(_GOLDEN) + _signed(stream)
    state = (state ^ _shift_right(state, 30)) * _signed(_MIX_1)
    state = (state ^ _shift_right(state, 27)) * _signed(_MIX_2)
    state = state ^ _shift_right(state, 31)
    return _shift_right(state, 40).to(torch.float32) * 2.0**-24


def _signed(value: int) -> int:
    return value - (1 << 64) if value >= 1 << 63 else value


def _shift_right(value: torch.Tensor, bits: int) -> torch.Tensor:
    return (value >> bits) & ((1 << (64 - bits)) - 1)
