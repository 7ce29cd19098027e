"""The factor on the loss that keeps small gradients in float16's range: always a power of two, so that it is exact."""

from __future__ import annotations

import logging
from typing import Protocol

from dist_train.training.progress import Progress

FIRST = 2.0**16
LOWEST = 1.0
HIGHEST = 2.0**24
UPDATES_UNTIL_RAISED = 2000
_logger = logging.getLogger("dist_train.training")


class LossScale(Protocol):
    """What a loss is multiplied by, and its gradients divided by; the same on all ranks."""

    @property
    def value(self) -> float:
        """The factor, a power of two."""

    def lower(self) -> bool:
        """Take a smaller factor after an overflow; False where there is none, and the overflow is a divergence."""

    def note_update(self) -> None:
        """Take in that an update was made without an overflow."""


class NoLossScale:
    """Gradients as they are, for numbers that have float32's range."""

    value = 1.0

    def lower(self) -> bool:
        """Return False."""
        return False

    def note_update(self) -> None:
        """Do nothing."""


class DynamicLossScale:
    """Halved by each overflow, doubled after many updates without one; kept in the progress, which is saved."""

    def __init__(self, progress: Progress) -> None:
        """Go on from the factor in `progress`, or begin there."""
        self._progress = progress
        if progress.loss_scale is None:
            progress.loss_scale, progress.updates_since_overflow = FIRST, 0

    @property
    def value(self) -> float:
        """The factor, a power of two."""
        assert self._progress.loss_scale is not None
        return self._progress.loss_scale

    def lower(self) -> bool:
        """Halve the factor; False where it is the lowest."""
        if self.value <= LOWEST:
            return False
        self._set(self.value / 2)
        return True

    def note_update(self) -> None:
        """Double the factor where there has been no overflow for long."""
        self._progress.updates_since_overflow = (self._progress.updates_since_overflow or 0) + 1
        if self._progress.updates_since_overflow >= UPDATES_UNTIL_RAISED:
            self._set(min(HIGHEST, self.value * 2))

    def _set(self, value: float) -> None:
        self._progress.loss_scale, self._progress.updates_since_overflow = value, 0
        _logger.info("the loss scale is %g from step %d on", value, self._progress.step + 1)
