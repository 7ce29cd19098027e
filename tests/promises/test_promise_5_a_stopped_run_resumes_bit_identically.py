"""Promise 5: SIGKILL at any moment, then the same command: the run of one that was never stopped."""

from __future__ import annotations

import random
import shutil
import time
from pathlib import Path

import pytest

from tests.launching import (
    kill,
    launch,
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

KILLS = 6


@pytest.mark.ranks
def test_kills_of_the_whole_job_at_random_moments(tmp_path: Path) -> None:
    config = write_config(
        tmp_path,
        small_settings(
            run={"epochs": 40},
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
        seen = lines_of(run / "metrics.jsonl")
        # Not before it trains, or all kills would fall into imports.
        wait_for_lines(run / "metrics.jsonl", seen + moments.randint(1, 20))
        time.sleep(moments.uniform(0.0, 0.02))
        assert process.poll() is None, "the run ended before it could be killed; make it longer"
        kill(process)
    ended = launch(2, "torch", "train", config, "--run-dir", str(run))
    assert ended.code == 0, ended.output

    assert status(run)["state"] == "finished"
    assert weights_digest(run) == weights_digest(tmp_path / "whole")
    assert results(run) == results(tmp_path / "whole")


def test_resume_auto_begins_where_there_is_nothing_to_resume(tmp_path: Path) -> None:
    config = write_config(tmp_path, small_settings(run={"max_steps": 2, "resume": "auto"}))
    ended = launch(1, "alone", "train", config, "--run-dir", str(tmp_path / "run"))
    assert ended.code == 0, ended.output


def test_going_on_under_other_settings_is_refused_and_names_them(tmp_path: Path) -> None:
    config = write_config(tmp_path, small_settings(run={"max_steps": 2}))
    run = tmp_path / "run"
    assert launch(1, "alone", "train", config, "--run-dir", str(run)).code == 0
    before = weights_digest(run)
    ended = launch(1, "alone", "train", config, "noise.amplitude=0.5", "run.max_steps=4", "--run-dir", str(run))
    assert ended.code == 2
    assert "[settings-changed]" in ended.output
    assert "Traceback" not in ended.output
    assert weights_digest(run) == before


@pytest.mark.ranks
def test_a_lengthened_run_is_the_same_on_any_number_of_ranks(tmp_path: Path) -> None:
    config = write_config(
        tmp_path,
        small_settings(run={"epochs": 2}, noise={"schedule": {"kind": "cosine"}}, schedule={"decay": "cosine"}),
    )
    alone, two = tmp_path / "alone", tmp_path / "two"
    for epochs in (2, 4):
        train_alone(config, alone, f"run.epochs={epochs}")
        ended = launch(2, "torch", "train", config, f"run.epochs={epochs}", "--run-dir", str(two))
        assert ended.code == 0, ended.output
    assert weights_digest(two) == weights_digest(alone)
    assert results(two) == results(alone)
    for run in (alone, two):
        [event] = [record for record in records(run, "event") if record["event"] == "lengthened"]
        assert (event["step"], event["before"], event["now"]) == (16, 2, 4)
    rates = [record["learning_rate"] for record in records(alone, "train")]
    assert rates[16] == pytest.approx(0.025), "half way down a cosine that is laid out over four epochs"


def test_without_schedules_a_lengthened_run_is_one_that_was_as_long_from_the_beginning(tmp_path: Path) -> None:
    config = write_config(tmp_path, small_settings(run={"epochs": 2}))
    renamed, whole = tmp_path / "renamed", tmp_path / "whole"
    train_alone(config, tmp_path / "short")
    train_alone(config, renamed, "run.epochs=4", f"run.resume={tmp_path / 'short'}")
    train_alone(config, whole, "run.epochs=4")
    assert weights_digest(renamed) == weights_digest(whole)
    assert results(renamed, ["train"]) == [record for record in results(whole, ["train"]) if record["step"] > 16]


@pytest.mark.ranks
def test_a_run_begins_with_the_weights_of_another_on_any_number_of_ranks(tmp_path: Path) -> None:
    config = write_config(tmp_path, small_settings(run={"epochs": 1}))
    source, alone, two = tmp_path / "source", tmp_path / "alone", tmp_path / "two"
    train_alone(config, source, "run.epochs=2")
    tuned = ("run.seed=1", f"run.init_from={source}", "optimizer.name=adam", "noise.method=none")
    train_alone(config, alone, *tuned)
    # killed in mid-run, it resumes from its own checkpoint: the source is needed no more
    stopped = launch(2, "torch", "train", config, *tuned, "run.max_steps=3", "--run-dir", str(two))
    assert stopped.code == 0, stopped.output
    digest = weights_digest(source)
    [initialized] = [record for record in records(two, "event") if record["event"] == "initialized"]
    assert initialized["step"] == 0
    assert initialized["checkpoint"] == str(source / "checkpoints" / "step-00000016.pt")
    shutil.rmtree(source)
    ended = launch(2, "torch", "train", config, *tuned, "--run-dir", str(two))
    assert ended.code == 0, ended.output
    assert weights_digest(two) == weights_digest(alone) != digest
    assert results(two, ["train"]) == results(alone, ["train"])
