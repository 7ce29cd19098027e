"""Real runs of `dist-train train`: timed from the launcher's start, and what they leave behind."""

from __future__ import annotations

import hashlib
import time
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from benchmarks.launching import finish, module, on_ranks
from benchmarks.subject import settings
from dist_train.checkpoint.files import find_checkpoint, read_checkpoint
from dist_train.config import dump_config
from dist_train.rundir.metrics_file import read_records
from dist_train.rundir.paths import RunDirectory
from dist_train.rundir.records import Record, TrainRecord

_SECTIONS: Mapping[str, Mapping[str, Any]] = {
    "batch": {"micro_size": 64},
    "noise": {"method": "smoothout", "amplitude": 1e-4},
    "evaluation": {"train_samples": 0},
    "data": {"synthetic_samples": 512},
    "metrics": {"port": 0},
}
"""For a batch of 128 on two ranks: micro-batches of 64, SmoothOut, metrics served."""


def write_settings(folder: Path, width: float) -> Path:
    """Write the settings of a typical user's run of VGG9 of `width`, and return the file."""
    path = folder / "config.yaml"
    path.write_text(dump_config(settings(width, 128, **_SECTIONS)))
    return path


def seconds_to_step(step: int, config: Path, run: Path, *, controller: str, ranks: int) -> float:
    """Run until `step` is done, and return the seconds from the launch to its end, without the end of the run.

    Raises:
        NotMeasuredError: the run failed.
    """
    program = module("dist_train", "train", config, f"run.max_steps={step}", "--run-dir", run)
    started = time.time()
    finish(on_ranks(controller, ranks, program))
    [done] = [record.time for record in records_of(run) if isinstance(record, TrainRecord) and record.step == step]
    return done - started


def records_of(run: Path) -> tuple[Record, ...]:
    """Return the records of `run`; none before it begins."""
    path = RunDirectory(run).metrics
    return read_records(path) if path.exists() else ()


def weights_digest(run: Path) -> str:
    """Return a digest of the weights and statistics in the last checkpoint of `run`, and of its step."""
    contents = read_checkpoint(find_checkpoint(run))
    digest = hashlib.blake2b(str(contents.step).encode(), digest_size=8)
    for name, value in contents.model.items():
        digest.update(name.encode())
        digest.update(value.cpu().contiguous().numpy().tobytes())
    return digest.hexdigest()
