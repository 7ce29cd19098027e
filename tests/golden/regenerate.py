"""`python -m tests.golden.regenerate` records the losses again; the commit must say why they differ.

With `--print` it prints them instead.
"""

from __future__ import annotations

import json
import os
import subprocess
import sys
import tempfile
from contextlib import redirect_stdout
from pathlib import Path

from dist_train.config import parse_config
from dist_train.launching import train
from tests.launching import records, small_settings

LOSSES = Path(__file__).with_name("losses.json")
_INSTRUCTIONS = {"ATEN_CPU_CAPABILITY": "avx2", "ONEDNN_MAX_CPU_ISA": "AVX2"}
"""AVX-512 sums in another order; after seven updates some ReLU switches, and losses differ by 1e-3."""


def golden_losses() -> list[float]:
    """Return the losses of 20 updates in float32: ghost norm, noise, warm-up, clipping, augmentation.

    A process computes them with the instructions that all current x86 processors have.
    """
    printed = subprocess.run(
        [sys.executable, "-m", "tests.golden.regenerate", "--print"],
        env={**os.environ, **_INSTRUCTIONS},
        stdout=subprocess.PIPE,
        check=True,
    )
    losses: list[float] = json.loads(printed.stdout)
    return losses


def _compute_losses() -> list[float]:
    settings = small_settings(
        run={"max_steps": 20},
        data={"augment": "crop-flip"},
        noise={"sharing": "micro_batch", "schedule": {"kind": "cosine"}},
        optimizer={"learning_rate": 0.01, "weight_decay": 1e-3, "clip_norm": 1.0},
        schedule={"scaling": "sqrt", "base_batch": 50, "warmup_epochs": 1, "decay": "cosine"},
        evaluation={"every_epochs": 0},
        checkpoint={"every_epochs": 0},
    )
    with tempfile.TemporaryDirectory() as folder, redirect_stdout(sys.stderr):
        train(parse_config(settings, source="golden"), Path(folder) / "run")
        return [record["loss"] for record in records(Path(folder) / "run", "train")]


if __name__ == "__main__":
    if "--print" in sys.argv:
        print(json.dumps(_compute_losses()))
    else:
        LOSSES.write_text(json.dumps(golden_losses(), indent=2) + "\n")
