"""The events of a run: one table, for the code that records them, the page that lists them, and those who show them."""

from __future__ import annotations

import ast
import re
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path

import pytest

from dist_train.monitoring.prometheus.board import Board
from dist_train.monitoring.prometheus.process import _history
from dist_train.rundir.metrics_file import from_json, to_json
from dist_train.rundir.records import EVENTS, EventRecord
from dist_train.watch.view import _BAD_EVENTS
from tests.unit.exporting import FACTS

ROOT = Path(__file__).parents[2]
PACKAGE = ROOT / "dist_train"


def texts(node: ast.AST) -> Iterator[str]:
    return (each.value for each in ast.walk(node) if isinstance(each, ast.Constant) and isinstance(each.value, str))


def recorded(path: Path) -> Iterator[str]:
    """Yield the names with which the code in `path` records events, or yields them to be recorded."""
    for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
        match node:
            case ast.Call(func=ast.Attribute(attr="event"), args=[name, *_]):
                yield from texts(name)
            case ast.FunctionDef(name="events"):
                pairs = (each.value for each in ast.walk(node) if isinstance(each, ast.Yield))
                yield from (name for pair in pairs if isinstance(pair, ast.Tuple) for name in texts(pair.elts[0]))


def test_the_table_has_all_events_that_the_code_records_and_no_others() -> None:
    assert {name for path in PACKAGE.rglob("*.py") for name in recorded(path)} == EVENTS.keys()


def test_the_page_has_every_event() -> None:
    page = (ROOT / "docs" / "watching.md").read_text(encoding="utf-8")
    table = page.partition("| event | recorded when |\n")[2].partition("\n\n")[0]
    assert re.findall(r"`(\w+)`", "".join(row.split("|")[1] for row in table.splitlines())) == list(EVENTS)


@pytest.mark.parametrize("name", EVENTS)
def test_an_exporter_that_is_restarted_reads_the_events_of_its_launch(name: str, tmp_path: Path) -> None:
    record = EventRecord(1, name, 2.0, {"now": 128})
    assert Board(FACTS).snapshot().events[name] == 0
    (tmp_path / "metrics.jsonl").write_text(to_json(record) + "\n", encoding="utf-8")
    assert list(_history(replace(FACTS, run_directory=tmp_path, launched=1.0))) == [record]
    assert list(_history(replace(FACTS, run_directory=tmp_path, launched=3.0))) == [record] * (name == "checkpoint")


def test_lost_ranks_are_shown_in_red() -> None:
    assert "rank_lost" in _BAD_EVENTS


def test_an_event_of_another_version_is_read_and_counted() -> None:
    record = EventRecord(1, "of_another_version", 2.0, {})
    assert from_json(to_json(record)) == record
    board = Board(FACTS)
    board.apply(record)
    assert board.snapshot().events["of_another_version"] == 1
