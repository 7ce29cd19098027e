"""`python -m tests.golden.regenerate` records the losses anew; say in the commit why they may differ."""

from __future__ import annotations

import json
import tempfile
from pathlib import Path

from dist_train.config import parse_config
from dist_train.launching import train
from tests.launching import records, small_settings

LOSSES = Path(__file__).with_name("losses.json")


def golden_losses() -> list[float]:
    """Return the losses of 20 updates in float32: ghost norm, noise, warm-up, clipping, augmentation."""
    settings = small_settings(
        run={"max_steps": 20},
        data={"augment": "crop-flip"},
        noise={"sharing": "micro_batch", "schedule": {"kind": "cosine"}},
        optimizer={"learning_rate": 0.01, "weight_decay": 1e-3, "clip_norm": 1.0},
        schedule={"scaling": "sqrt", "base_batch": 50, "warmup_epochs": 1, "decay": "cosine"},
        evaluation={"every_epochs": 0},
        checkpoint={"every_epochs": 0},
    )
    with tempfile.TemporaryDirectory() as folder:
        train(parse_config(settings, source="golden"), Path(folder) / "run")
        return [record["loss"] for record in records(Path(folder) / "run", "train")]


if __name__ == "__main__":
    LOSSES.write_text(json.dumps(golden_losses(), indent=2) + "\n")
