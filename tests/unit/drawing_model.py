"""A network that draws from the global generators: in training dropout, and a block that is skipped or scaled.

In evaluations, too: Monte Carlo dropout, and factors from Python's and NumPy's generators.
"""

from __future__ import annotations

import random
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn
from torch.nn import functional


class Drawing(nn.Module):
    def __init__(self, channels: int, classes: int, norm: Any) -> None:
        super().__init__()
        self.stem, self.norm = nn.Conv2d(channels, 8, 3, padding=1), norm(8)
        self.block, self.after = nn.Conv2d(8, 8, 3, padding=1), norm(8)
        self.head = nn.Sequential(nn.Dropout(0.5), nn.Linear(8, classes))
        self.masks: list[Tensor] = []

    def forward(self, images: Tensor) -> Tensor:
        features = functional.relu(self.norm(self.stem(images)))
        kept = torch.ones(len(images), 1, 1, 1)
        if self.training:
            kept.bernoulli_(0.7).mul_(0.5 + random.random()).mul_(0.5 + float(np.random.random()))
            self.masks.append(kept.flatten())
        else:
            kept = functional.dropout(kept, 0.2).mul_(0.5 + random.random()).mul_(0.5 + float(np.random.random()))
        features = features + self.after(self.block(kept * features))  # whose statistics depend on the draws
        features = functional.dropout(features.mean((2, 3)), 0.2, self.training)
        logits: Tensor = self.head(features)
        return logits


def drawing(images: Any, width: float, norm: Any) -> nn.Module:
    return Drawing(images.shape[0], images.classes, norm)
