"""Promise 8: dropout, averages, mixed samples, validation and early stopping keep the other promises."""

from __future__ import annotations

import random
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import pytest

from tests.launching import (
    assert_same_run,
    digest_of,
    events,
    final_checkpoint,
    kill_while_training,
    mostly_lengthy,
    results,
    small_settings,
    start,
    status,
    train_alone,
    train_ranks,
    write_config,
)

pytestmark = pytest.mark.ranks

FEATURES: Mapping[str, Mapping[str, Mapping[str, Any]]] = {
    "dropout, ema, mixup, cutmix, label smoothing, validation": {
        "model": {"name": "tests.unit.drawing_model:drawing"},
        "averaging": {"kind": "ema", "decay": 0.9},
        "regularization": {"mixup": 0.4, "cutmix": 1.0, "label_smoothing": 0.1},
        "data": {"validation_size": 60, "augment": "crop-flip"},
        "noise": {"method": "none"},
    },
    "arwp, antithetic": {
        "averaging": {"kind": "lawa", "last": 2},
        "noise": {"method": "arwp", "scale": "filter_norm", "sharing": "micro_batch", "antithetic": True},
    },
    "ivon": {
        "averaging": {"kind": "lawa", "last": 2},
        "noise": {"method": "ivon", "sample_size": 1000.0},
        "optimizer": {"name": "sgd", "momentum": 0.0, "nesterov": False, "weight_decay": 0.0},
    },
    "lawa with noise, cutmix": {
        "averaging": {"kind": "lawa", "last": 3, "every_steps": 4},
        "regularization": {"cutmix": 1.0},
        "noise": {"sharing": "micro_batch"},
    },
}


def settings_of(sections: Mapping[str, Mapping[str, Any]]) -> dict[str, Any]:
    small = small_settings(run={"epochs": 4}, checkpoint={"every_steps": 3}, comm={"verify_every": 5})
    return {name: {**small.get(name, {}), **sections.get(name, {})} for name in {*small, *sections}}


def average_digests(run: Path) -> list[str]:
    """Return the digests of the average and the noise in the last checkpoint."""
    contents = final_checkpoint(run)
    average = contents["average"]
    kept = (*average.get("kept", ()), average.get("statistics", {}), contents["noise"])
    return [digest_of(each) for each in kept]


@pytest.mark.parametrize("features", mostly_lengthy(FEATURES))
def test_killed_run_on_two_ranks_resumes_on_three_bit_identically_to_one(tmp_path: Path, features: str) -> None:
    config = write_config(tmp_path, settings_of({"run": {"epochs": 12}, **FEATURES[features]}))
    whole, run = tmp_path / "whole", tmp_path / "run"
    train_alone(config, whole)
    process = start(2, "torch", "train", config, "--run-dir", str(run))
    kill_while_training(process, run, random.Random(features))
    train_ranks(3, "torch", config, run)
    assert events(run, "resumed")
    assert_same_run(run, whole)
    assert average_digests(run) == average_digests(whole)
    assert {"test", "test-averaged"} <= {record["split"] for record in results(run, ["eval"])}


def test_all_ranks_stop_early_at_the_same_step_and_a_resume_reports_it(tmp_path: Path) -> None:
    sections: dict[str, dict[str, Any]] = {
        "early_stopping": {"patience": 2, "min_delta": 1.0},
        "data": {"validation_size": 60},
    }
    config = write_config(tmp_path, settings_of(sections))
    whole, run = tmp_path / "whole", tmp_path / "run"
    train_alone(config, whole)
    for controller in ("torch", "mpi"):
        ended = train_ranks(2, controller, config, run)
        assert_same_run(run, whole)
        after = status(run)
        # The first evaluation sets the best accuracy, which the next two do not exceed by `min_delta`.
        assert (after["state"], after["step"]) == ("finished", 3 * 7)
        assert "stopped early" in after["reason"]
        assert "stopped early" in ended.output
    [event] = events(run, "stopped_early")
    assert event["step"] == 21
    train_alone(config, run, "early_stopping.patience=3")
    assert (status(run)["step"], status(run)["reason"]) == (28, "")
