"""The small runs of the cluster tests, and the weights of the same runs undisturbed on one rank.

They name the CPU as their device, since the cluster's GPUs are null devices.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest

from tests.launching import train_alone, weights_digest, write_config

_SHAPE = {"name": "synthetic", "synthetic_shape": [1, 8, 8]}
_MODEL = {"width": 0.0625, "norm": "ghost", "ghost_size": 16, "norm_samples": 64}
_COMMON: Mapping[str, Any] = {
    "model": _MODEL,
    "noise": {"method": "smoothout", "amplitude": 0.01},
    "precision": {"threads": 1},
    "metrics": {"enabled": False},
}
LARGE_BATCH: Mapping[str, Any] = {
    **_COMMON,
    "run": {"name": "large", "epochs": 2, "device": "cpu"},
    "data": {**_SHAPE, "synthetic_samples": 16384},
    "batch": {"global_size": 8192, "micro_size": 1024},
    "evaluation": {"every_epochs": 0, "train_samples": 100},
}
"""Global batch 8192, four updates."""
LONG: Mapping[str, Any] = {
    **_COMMON,
    "run": {"name": "long", "epochs": 25, "device": "cpu"},
    "data": {**_SHAPE, "synthetic_samples": 800},
    "batch": {"global_size": 64, "micro_size": 16},
    "optimizer": {"learning_rate": 0.001},
    "evaluation": {"every_epochs": 0, "train_samples": 100},
    "checkpoint": {"every_epochs": 0, "every_steps": 30},
}
"""Many small updates, so that faults can happen in the middle."""


@dataclass(frozen=True)
class Undisturbed:
    """A configuration, and the digest of the final weights of its run on one rank."""

    config: str
    weights: str


@pytest.fixture(scope="session")
def large_batch(tmp_path_factory: pytest.TempPathFactory) -> Undisturbed:
    """LARGE_BATCH and its final weights."""
    return _train_alone(tmp_path_factory.mktemp("large"), LARGE_BATCH)


@pytest.fixture(scope="session")
def long_run(tmp_path_factory: pytest.TempPathFactory) -> Undisturbed:
    """LONG and its final weights."""
    return _train_alone(tmp_path_factory.mktemp("long"), LONG)


def _train_alone(folder: Path, settings: Mapping[str, Any]) -> Undisturbed:
    config = write_config(folder, settings)
    train_alone(config, folder / "run")
    return Undisturbed(config, weights_digest(folder / "run"))
