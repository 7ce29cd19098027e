"""Data sets with many samples, or larger than the memory."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from dist_train.config import DataSettings
from dist_train.data.images import BatchRequest
from dist_train.data.loader import open_splits
from tests.unit import drawing_data

CPU = torch.device("cpu")
MANY = 2**24 + 4  # float32 rounds the number of the last sample up to this


class Numbers:
    """A Dataset of black images, which no sample beyond its length has, without a byte of memory."""

    def __init__(self, count: int) -> None:
        self.count = count

    def __len__(self) -> int:
        return self.count

    def __getitem__(self, index: int) -> tuple[torch.Tensor, int]:
        if not 0 <= index < self.count:
            raise IndexError(index)
        return torch.zeros(1, 1, 1, dtype=torch.uint8), index % 2


def test_a_dataset_may_have_more_samples_than_float32_can_count(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(drawing_data, "drawing", lambda settings, split, seed: Numbers(MANY if split == "train" else 4))
    own: dict[str, Any] = {"name": "tests.unit.drawing_data:drawing", "shape": (1, 1, 1), "classes": 2}
    splits = open_splits(DataSettings.model_validate(own), 0, CPU)
    assert splits.train.read(BatchRequest(torch.tensor([MANY - 1])))[1].tolist() == [(MANY - 1) % 2]


def test_arrays_may_have_more_samples_than_float32_can_count(tmp_path: Path) -> None:
    for split, count in (("train", MANY), ("test", 4)):
        np.save(tmp_path / f"{split}_images.npy", np.zeros((count, 1, 1), np.uint8))
        np.save(tmp_path / f"{split}_labels.npy", np.zeros(count, np.uint8))
    splits = open_splits(DataSettings(name="numpy", root=tmp_path, shape=(1, 1, 1), classes=2), 0, CPU)
    assert len(splits.train) == MANY
    assert splits.identity
