"""`python -m tests.golden.regenerate` makes the records again; the commit must say why they differ."""

from __future__ import annotations

import json
import tempfile
from pathlib import Path

from dist_train.config import parse_config
from dist_train.launching.run import train
from tests.launching import records, small_settings

RECORDS = Path(__file__).with_name("records.json")
_RECORDED = ("loss", "learning_rate", "noise_amplitude")


def golden_records() -> dict[str, list[float]]:
    """Return what 20 updates in float32 record, with ghost norm, noise, warm-up, clipping and augmentation."""
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
        updates = records(Path(folder) / "run", "train")
    return {name: [update[name] for update in updates] for name in _RECORDED}


if __name__ == "__main__":
    RECORDS.write_text(json.dumps(golden_records(), indent=2) + "\n")
