"""`ranks.json`: the latest measurement, at a steady pace, whatever the disk says."""

from __future__ import annotations

import json
import logging
import math
from pathlib import Path

import pytest

from dist_train.rundir.records import Measurement, Outcome, RankMeasurement, StepParts
from dist_train.rundir.status import RanksFile, RanksReading, read_ranks

OUTCOME = Outcome("finished", "", 0, 9, 1.0, 1.0, None, None, None, None, None)


def measurement(step: int, *busy: float) -> Measurement:
    ranks = tuple(RankMeasurement(seconds, 0.1, 2e9, math.nan, math.nan, math.nan) for seconds in busy)
    return Measurement(step, 1000.0 + step, 0.5, StepParts(0.1, 0.2, 0.0, 0.1, 0.0, 0.0), 3.0, 1.0, ranks)


@pytest.fixture
def clock(monkeypatch: pytest.MonkeyPatch) -> list[float]:
    now = [100.0]
    monkeypatch.setattr("dist_train.rundir.status.time.monotonic", lambda: now[0])
    return now


def steps_written(path: Path, file: RanksFile, clock: list[float], seconds: float, steps: range) -> list[int]:
    written = []
    for step in steps:
        file.measurement(measurement(step, 0.4))
        clock[0] += seconds
        reading = read_ranks(path)
        assert reading is not None
        written.append(reading.step)
    return written


def test_what_was_measured_is_read_back_and_nan_is_null_in_between(tmp_path: Path) -> None:
    path = tmp_path / "ranks.json"
    RanksFile(path).measurement(measurement(7, 0.25, 0.5))
    assert json.loads(path.read_text())["ranks"][0]["device_bytes"] is None
    reading = read_ranks(path)
    assert reading is not None
    assert (reading.step, reading.time) == (7, 1007.0)
    assert [rank.busy_seconds for rank in reading.ranks] == [0.25, 0.5]
    assert math.isnan(reading.ranks[1].device_utilization)


def test_it_is_written_at_most_once_a_second_and_at_the_end(tmp_path: Path, clock: list[float]) -> None:
    path = tmp_path / "ranks.json"
    file = RanksFile(path)
    assert steps_written(path, file, clock, 0.4, range(1, 8)) == [1, 1, 1, 4, 4, 4, 7]
    file.measurement(measurement(8, 0.4))
    file.end(OUTCOME)
    assert read_ranks(path) == RanksReading(8, 1008.0, read_ranks(path).ranks)  # type: ignore[union-attr]
    assert [left.name for left in tmp_path.iterdir()] == ["ranks.json"]


def test_a_disk_that_refuses_costs_one_warning_until_it_takes_again(
    tmp_path: Path, clock: list[float], caplog: pytest.LogCaptureFixture
) -> None:
    folder = tmp_path / "run"
    file = RanksFile(folder / "ranks.json")
    with caplog.at_level(logging.WARNING):
        for step in range(1, 5):
            file.measurement(measurement(step, 0.4))
            clock[0] += 2.0
        assert len(caplog.records) == 1
        folder.mkdir()
        file.measurement(measurement(5, 0.4))
    assert len(caplog.records) == 1
    reading = read_ranks(folder / "ranks.json")
    assert reading is not None
    assert reading.step == 5


@pytest.mark.parametrize("content", ["", "{", "[]", '{"step": 1, "time": 1.0, "ranks": [{}]}', '{"step": null}'])
def test_a_file_that_holds_something_else_is_none(tmp_path: Path, content: str) -> None:
    path = tmp_path / "ranks.json"
    path.write_text(content)
    assert read_ranks(path) is None
    assert read_ranks(tmp_path / "nowhere") is None
