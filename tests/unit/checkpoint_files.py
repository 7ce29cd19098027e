"""Small checkpoints for tests."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch

from dist_train.checkpoint.files import CheckpointFile, Contents, write_checkpoint


def contents(step: int, **changes: Any) -> Contents:
    """Return what a small checkpoint of `step` holds."""
    fields: dict[str, Any] = {
        "step": step,
        "epoch": step / 4,
        "model": {"weight": torch.full((3,), float(step)), "running_mean": torch.zeros(2)},
        "optimizer": {
            "state": {0: {"momentum_buffer": torch.ones(3) * step}},
            "param_groups": [{"lr": 0.1, "params": [0]}],
        },
        "config": {"run": {"seed": 0}},
        "metrics": {"best_accuracy": 0.5, "best_step": 1},
        **changes,
    }
    return Contents(**fields)


def write(folder: Path, step: int, **changes: Any) -> CheckpointFile:
    """Write a small checkpoint of `step` into `folder`."""
    return write_checkpoint(folder, contents(step, **changes), lambda: None)
