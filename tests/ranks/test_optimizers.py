"""Promises 3 and 5 with optimizers other than SGD, in real launches."""

from __future__ import annotations

import random
import time
from pathlib import Path
from typing import Any

import pytest

from tests.launching import (
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

RATES = {"sgd": 0.05, "adam": 1e-3, "adamw": 1e-3, "lars": 5.0, "lamb": 0.01}


def optimizer(name: str) -> dict[str, Any]:
    return {"name": name, "learning_rate": RATES[name], "weight_decay": 1e-3}


@pytest.mark.parametrize("name", mostly_lengthy(["lamb", "adam", "adamw", "lars"]))
def test_promise_3_two_ranks_end_with_the_bits_of_one_also_gone_on_with(tmp_path: Path, name: str) -> None:
    config = write_config(
        tmp_path,
        small_settings(run={"max_steps": 16}, optimizer=optimizer(name), comm={"verify_every": 1}),
    )
    alone, run = tmp_path / "alone", tmp_path / "run"
    train_alone(config, alone)
    for steps, controller in ((11, "mpi"), (16, "torch")):
        ended = launch(2, controller, "train", config, f"run.max_steps={steps}", "--run-dir", str(run))
        assert ended.code == 0, ended.output
    assert weights_digest(run) == weights_digest(alone)
    assert results(run, ["train"]) == results(alone, ["train"])
    losses = [record["loss"] for record in records(run, "train")]
    assert min(losses) < losses[0]


@pytest.mark.lengthy
@pytest.mark.parametrize("name", ["lars", "adamw"])
def test_promise_5_killed_and_gone_on_with_bit_identically(tmp_path: Path, name: str) -> None:
    """Under augmentation, ghost norm and langevin noise."""
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
        seen = lines_of(run / "metrics.jsonl")
        wait_for_lines(run / "metrics.jsonl", seen + moments.randint(1, 20))
        time.sleep(moments.uniform(0.0, 0.02))
        assert process.poll() is None, "the run ended before it could be killed; make it longer"
        kill(process)
    ended = launch(2, "mpi", "train", config, "--run-dir", str(run))
    assert ended.code == 0, ended.output
    assert status(run)["state"] == "finished"
    assert any(event["event"] == "resumed" for event in records(run, "event"))
    assert weights_digest(run) == weights_digest(whole)
    assert results(run) == results(whole)
