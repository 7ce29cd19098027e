"""Promise 5: after SIGKILL at any moment, the same command resumes bit-identically to an undisturbed run."""

from __future__ import annotations

import random
import shutil
from pathlib import Path

import pytest

from tests.launching import (
    assert_same_run,
    events,
    kill_while_training,
    records,
    results,
    run_here,
    small_settings,
    start,
    status,
    train_alone,
    train_ranks,
    weights_digest,
    write_config,
)

KILLS = 2


@pytest.mark.ranks
def test_run_killed_at_random_moments_resumes_bit_identically(tmp_path: Path) -> None:
    config = write_config(
        tmp_path,
        small_settings(
            run={"epochs": 28},
            noise={"sharing": "micro_batch", "schedule": {"kind": "cosine"}},
            schedule={"warmup_epochs": 3, "decay": "cosine"},
            evaluation={"every_epochs": 5},
            checkpoint={"every_steps": 3},
        ),
    )
    train_alone(config, tmp_path / "whole")

    moments = random.Random(0)
    run = tmp_path / "run"
    for number in range(KILLS):
        process = start(2, ("torch", "mpi")[number % 2], "train", config, "--run-dir", str(run))
        kill_while_training(process, run, moments)
    train_ranks(2, "torch", config, run)

    assert status(run)["state"] == "finished"
    assert events(run, "resumed")
    assert_same_run(run, tmp_path / "whole")


def test_resume_auto_starts_a_run_where_there_is_nothing_to_resume(tmp_path: Path) -> None:
    config = write_config(tmp_path, small_settings(run={"max_steps": 2, "resume": "auto"}))
    train_alone(config, tmp_path / "run")


def test_resume_with_changed_settings_is_refused(tmp_path: Path) -> None:
    config = write_config(tmp_path, small_settings(run={"max_steps": 2}))
    run = tmp_path / "run"
    train_alone(config, run)
    before = weights_digest(run)
    ended = run_here("train", config, "noise.amplitude=0.5", "run.max_steps=4", "--run-dir", str(run))
    assert ended.code == 2
    assert "[settings-changed]" in ended.output
    assert "Traceback" not in ended.output
    assert weights_digest(run) == before


@pytest.mark.ranks
def test_lengthened_run_is_bit_identical_on_any_number_of_ranks(tmp_path: Path) -> None:
    config = write_config(
        tmp_path,
        small_settings(run={"epochs": 2}, noise={"schedule": {"kind": "cosine"}}, schedule={"decay": "cosine"}),
    )
    alone, two = tmp_path / "alone", tmp_path / "two"
    for epochs in (2, 4):
        train_alone(config, alone, f"run.epochs={epochs}")
        train_ranks(2, "torch", config, two, f"run.epochs={epochs}")
    assert_same_run(two, alone)
    for run in (alone, two):
        [event] = events(run, "lengthened")
        assert (event["step"], event["before"], event["now"]) == (16, 2, 4)
    rates = [record["learning_rate"] for record in records(alone, "train")]
    assert rates[16] == pytest.approx(0.025), "half of a cosine over four epochs"


def test_lengthened_run_without_schedules_is_bit_identical_to_a_long_one(tmp_path: Path) -> None:
    config = write_config(tmp_path, small_settings(run={"epochs": 2}))
    renamed, whole = tmp_path / "renamed", tmp_path / "whole"
    train_alone(config, tmp_path / "short")
    train_alone(config, renamed, "run.epochs=4", f"run.resume={tmp_path / 'short'}")
    train_alone(config, whole, "run.epochs=4")
    assert weights_digest(renamed) == weights_digest(whole)
    assert results(renamed, ["train"]) == [record for record in results(whole, ["train"]) if record["step"] > 16]


@pytest.mark.ranks
def test_run_initialized_from_another_is_bit_identical_on_any_number_of_ranks(tmp_path: Path) -> None:
    config = write_config(tmp_path, small_settings(run={"epochs": 1}))
    source, alone, two = tmp_path / "source", tmp_path / "alone", tmp_path / "two"
    train_alone(config, source, "run.epochs=2")
    tuned = ("run.seed=1", f"run.init_from={source}", "optimizer.name=adam", "noise.method=none")
    train_alone(config, alone, *tuned)
    # Stopped midway, it resumes from its own checkpoint and no longer needs the source.
    train_ranks(2, "torch", config, two, *tuned, "run.max_steps=3")
    digest = weights_digest(source)
    [initialized] = events(two, "initialized")
    assert initialized["step"] == 0
    assert initialized["checkpoint"] == str(source / "checkpoints" / "step-00000016.pt")
    shutil.rmtree(source)
    train_ranks(2, "torch", config, two, *tuned)
    assert weights_digest(two) == weights_digest(alone) != digest
    assert results(two, ["train"]) == results(alone, ["train"])
