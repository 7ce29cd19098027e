"""Differences from the baseline, on the page and in the Markdown tables."""

from __future__ import annotations

import re
from pathlib import Path
from statistics import fmean

import pytest

from dist_train.report.page import write_report
from tests.longer.report_page import Page, evaluations


def effects(page: Page, measure: str, variant: str) -> list[tuple[float, str]]:
    """Return values and texts of the differences from the baseline in a measure."""
    return [
        (float(has["value"]), text)
        for has, text in page.numbers
        if has.get("data-effect") == measure and has.get("data-variant") == variant
    ]


def test_differences_from_the_baseline_are_paired_by_seed(study: Path, page: Page) -> None:
    pairs = [
        [
            evaluations(study / f"{variant}-seed-{seed}", "test")[-1]["accuracy"]
            for variant in ("lb", "lb-noise-amplitude-0.01")
        ]
        for seed in (0, 1, 2)
    ]
    [(value, text)] = effects(page, "final_test", "lb-noise-amplitude-0.01")
    assert value == pytest.approx(fmean(after - before for before, after in pairs), abs=1e-15)
    assert text == f"{value * 100:+.2f}".replace("-", "\u2212")
    [(wider, _)] = effects(page, "width-A.2", "lb-noise-amplitude-0.01")
    widths = [page.of("width-A.2", variant=variant)[0] for variant in ("lb", "lb-noise-amplitude-0.01")]
    assert wider == pytest.approx(widths[1] - widths[0])
    assert not effects(page, "final_test", "sb")


def test_baseline_has_differences_from_that_of_the_smallest_batch(study: Path, page: Page) -> None:
    pairs = [
        [evaluations(study / f"{variant}-seed-{seed}", "test")[-1]["accuracy"] for variant in ("sb", "lb")]
        for seed in (0, 1, 2)
    ]
    [(value, _)] = effects(page, "final_test", "lb")
    assert value == pytest.approx(fmean(after - before for before, after in pairs), abs=1e-15)
    assert "baseline, from that of SB" in page.text


def test_markdown_tables_have_the_numbers_of_the_page(study: Path, page: Page, tmp_path: Path) -> None:
    write_report(study, tmp_path / "tables.md")
    text = (tmp_path / "tables.md").read_text()
    accuracy = page.of("final_test", variant="lb")[1]
    assert f"| LB, baseline | 3 | {accuracy} ±" in text
    [(_, difference)] = effects(page, "final_test", "lb-noise-amplitude-0.01")
    assert re.search(rf"\| LB, noise, amplitude 0.01 \| \**{re.escape(difference)}\** \(", text)
    assert re.search(r"\| Hessian trace \| \u2212?[01]\.\d\d \(\S+ to \S+; n = 24\) \|", text)
    for table in text.split("## ")[1:]:
        assert len({line.count("|") for line in table.splitlines() if line.startswith("|")}) == 1
