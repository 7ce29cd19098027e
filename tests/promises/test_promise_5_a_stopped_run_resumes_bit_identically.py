"""Promise 5: SIGKILL at any moment, then the same command: the run of one that was never stopped."""

from __future__ import annotations

import random
import time
from pathlib import Path

import pytest

from tests.launching import (
    kill,
    launch,
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
