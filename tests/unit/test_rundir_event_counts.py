from __future__ import annotations

import json
import logging
from pathlib import Path

import pytest

from dist_train.rundir.records import EventRecord
from dist_train.rundir.status import EventCounts, read_counts
from tests.unit.exporting import FACTS, OUTCOME, train


def event(name: str, step: int = 1) -> EventRecord:
    return EventRecord(step, name, 1.0, {})


def test_events_are_counted_over_launches(tmp_path: Path) -> None:
    path = tmp_path / "counts.json"
    for _ in range(3):
        counts = EventCounts(path)
        counts.begin(FACTS)
        counts.record(train(1))
        counts.record(event("resumed"))
        counts.record(event("checkpoint"))
        counts.record(event("checkpoint"))
        counts.end(OUTCOME)
    assert json.loads(path.read_text()) == {"checkpoint": 6, "resumed": 3}
    assert read_counts(path) == {"checkpoint": 6, "resumed": 3}
    assert [entry.name for entry in tmp_path.iterdir()] == ["counts.json"]


def test_no_file_is_no_count(tmp_path: Path) -> None:
    assert read_counts(tmp_path / "counts.json") == {}


@pytest.mark.parametrize("content", ["", "[]", '{"checkpoint": -1}', '{"checkpoint": true}', '{"checkpoint": 1.5}'])
def test_a_broken_file_is_reported_and_begun_anew(
    content: str, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    path = tmp_path / "counts.json"
    path.write_text(content)
    with pytest.raises(ValueError, match="counts of events"):
        read_counts(path)
    counts = EventCounts(path)
    assert [record.levelname for record in caplog.records] == ["WARNING"]
    assert read_counts(path) == {}
    counts.record(event("checkpoint"))
    assert read_counts(path) == {"checkpoint": 1}


def test_a_disk_that_refuses_is_reported_once_and_caught_up_with(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    folder = tmp_path / "run"
    counts = EventCounts(folder / "counts.json")
    with caplog.at_level(logging.WARNING):
        counts.record(event("checkpoint"))
        counts.record(event("checkpoint"))
    assert len(caplog.records) == 1
    folder.mkdir()
    counts.end(OUTCOME)
    assert read_counts(folder / "counts.json") == {"checkpoint": 2}
