"""How large the weights are, and how far from where they began."""

from __future__ import annotations

import torch
from torch import Tensor

_PIECE = 1 << 20
"""Weights that are compared at once: a difference that stays in the cache costs no pass through memory."""


class WeightNorms:
    """The Euclidean norms of `values` [n] and of `values` - `initial`, computed on their device without waiting."""

    def __init__(self, values: Tensor, initial: Tensor) -> None:
        assert values.shape == initial.shape
        self._values = values
        self._initial = initial
        self._norms = torch.zeros(2, pin_memory=values.is_cuda)
        self._copied = torch.cuda.Event() if values.is_cuda else None

    def start(self) -> None:
        """Take the norms of the values as they are now."""
        pieces = zip(self._values.split(_PIECE), self._initial.split(_PIECE), strict=True)
        distances = torch.stack([torch.linalg.vector_norm(values - initial) for values, initial in pieces])
        norms = torch.stack([torch.linalg.vector_norm(self._values), torch.linalg.vector_norm(distances)])
        self._norms.copy_(norms, non_blocking=True)
        if self._copied is not None:
            self._copied.record()

    def result(self) -> tuple[float, float]:
        """Return the norm and the distance; waits only where the device has not come to them yet."""
        if self._copied is not None:
            self._copied.synchronize()
        norm, distance = self._norms.tolist()
        return norm, distance
