"""What a trainer asks of samples, wherever they come from."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass
from typing import Protocol

from torch import Tensor


@dataclass(frozen=True)
class BatchRequest:
    """A micro-batch to come: its samples, int64 [n] on the CPU, and the epoch that augments them (none: plain)."""

    indices: Tensor
    epoch: int | None


class SampleSource(Protocol):
    """The samples of one split, on the device, as the network reads them."""

    @property
    def classes(self) -> int:
        """How many classes there are."""

    @property
    def shape(self) -> tuple[int, int, int]:
        """Channels, height and width of an input."""

    def __len__(self) -> int: ...

    def micro_batch(self, indices: Tensor, epoch: int) -> tuple[Tensor, Tensor]:
        """Return augmented inputs [n, C, H, W] and labels int64 [n] for `indices`, int64 [n] on the CPU."""

    def unaugmented(self, indices: Tensor) -> tuple[Tensor, Tensor]:
        """Return inputs and labels of `indices`, int64 [n] on the CPU, not augmented."""

    def plain(self, start: int, stop: int) -> tuple[Tensor, Tensor]:
        """Return inputs and labels of the samples `start` to `stop` (exclusive), not augmented."""

    def prefetch(self, batches: Iterable[BatchRequest]) -> None:
        """Hear what will be asked for next, in this order, in place of what was announced before.

        It changes when work is done, never a result.
        """

    def close(self) -> None:
        """Let go of whatever prepares samples; may be called again."""


@dataclass(frozen=True)
class Splits:
    """The two halves of a data set, fed alike."""

    train: SampleSource
    test: SampleSource
    identity: str = ""
    """Names what they hold: another set of files has another; empty: made up from the settings."""

    def close(self) -> None:
        """Close both."""
        self.train.close()
        self.test.close()
