"""`dist-train launch --min-ranks`: rank 0 is lost and the run ends as always; too few ranks end it."""

from __future__ import annotations

import signal
from pathlib import Path

import pytest

from dist_train.outcome import ExitCode
from tests.elastic import ElasticRun
from tests.launching import records, results, small_settings, status, train_alone, weights_digest, write_config
from tests.waiting import wait_for_lines

pytestmark = pytest.mark.ranks

SETTINGS = small_settings(
    run={"epochs": 8}, comm={"verify_every": 1, "timeout": 20}, metrics={"enabled": True, "port": 0, "ranks": "all"}
)


def test_another_rank_takes_the_place_of_rank_0_and_finishes(tmp_path: Path) -> None:
    config, run = write_config(tmp_path, SETTINGS), tmp_path / "run"
    with ElasticRun(config, run, 2, ("--min-ranks", "1")) as launch:
        wait_for_lines(run / "metrics.jsonl", 4)
        lost = launch.send(0, signal.SIGKILL)
        ended = launch.wait()
    assert ended.code == ExitCode.FINISHED, ended.output
    train_alone(config, tmp_path / "undisturbed", "metrics.enabled=false")
    assert results(run) == results(tmp_path / "undisturbed")
    assert weights_digest(run) == weights_digest(tmp_path / "undisturbed")
    (event,) = [each for each in records(run, "event") if each["event"] == "rank_lost"]
    assert f"process {lost}" in event["who"]
    assert (event["generation"], event["ranks"]) == (2, 1)
    assert event["redone"] in (0, 1)
    ending = status(run)
    assert (ending["state"], ending["world_size"], ending["generation"]) == ("finished", 1, 2)


def test_too_few_ranks_end_the_launch_and_the_same_command_resumes(tmp_path: Path) -> None:
    config, run = write_config(tmp_path, SETTINGS), tmp_path / "run"
    with ElasticRun(config, run, 3, ("--min-ranks", "3")) as launch:
        wait_for_lines(run / "metrics.jsonl", 12)  # a checkpoint, after 8 updates
        launch.send(1, signal.SIGKILL)
        ended = launch.wait()
    assert ended.code == ExitCode.FAULT, ended.output
    assert "2 ranks are left of at least 3" in status(run)["reason"]
    with ElasticRun(config, run, 2, ("--min-ranks", "1")) as launch:
        ended = launch.wait()
    assert ended.code == ExitCode.FINISHED, ended.output
    assert status(run)["state"] == "finished"
