"""Sums whose value does not depend on their order: floats as 64-bit integers at a power-of-two scale.

Floating-point addition is not associative, so a float sum depends on how its terms are dealt out to
ranks. Integer addition is associative. A power of two scales a float32 exactly, so one rounding, that
of the value itself to a multiple of 2^-bits, is all that is lost.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch


@dataclass(frozen=True)
class FixedPoint:
    """A representation with `bits` binary places: |value| < 2^(62 - bits) fits, with room for a sign."""

    bits: int

    @property
    def limit(self) -> float:
        """Absolute values from here on are out of range, also as a sum."""
        return 2.0 ** (62 - self.bits)

    def term_limit(self, terms: int) -> float:
        """Return what each of `terms` absolute values must stay below for their sum to be within the limit."""
        return self.limit / terms

    def encode(self, values: torch.Tensor) -> torch.Tensor:
        """Return float `values` as int64, rounded towards zero; they must be within the limit."""
        return values.mul(2.0**self.bits).to(torch.int64)

    def decode(self, integers: torch.Tensor) -> torch.Tensor:
        """Return int64 `integers` as float64."""
        return integers.to(torch.float64).mul_(2.0**-self.bits)


GRADIENTS = FixedPoint(48)
"""Gradients of the mean loss: resolution 3.6e-15, range 16,384."""

STATISTICS = FixedPoint(24)
"""Sums over samples of means and variances of activations: resolution 6e-8, range 2.7e11."""

LOSSES = FixedPoint(28)
"""Sums of losses over samples: resolution 3.7e-9, range 1.7e10."""
