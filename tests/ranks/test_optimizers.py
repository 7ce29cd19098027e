"""Promises 3 and 5 with every optimizer but SGD, in real launches."""

from __future__ import annotations

import random
from pathlib import Path
from typing import Any

import pytest

from tests.launching import (
    assert_same_run,
    events,
    kill_while_training,
    records,
    small_settings,
    start,
    status,
    train_alone,
    train_ranks,
    write_config,
)

pytestmark = [pytest.mark.ranks, pytest.mark.lengthy]

RATES = {"sgd": 0.05, "adam": 1e-3, "adamw": 1e-3, "lars": 5.0, "lamb": 0.01}


def optimizer(name: str) -> dict[str, Any]:
    return {"name": name, "learning_rate": RATES[name], "weight_decay": 1e-3}


@pytest.mark.parametrize("name", ["lamb", "adam", "adamw", "lars"])
def test_promise_3_two_ranks_are_bit_identical_to_one_also_after_a_resume(tmp_path: Path, name: str) -> None:
    config = write_config(
        tmp_path,
        small_settings(run={"max_steps": 16}, optimizer=optimizer(name), comm={"verify_every": 1}),
    )
    alone, run = tmp_path / "alone", tmp_path / "run"
    train_alone(config, alone)
    for steps, controller in ((11, "mpi"), (16, "torch")):
        train_ranks(2, controller, config, run, f"run.max_steps={steps}")
    assert_same_run(run, alone, ["train"])
    losses = [record["loss"] for record in records(run, "train")]
    assert min(losses) < losses[0]


@pytest.mark.parametrize("name", ["lars", "adamw"])
def test_promise_5_killed_run_resumes_bit_identically(tmp_path: Path, name: str) -> None:
    """With augmentation, ghost norm and langevin noise."""
    config = write_config(
        tmp_path,
        small_settings(
            run={"epochs": 20},
            data={"augment": "crop-flip"},
            noise={"method": "langevin", "amplitude": 1e-4, "schedule": {"kind": "cosine"}},
            optimizer=optimizer(name),
            schedule={"warmup_epochs": 2, "decay": "poly"},
            evaluation={"every_epochs": 5},
            checkpoint={"every_steps": 3},
        ),
    )
    whole, run = tmp_path / "whole", tmp_path / "run"
    train_alone(config, whole)
    moments = random.Random(name)
    for controller in ("torch", "mpi"):
        process = start(2, controller, "train", config, "--run-dir", str(run))
        kill_while_training(process, run, moments)
    train_ranks(2, "mpi", config, run)
    assert status(run)["state"] == "finished"
    assert events(run, "resumed")
    assert_same_run(run, whole)
