"""Records of runs for the tests: numbers that a test does not give are plausible ones."""

from __future__ import annotations

from collections.abc import Iterable
from pathlib import Path

from dist_train.rundir.metrics_file import to_json
from dist_train.rundir.records import EvaluationRecord, Record, TrainRecord

STEPS_PER_EPOCH = 7


def train(step: int, **numbers: float) -> TrainRecord:
    """Return the record of update `step`."""
    plausible = {
        "epoch": step / STEPS_PER_EPOCH,
        "loss": 0.5,
        "accuracy": 0.5,
        "learning_rate": 0.1,
        "noise_amplitude": 0.0,
        "gradient_norm": 1.0,
        "step_seconds": 0.5,
        "samples_per_second": 100.0,
        "time": 0.0,
    }
    return TrainRecord(step, **{**plausible, **numbers})


def evaluation(step: int, split: str = "test", **numbers: float) -> EvaluationRecord:
    """Return the record of an evaluation after update `step`."""
    plausible = {"epoch": step / STEPS_PER_EPOCH, "loss": 0.5, "accuracy": 0.5, "time": 0.0}
    return EvaluationRecord(step, split=split, samples=100, **{**plausible, **numbers})


def write_records(directory: Path, records: Iterable[Record], torn: str = "") -> None:
    """Write the `metrics.jsonl` of a run, with a last line `torn` that a crash cut off."""
    lines = [to_json(record) + "\n" for record in records]
    (directory / "metrics.jsonl").write_text("".join(lines) + torn)
