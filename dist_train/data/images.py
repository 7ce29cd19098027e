"""The form in which every data set reaches the rest of the program."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

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
