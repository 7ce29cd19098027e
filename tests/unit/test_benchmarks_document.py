"""`docs/performance.md` shows the rows that are kept in `results/`."""

from __future__ import annotations

import runpy
import sys
from dataclasses import replace
from pathlib import Path

import pytest

from benchmarks.document import BEGIN, END, main, tables
from benchmarks.machine import Machine
from benchmarks.record import Measured, keep, read_record
from benchmarks.timing import ratio_of

ROOT = Path(__file__).parents[2]
MACHINE = Machine("Slow Processor", 2, 1 << 30, "cpu", {"torch": "2.0"}, "2026-01-01")
FAST = ratio_of("fast", "we", "they", [(1.0, 2.0)], 0.6, images=10)
STATED = ratio_of("stated", "we", "they", [(3e4, 2e4)], None, unit="MB")


def test_the_page_shows_the_kept_rows() -> None:
    page = (ROOT / "docs" / "performance.md").read_text()
    shown = page.partition(BEGIN)[2].partition(END)[0].strip()
    assert shown == tables(read_record(ROOT / "results" / "performance-cpu.json")).strip()


def test_each_machine_has_a_table_with_its_groups_in_their_usual_order() -> None:
    another = replace(MACHINE, cores=64)
    record = {
        "memory": Measured(MACHINE, [STATED]),
        "kernels": Measured(another, [STATED]),
        "noise": Measured(MACHINE, [FAST]),
    }
    lines = tables(record).splitlines()
    assert [line for line in lines if line.startswith("On")] == [
        "On 2 cores of Slow Processor, torch 2.0, 2026-01-01:",
        "On 64 cores of Slow Processor, torch 2.0, 2026-01-01:",
    ]
    assert [line for line in lines if "| we |" in line] == [
        "| fast | we | they | 0.500 | 0.500-0.500 | 1 | 1 s, 10 images/s | 0.600 holds |",
        "| stated | we | they | 1.500 | 1.500-1.500 | 1 | 30,000 MB | stated |",
        "| stated | we | they | 1.500 | 1.500-1.500 | 1 | 30,000 MB | stated |",
    ]


def test_the_command_without_files_says_what_it_takes(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(sys, "argv", ["document.py"])
    with pytest.raises(SystemExit) as ended:
        runpy.run_path(str(ROOT / "benchmarks" / "document.py"), run_name="__main__")
    assert ended.value.code == 2
    assert "RECORD PAGE" in capsys.readouterr().err


def test_renewing_changes_what_is_between_the_markers(tmp_path: Path) -> None:
    record, page = tmp_path / "rows.json", tmp_path / "page.md"
    page.write_text(f"before\n{BEGIN}\nold\n{END}\nafter\n")
    keep(record, {"data": Measured(MACHINE, [replace(FAST, bar=0.4)])})
    main(record, page)
    text = page.read_text()
    assert text.startswith(f"before\n{BEGIN}\n\nOn 2 cores")
    assert text.endswith(f"| 0.400 missed |\n\n{END}\nafter\n")
    assert "old" not in text
