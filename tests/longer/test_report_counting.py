"""Which runs a report's numbers count: missing seeds, repeated runs, censored and unresolved widths."""

from __future__ import annotations

import json
import re
import shutil
from collections.abc import Callable, Mapping
from pathlib import Path
from statistics import fmean, stdev
from typing import Any

import pytest

from dist_train.report.page import render
from dist_train.report.sharpness_charts import sharpness_scatters
from dist_train.report.stored_run import read_subject
from dist_train.report.variants import panels_of
from dist_train.rundir.records import EvaluationRecord, Record
from tests.longer.report_page import cells, evaluations, rendered
from tests.unit.records import write_records
from tests.unit.report_study import make_run, make_study, treatments, write_status

ACCURACY = "Accuracy and loss"
SHARPNESS = "Basin width and sharpness"
SHARPNESS_EFFECTS = "Differences from the baseline: basin width and sharpness"
WITH_ACCURACY = "Rank correlation with final test accuracy"
WITH_LOSS = "Rank correlation with final train loss"
TEST = "final test accuracy, %"
TRACE = "Hessian trace"
WIDTH = "basin width, loss under 2 x"
NOISY = "lb-noise-amplitude-0.01"
ROW = "LB, noise, amplitude 0.01"


def sharpness_file(run: Path) -> Path:
    [path] = run.glob("analysis/sharpness-*.json")
    return path


def trace(run: Path) -> float:
    return float(json.loads(sharpness_file(run).read_text())["hessian"]["trace"])


def width_record(run: Path) -> Path:
    [path] = run.glob("analysis/direction-*/settings.json")
    return path


def width(run: Path) -> float:
    return float(json.loads(width_record(run).read_text())["widths"]["A"]["2"]["mean"])


def change_width(run: Path, **changes: Any) -> None:
    """Change the record of the width at twice the minimum."""
    fields = json.loads(width_record(run).read_text())
    fields["widths"]["A"]["2"].update(changes)
    width_record(run).write_text(json.dumps(fields))


def leading(cell: str) -> float:
    """Return the first number of a cell."""
    return float(cell.lstrip("*\u2265\u2264 +").replace("\u2212", "-").replace(",", "").split()[0].rstrip("*"))


def test_cell_counts_the_seeds_with_its_measure(tmp_path: Path) -> None:
    study = make_study(tmp_path / "study", seeds=(0, 1))
    sharpness_file(study / f"{NOISY}-seed-1").unlink()
    table = cells(study)
    assert table[ACCURACY, ROW, TEST].endswith("(n = 2)")
    assert table[SHARPNESS, ROW, TRACE].endswith(" (n = 1)")
    assert "\u00b1" not in table[SHARPNESS, ROW, TRACE]
    assert leading(table[SHARPNESS, ROW, TRACE]) == pytest.approx(trace(study / f"{NOISY}-seed-0"), rel=5e-3)
    assert table[SHARPNESS, "LB, baseline", TRACE].endswith("(n = 2)")
    # one pair has no interval
    assert table[SHARPNESS_EFFECTS, ROW, TRACE] == "\u2013"
    assert table[SHARPNESS_EFFECTS, ROW, WIDTH].endswith("; n = 2)")
    assert table[WITH_ACCURACY, TRACE, "LB"].endswith("n = 7)")
    assert table[WITH_ACCURACY, TRACE, "all runs"].endswith("n = 15)")
    assert table[WITH_LOSS, TRACE, "all runs"].endswith("n = 15)")
    [shown] = re.findall(
        rf"data-measure=\"sharpness-{TRACE}\" data-variant=\"{NOISY}\">[^<]*</data>(.{{0,40}})",
        render(read_subject(study)),
    )
    assert shown.startswith('<span class="ends">n = 1<')


def test_difference_counts_seeds_with_both_measures(tmp_path: Path) -> None:
    study = make_study(tmp_path / "study")
    sharpness_file(study / f"{NOISY}-seed-1").unlink()
    shutil.rmtree(study / "lb-seed-2")
    sharpness_file(study / "lb-noise-amplitude-0.03-seed-0").unlink()
    table = cells(study)
    assert table[SHARPNESS_EFFECTS, ROW, TRACE] == "\u2013"
    assert table[SHARPNESS_EFFECTS, "LB, noise, amplitude 0.001", TRACE].endswith("; n = 2, 1 unfinished)")
    mean = fmean(
        trace(study / f"lb-noise-amplitude-0.001-seed-{seed}") - trace(study / f"lb-seed-{seed}") for seed in (0, 1)
    )
    assert leading(table[SHARPNESS_EFFECTS, "LB, noise, amplitude 0.001", TRACE]) == pytest.approx(mean, rel=5e-3)
    assert table[SHARPNESS_EFFECTS, "LB, noise, amplitude 0.03", TRACE] == "\u2013"
    assert table[SHARPNESS_EFFECTS, "SB, noise, amplitude 0.01", TRACE].endswith("; n = 3)")
    assert table[SHARPNESS_EFFECTS, "LB, baseline, from that of SB", TRACE].endswith("; n = 2, 1 unfinished)")
    assert table[ACCURACY, "LB, baseline", "seeds"] == "2 of 3"


def test_sharpness_with_other_settings_is_omitted_and_counted(tmp_path: Path) -> None:
    study = make_study(tmp_path / "study", seeds=(0, 1))
    assert "Sharpness results left out" not in rendered(study).text
    path = sharpness_file(study / f"{NOISY}-seed-1")
    fields = json.loads(path.read_text())
    fields["settings"]["samples"] = 512
    path.write_text(json.dumps(fields))
    assert cells(study)[SHARPNESS, ROW, TRACE].endswith("(n = 1)")
    assert "Sharpness results left out because of other settings or an earlier step: 1." in rendered(study).text


def twins(folder: Path, *names: str) -> None:
    """Write runs with the settings and the seed of `lb-0`, and `lb-1` with another seed."""
    treatment = treatments()[4]
    for name, seed in (("lb-0", 0), *((name, 0) for name in names), ("lb-1", 1)):
        make_run(folder / name, treatment, seed, {**treatment.settings, "run.name": name, "run.seed": seed})


def test_repeated_configuration_and_seed_counts_once(tmp_path: Path) -> None:
    twins(tmp_path, "lb-0-again")
    page, table = rendered(tmp_path), cells(tmp_path)
    values = [evaluations(tmp_path / name, "test")[-1]["accuracy"] for name in ("lb-0", "lb-1")]
    assert page.of("final_test", variant="lb-0")[0] == pytest.approx(fmean(values), abs=1e-15)
    [row] = {row for title, row, _ in table if title == ACCURACY}
    assert table[ACCURACY, row, TEST] == f"{fmean(values) * 100:.2f} \u00b1 {stdev(values) * 100:.2f} (n = 2)"
    assert table[SHARPNESS, row, TRACE].endswith("(n = 2)")
    assert "lb-0-again : lb-0 counts" in page.text
    assert "4 lines, 2 runs" in page.text
    assert all("(n = 2)" in point[2] for _, points in page.series for point in points if "\u00b1" in point[2])
    # Every run still has its row.
    assert page.of("final_test", run="lb-0-again")[0] == values[0]


def test_repeated_single_seed_has_no_spread(tmp_path: Path) -> None:
    twins(tmp_path, "lb-0-again")
    shutil.rmtree(tmp_path / "lb-1")
    table = cells(tmp_path)
    for (title, _, column), cell in table.items():
        if not title.startswith("Rank") and column != "seeds":
            assert "\u00b1" not in cell
            assert "n = 1" in cell
    panels = panels_of(read_subject(tmp_path).runs)
    assert not sharpness_scatters(panels)


def stop(run: Path) -> None:
    write_status(run, "stopped", 80)


def cut(run: Path) -> None:
    stop(run)
    lines = (run / "metrics.jsonl").read_text().splitlines()
    (run / "metrics.jsonl").write_text("\n".join(lines[: len(lines) // 2]) + "\n")


def lose_sharpness(run: Path) -> None:
    sharpness_file(run).unlink()


@pytest.mark.parametrize(
    ("damages", "kept"),
    [
        ({}, "lb-0"),
        ({"lb-0": stop}, "lb-0-again"),
        ({"lb-0": cut, "lb-0-again": stop}, "lb-0-again"),
        ({"lb-0": lose_sharpness}, "lb-0-again"),
        ({"lb-0": lose_sharpness, "lb-0-again": stop}, "lb-0"),
    ],
)
def test_finished_or_most_complete_duplicate_counts(
    tmp_path: Path, damages: Mapping[str, Callable[[Path], None]], kept: str
) -> None:
    twins(tmp_path, "lb-0-again")
    for name, damage in damages.items():
        damage(tmp_path / name)
    [panel] = panels_of(read_subject(tmp_path).runs)
    [variant] = panel.variants
    ignored = ({"lb-0", "lb-0-again"} - {kept}).pop()
    assert variant.repeated == {ignored: kept}
    assert len(variant.distinct) == 2
    assert ignored not in {run.name for run in variant.counted}


def test_censored_width_makes_mean_and_difference_lower_bounds(tmp_path: Path) -> None:
    study = make_study(tmp_path / "study")
    change_width(study / f"{NOISY}-seed-1", open=1)
    table, page = cells(study), rendered(study)
    mean = fmean(width(study / f"{NOISY}-seed-{seed}") for seed in (0, 1, 2))
    base = fmean(width(study / f"lb-seed-{seed}") for seed in (0, 1, 2))
    assert table[SHARPNESS, ROW, WIDTH] == f"\u2265 {mean:.3f} (n = 3, 1 censored)"
    assert table[SHARPNESS_EFFECTS, ROW, WIDTH] == f"\u2265 +{mean - base:.4f} (n = 3, 1 censored)"
    assert table[WITH_ACCURACY, WIDTH, "LB"].endswith("n = 12, 1 censored)")
    assert table[WITH_ACCURACY, WIDTH, "SB"].endswith("n = 12)")
    assert f"\u2265 {mean:.3f} (loss under 2 x; n = 3, 1 censored)" in page.text
    assert f"\u2265 {page.of('width-A.2', run=f'{NOISY}-seed-1')[1]}" in page.text
    assert [text for _, points in page.series for *_, text, _ in points if "seed 1: \u2265" in text]
    # Other widths are unchanged.
    assert "\u00b1" in table[SHARPNESS, ROW, "basin width, loss under 10 x"]
    assert "to" in table[SHARPNESS_EFFECTS, "LB, noise, amplitude 0.001", WIDTH]


def test_censored_baseline_makes_a_difference_an_upper_bound(tmp_path: Path) -> None:
    study = make_study(tmp_path / "study")
    change_width(study / "lb-seed-1", open=2)
    change_width(study / "lb-noise-amplitude-0.03-seed-2", open=1)
    table = cells(study)
    assert table[SHARPNESS_EFFECTS, ROW, WIDTH].startswith("\u2264 +")
    assert table[SHARPNESS_EFFECTS, ROW, WIDTH].endswith("(n = 3, 1 censored)")
    assert table[SHARPNESS_EFFECTS, "LB, noise, amplitude 0.03", WIDTH] == "unknown (n = 3, 2 censored)"
    assert table[SHARPNESS_EFFECTS, "LB, baseline, from that of SB", WIDTH].startswith("\u2265")
    assert "unknown" in rendered(study).text


def test_width_below_the_spacing_of_the_points_is_unresolved(tmp_path: Path) -> None:
    study = make_study(tmp_path / "study")
    # the line's points are 0.05 apart
    narrow = {"direction": 0, "left": -0.03, "right": 0.04}
    change_width(study / f"{NOISY}-seed-1", directions=[narrow, {"direction": 1, "left": -0.2, "right": 0.2}])
    change_width(study / f"{NOISY}-seed-2", directions=[{"direction": 0, "left": -0.03, "right": 0.05}])
    table, page = cells(study), rendered(study)
    assert table[SHARPNESS, ROW, WIDTH].endswith("(n = 3, 1 unresolved)")
    assert table[SHARPNESS_EFFECTS, ROW, WIDTH].endswith("; n = 3, 1 unresolved)")
    assert table[WITH_LOSS, WIDTH, "all runs"].endswith("n = 24, 1 unresolved)")
    assert table[WITH_LOSS, WIDTH, "variants' means"].endswith("n = 8, 1 unresolved)")
    assert f"{page.of('width-A.2', run=f'{NOISY}-seed-1')[1]} unresolved" in page.text
    change_width(study / f"{NOISY}-seed-1", directions=["torn", {"direction": 0, "left": None}])
    assert cells(study)[SHARPNESS, ROW, WIDTH].endswith("(n = 2)")
    assert "holds a damaged landscape" in rendered(study).text


def test_loss_rise_follows_from_the_points_of_the_line(tmp_path: Path) -> None:
    study = make_study(tmp_path / "study", seeds=(0,))
    run = study / "lb-seed-0"
    lines = (width_record(run).parent / "points.csv").read_text().splitlines()[1:]
    points = [
        (float(alpha), float(loss))
        for _, alpha, _, split, loss, _ in (line.split(",") for line in lines)
        if split == "train"
    ]
    rise = fmean(loss for alpha, loss in points if abs(alpha) == 0.5) - fmean(
        loss for alpha, loss in points if alpha == 0
    )
    assert rendered(study).of("line-rise-0.5", run="lb-seed-0")[0] == pytest.approx(rise)


def test_run_with_a_last_loss_of_nan_has_no_final_accuracy(tmp_path: Path) -> None:
    study = make_study(tmp_path / "study", seeds=(0, 1))
    run = study / f"{NOISY}-seed-1"
    last: list[Record] = [
        EvaluationRecord(80, 40.0, split, float("nan"), 0.1, 10_000, 0.0) for split in ("train", "test")
    ]
    before = (run / "metrics.jsonl").read_text()
    write_records(run, last)
    (run / "metrics.jsonl").write_text(before + (run / "metrics.jsonl").read_text())
    table = cells(study)
    assert table[ACCURACY, ROW, TEST].endswith("(n = 1)")
    assert table[ACCURACY, ROW, "generalization gap, points"].endswith("(n = 1)")
    assert table[ACCURACY, ROW, "best test accuracy, %"].endswith("(n = 2)")


def test_rows_of_unfinished_runs_are_marked(tmp_path: Path) -> None:
    study = make_study(tmp_path / "study", seeds=(0, 1))
    for seed in (0, 1):
        write_status(study / f"{NOISY}-seed-{seed}", "stopped", 40)
    table = cells(study)
    assert (ACCURACY, f"{ROW} (not finished)", TEST) in table
    assert (SHARPNESS_EFFECTS, f"{ROW} (not finished)", TRACE) in table
