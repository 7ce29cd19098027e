"""Real runs of `dist-train train`, timed from the launcher's start."""

from __future__ import annotations

import json
import subprocess
import time
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from benchmarks.launching import NotMeasuredError, environment, module, on_ranks
from benchmarks.subject import settings
from dist_train.config import dump_config

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
    _finish(on_ranks(controller, ranks, program))
    records = map(json.loads, (run / "metrics.jsonl").read_text().splitlines())
    [done] = [record["time"] for record in records if record["kind"] == "train" and record["step"] == step]
    return float(done - started)


def _finish(command: Sequence[str]) -> None:
    ended = subprocess.run(
        command, env=environment({}), stdin=subprocess.DEVNULL, capture_output=True, text=True, check=False
    )
    if ended.returncode != 0:
        output = f"{ended.stdout[-2000:]}{ended.stderr[-4000:]}"
        raise NotMeasuredError(f"exit code {ended.returncode} from {' '.join(command)}:\n{output}")
