"""The form in which every data set reaches the rest of the program, and what a trainer asks of samples."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass
from typing import Literal, Protocol

import torch
from torch import Tensor

Split = Literal["train", "test"]


@dataclass(frozen=True)
class ImageSet:
    """Images uint8 [N, C, H, W], labels int64 [N] in 0..classes-1, both on the CPU.

    The tensors may be views of a file that all local ranks map: treat them as read-only. (A write
    would stay in this process; it never reaches the file.)
    """

    images: Tensor
    labels: Tensor
    classes: int
    identity: str = ""
    """Names the files that these come from, by their digest; empty: made up from the settings."""

    def __post_init__(self) -> None:
        assert self.images.dtype == torch.uint8
        assert self.images.ndim == 4
        assert self.labels.dtype == torch.int64
        assert self.labels.shape == self.images.shape[:1]

    def __len__(self) -> int:
        return self.images.shape[0]

    @property
    def shape(self) -> tuple[int, int, int]:
        """Channels, height and width of one image."""
        _, channels, height, width = self.images.shape
        return channels, height, width


@dataclass(frozen=True)
class BatchRequest:
    """The samples of a batch, int64 [n] on the CPU, and the epoch that augments them; None: as they are."""

    indices: Tensor
    epoch: int | None = None


class SampleSource(Protocol):
    """The samples of one split, on the device, as the network reads them."""

    @property
    def classes(self) -> int:
        """How many classes there are."""

    @property
    def shape(self) -> tuple[int, int, int]:
        """Channels, height and width of an input."""

    def __len__(self) -> int: ...

    def read(self, batch: BatchRequest) -> tuple[Tensor, Tensor]:
        """Return inputs [n, C, H, W] and labels int64 [n] of `batch`."""

    def prefetch(self, batches: Iterable[BatchRequest]) -> None:
        """Begin to prepare what will be asked for next, in this order; replaces earlier announcements.

        Changes when work is done, never a result.
        """

    def close(self) -> None:
        """Stop what prepares samples; may be called again."""


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
