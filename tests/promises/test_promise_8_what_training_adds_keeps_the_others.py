"""Averages, mixed samples, a validation split and early stopping: the same bits on any ranks, and after a kill."""

from __future__ import annotations

import random
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import pytest

from tests.launching import (
    digest_of,
    final_checkpoint,
    kill,
    launch,
    mostly_lengthy,
    records,
    results,
    small_settings,
    start,
    status,
    train_alone,
    weights_digest,
    write_config,
)
from tests.waiting import lines_of, wait_for_lines

pytestmark = pytest.mark.ranks

FEATURES: Mapping[str, Mapping[str, Mapping[str, Any]]] = {
    "ema, mixup, cutmix, label smoothing, validation": {
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
    """Return the digests of what the last checkpoint holds of the average, and of the noise."""
    contents = final_checkpoint(run)
    average = contents["average"]
    kept = (*average.get("kept", ()), average.get("statistics", {}), contents["noise"])
    return [digest_of(each) for each in kept]


@pytest.mark.parametrize("features", mostly_lengthy(FEATURES))
def test_the_same_bits_on_one_two_and_three_ranks_and_after_a_kill(tmp_path: Path, features: str) -> None:
    config = write_config(tmp_path, settings_of(FEATURES[features]))
    whole, run = tmp_path / "whole", tmp_path / "run"
    train_alone(config, whole)
    process = start(2, "torch", "train", config, "--run-dir", str(run))
    seen = lines_of(run / "metrics.jsonl")
    wait_for_lines(run / "metrics.jsonl", seen + random.Random(features).randint(4, 10))
    kill(process)
    ended = launch(3, "torch", "train", config, "--run-dir", str(run))
    assert ended.code == 0, ended.output
    assert weights_digest(run) == weights_digest(whole)
    assert average_digests(run) == average_digests(whole)
    assert results(run) == results(whole)
    assert {"test", "test-averaged"} <= {record["split"] for record in results(run, ["eval"])}


def test_all_ranks_stop_early_together_and_a_resume_says_so(tmp_path: Path) -> None:
    sections: dict[str, dict[str, Any]] = {
        "early_stopping": {"patience": 2, "min_delta": 1.0},
        "data": {"validation_size": 60},
    }
    config = write_config(tmp_path, settings_of(sections))
    whole, run = tmp_path / "whole", tmp_path / "run"
    train_alone(config, whole)
    for ranks in (2, 3):
        ended = launch(ranks, "torch", "train", config, "--run-dir", str(run))
        assert ended.code == 0, ended.output
        assert (weights_digest(run), results(run)) == (weights_digest(whole), results(whole))
        after = status(run)
        # the first evaluation sets the mark, and two more do not rise by all there is
        assert (after["state"], after["step"]) == ("finished", 3 * 7)
        assert "stopped early" in after["reason"]
        assert "stopped early" in ended.output
    [event] = [record for record in records(run, "event") if record["event"] == "stopped_early"]
    assert event["step"] == 21
    more = launch(1, "alone", "train", config, "early_stopping.patience=3", "--run-dir", str(run))
    assert more.code == 0, more.output
    assert (status(run)["step"], status(run)["reason"]) == (28, "")
