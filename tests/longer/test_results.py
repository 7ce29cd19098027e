"""docs/results.md and the page beside its numbers say what the numbers say."""

from __future__ import annotations

import re
from pathlib import Path

import pytest

from dist_train.study.report.markdown import tables_in_markdown
from dist_train.study.report.page import render
from dist_train.study.report.reading import Subject, read_subject

ROOT = Path(__file__).parents[2]
STUDY = ROOT / "results/fashion"
NOT_TOLD = "Time and speed"
"""Other work ran on the same cores."""


@pytest.fixture(scope="module")
def subject() -> Subject:
    return read_subject(STUDY)


def test_the_tables_of_the_results_are_those_of_the_numbers(subject: Subject) -> None:
    told = set((ROOT / "docs/results.md").read_text().splitlines())
    for section in tables_in_markdown(subject).split("## ")[1:]:
        title, *lines = section.splitlines()
        if title == NOT_TOLD:
            continue
        missing = [line for line in lines if line.startswith("| ") and line not in told and set(line) - set("| -")]
        assert not missing, title


def test_the_page_has_the_numbers_that_lie_beside_it(subject: Subject) -> None:
    def values(page: str) -> list[str]:
        return re.findall(r'<data value="([^"]+)"', page)

    assert values((STUDY / "report.html").read_text()) == values(render(subject))


def test_what_is_kept_of_a_study_is_small() -> None:
    sizes = {path: path.stat().st_size for path in (ROOT / "results").rglob("*") if path.is_file()}
    assert max(sizes.values()) < 1 << 20, max(sizes, key=lambda path: sizes[path])
    assert not any("checkpoints" in path.parts and path.suffix != ".json" for path in sizes)
