"""A learning-rate range test: the rates that are tried, and the one that is suggested. Figures as files."""

from __future__ import annotations

import csv
import itertools
import json
import math
import subprocess
import sys
import weakref
from pathlib import Path

import numpy
import pytest
import torch
from matplotlib.figure import Figure
from torch import Tensor

from dist_train.cli.main import main
from dist_train.config import DataSettings, load_config
from dist_train.data.images import ImageSet
from dist_train.diagnostics import learning_rate_range
from dist_train.report import drawing
from dist_train.report.drawing import draw_learning_curve, range_test
from dist_train.report.figures import NumberedFigure, StripPlot
from dist_train.report.page import figures_of
from dist_train.report.stored_run import read_run, read_subject
from dist_train.watch.figure import (
    ACCURACY,
    Axis,
    Chart,
    Point,
    Series,
    learning_curve,
    measured_of,
    percent_tick,
    plain,
)
from tests.launching import write_config
from tests.unit.records import evaluation, train, write_records
from tests.unit.report_study import make_run, make_study, treatments
from tests.unit.small_trainers import SETTINGS

pytestmark = pytest.mark.usefixtures("threads_as_before")


RATES = [1e-4 * 10 ** (at / 20) for at in range(100)]


@pytest.mark.parametrize("first", [2.5, -2.5])
def test_the_suggestion_is_where_the_loss_falls_steepest(first: float) -> None:
    # a fall around 0.01, a jump from 1 on
    losses = [first - 2 / (1 + (0.01 / rate) ** 3) + (40 if rate > 1 else 0) for rate in RATES]
    test = range_test(RATES, losses)
    assert test.suggestion == pytest.approx(0.01, rel=0.3)
    assert len(test.smoothed) == 100


@pytest.mark.parametrize("losses", [[2.0] * 100, [2.0 + at / 10 for at in range(100)], [1.0, 1.0]])
def test_a_loss_that_does_not_fall_suggests_nothing(losses: list[float]) -> None:
    assert range_test(RATES[: len(losses)], losses).suggestion is None


def test_the_command_tries_the_rates_and_writes_what_it_found(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    config = write_config(tmp_path, {**SETTINGS, "schedule": {"decay": "cosine", "scaling": "sqrt"}})
    place = tmp_path / "range"
    words = ["lr-range", config, "--from", "0.001", "--to", "1", "--updates", "7", "--run-dir", str(place)]
    assert main(words) == 0
    told = capsys.readouterr().out
    assert "7 updates, rates 0.001 to 1" in told
    assert "with schedule.scaling=none" in told, "the rates of the test are not scaled"
    with (place / "lr_range.csv").open() as file:
        rates = [float(row["learning_rate"]) for row in csv.DictReader(file)]
    assert rates == pytest.approx([10 ** (-3 + at / 2) for at in range(7)])
    assert json.loads((place / "lr_range.json").read_text())["rates"] == rates
    assert (place / "lr_range.png").read_bytes().startswith(b"\x89PNG")
    assert read_run(place, "range").is_range_test
    capsys.readouterr()
    assert main([*words, "--updates", "8"]) == 2
    assert "other --from, --to or --updates: choose another folder with --run-dir" in capsys.readouterr().err


def test_the_checkpoint_that_a_configuration_resumes_from_is_left_out(tmp_path: Path) -> None:
    config = write_config(tmp_path, SETTINGS)
    assert main(["train", config, "run.max_steps=1", "--run-dir", str(tmp_path / "run")]) == 0
    words = ["lr-range", config, "--updates", "2", "--run-dir", str(tmp_path / "range")]
    assert main([*words, f"run.resume={tmp_path / 'run'}"]) == 0
    assert len(json.loads((tmp_path / "range" / "lr_range.json").read_text())["losses"]) == 2


def test_a_script_that_imports_the_package_alone_can_call_it(tmp_path: Path) -> None:
    arguments = f"{write_config(tmp_path, SETTINGS)!r}), 0.001, 1, 2, {str(tmp_path / 'range')!r}"
    program = f"import dist_train; dist_train.learning_rate_range(dist_train.load_config({arguments})"
    ended = subprocess.run([sys.executable, "-c", program], check=False, capture_output=True, text=True)
    assert ended.returncode == 0, ended.stderr
    assert (tmp_path / "range" / "lr_range.csv").is_file()


def test_its_numbers_may_be_numpys(tmp_path: Path) -> None:
    config = load_config(write_config(tmp_path, SETTINGS))
    low, high, updates = numpy.float64(0.001), numpy.float32(1.0), numpy.int64(2)
    found = learning_rate_range(config, low, high, updates, tmp_path / "range")  # type: ignore[arg-type]  # NumPy's
    assert found.rates == pytest.approx((0.001, 1.0))


MADE: list[tuple[str, weakref.ref[Tensor], int]] = []
"""The split and the images of each data set that `watched` has made, and how many of its split there were before."""


def watched(settings: DataSettings, split: str, seed: int) -> ImageSet:
    images = torch.randint(256, (64, 1, 8, 8), dtype=torch.uint8, generator=torch.Generator().manual_seed(seed))
    before = sum(made == split and reference() is not None for made, reference, _ in MADE)
    MADE.append((split, weakref.ref(images), before))
    return ImageSet(images, torch.arange(64) % 10, 10)


def test_it_holds_the_data_set_once(tmp_path: Path) -> None:
    data = {"name": f"{__name__}:watched", "shape": [1, 8, 8], "classes": 10}
    config = load_config(write_config(tmp_path, {**SETTINGS, "data": data}))
    MADE.clear()
    learning_rate_range(config, 0.001, 1, 2, tmp_path / "range")
    assert len(MADE) > 2, "to know its size, and to train"
    assert not any(before for _, _, before in MADE)


def test_it_ends_before_where_the_loss_is_not_finite(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    config = write_config(tmp_path, {**SETTINGS, "model": {"width": 0.03125, "norm": "none"}})
    words = ["lr-range", config, "--to", "1e30", "--updates", "6", "--run-dir", str(tmp_path / "range")]
    assert main(words) == 0
    losses = json.loads((tmp_path / "range" / "lr_range.json").read_text())["losses"]
    assert 2 <= len(losses) < 6
    assert all(map(math.isfinite, losses))
    assert json.loads((tmp_path / "range" / "status.json").read_text())["state"] == "finished"


@pytest.mark.parametrize(
    "words",
    [
        ["--from", "1", "--to", "0.1"],
        ["--from", "0"],
        ["--to", "inf"],
        ["--from", "1e-300", "--to", "1e300"],
        ["--updates", "1"],
        ["--from", "1e-150", "--to", "1e150", "--updates", "8"],
        ["--updates", "50", "batch.global_size=2", "batch.micro_size=2", "data.synthetic_samples=8000"],
    ],
)
def test_rates_that_do_not_rise_or_that_rise_too_fast_are_refused(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], words: list[str]
) -> None:
    assert main(["lr-range", write_config(tmp_path, SETTINGS), "--run-dir", str(tmp_path / "range"), *words]) == 2
    assert "[option-range]" in capsys.readouterr().err


@pytest.mark.filterwarnings("error")
def test_long_names_of_variants_stay_within_the_figure(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    study = make_study(tmp_path / "study", seeds=(0,))
    plan = (study / "runs.json").read_text()
    (study / "runs.json").write_text(plan.replace(", noise,", f", noise {'that is described at length, ' * 4}"))
    drawn: list[Figure] = []
    monkeypatch.setattr(drawing, "save", lambda figure, path: drawn.append(figure))
    figures = figures_of(read_subject(study))[:4]
    assert [figure.key for figure in figures] == ["glance", "curves", "landscapes", "between"]
    drawing.save_figures(figures, tmp_path, "png")
    assert len(drawn) == 4
    for figure in drawn:
        figure.draw_without_rendering()
        boxes = [box for axes in figure.axes if (box := axes.get_tightbbox()) is not None]
        boxes += [legend.get_window_extent() for legend in figure.legends]
        for box in boxes:
            assert box.x0 > -1
            assert box.x1 < figure.bbox.x1 + 1
            assert box.y0 > -1


@pytest.mark.parametrize("count", [1, 3])
def test_labels_of_logarithmic_measures_do_not_overlap(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, count: int
) -> None:
    measure = Axis("expected rise", 1.2e-4, 0.04, plain, is_logarithmic=True)
    dots = Series("baseline", "s0", (Point(0.01, 0.9),), "dots")
    chart = Chart("scatter", "expected rise", "", measure, Axis("accuracy, %", 0.5, 1.0, percent_tick), (dots,))
    drawn: list[Figure] = []
    monkeypatch.setattr(drawing, "save", lambda figure, path: drawn.append(figure))
    drawing.save_figures([NumberedFigure("sharpness", "Sharpness", ((chart,) * count,))], tmp_path, "png")
    [figure] = drawn
    figure.draw_without_rendering()
    for axes in figure.axes:
        boxes = [label.get_window_extent() for label in axes.get_xticklabels()]
        assert len(boxes) > 1
        assert all(left.x1 + 2 < right.x0 for left, right in itertools.pairwise(boxes))


def test_dollar_signs_of_a_name_are_drawn_as_they_are(tmp_path: Path) -> None:
    run = make_run(tmp_path / r"$\wrong$", treatments()[0], 0, treatments()[0].settings)
    draw_learning_curve([run], tmp_path / "curve.svg")
    assert r"$\wrong$" in (tmp_path / "curve.svg").read_text()


@pytest.mark.parametrize(("count", "is_whole"), [(1, True), (8, True), (40, False)])
def test_each_evaluation_of_a_short_run_lies_within_the_frame(count: int, is_whole: bool) -> None:
    """Of a long one the beginning may lie outside, so that its end is readable."""
    batches = [train(step, accuracy=1 - 0.9 / step) for step in range(1, 7 * count + 1)]
    tests = [evaluation(7 * epoch, accuracy=0.9 - 0.2 / epoch) for epoch in range(1, count + 1)]
    chart = learning_curve(ACCURACY, measured_of("run", [*batches, *tests]), 1_000)
    assert chart is not None
    assert (chart.left.low < tests[0].accuracy < chart.left.high) == is_whole
    assert chart.left.low < tests[-1].accuracy < chart.left.high
    assert (chart.left.low < batches[0].accuracy) == (count == 1), "more updates than can all be shown"


def test_the_best_accuracy_of_a_curve_is_not_that_of_an_evaluation_that_is_not_finite(tmp_path: Path) -> None:
    records = [evaluation(7, accuracy=0.8), evaluation(14, accuracy=0.9, loss=math.inf), evaluation(21, accuracy=0.7)]
    (tmp_path / "run").mkdir()
    write_records(tmp_path / "run", records)
    draw_learning_curve([tmp_path / "run"], tmp_path / "curve.svg")
    assert "best test accuracy 80.00 %, epoch 1 -->" in (tmp_path / "curve.svg").read_text()


@pytest.mark.parametrize("names", [("a/demo", "b/demo"), ("_a", "b")])
def test_runs_of_one_name_are_told_apart_by_their_paths(tmp_path: Path, names: tuple[str, str]) -> None:
    runs = [make_run(tmp_path / name, treatments()[0], 0, treatments()[0].settings) for name in names]
    draw_learning_curve(runs, tmp_path / "curve.svg")
    labels = (tmp_path / "curve.svg").read_text()
    assert [f"{name} -->" in labels for name in names] == [True, True]


def test_a_long_label_leaves_room_for_the_mean(tmp_path: Path) -> None:
    study = make_study(tmp_path / "study", seeds=(0, 1))
    plan = (study / "runs.json").read_text()
    (study / "runs.json").write_text(plan.replace(", noise,", f", noise {'that is described at length, ' * 4}"))
    strips = [strip for strip in figures_of(read_subject(study))[0].rows[0] if isinstance(strip, StripPlot)]
    assert strips
    for strip in strips:
        labels = [strip.label(variant) for variant in strip.variants]
        assert labels[0] == "baseline"
        assert [label.endswith(("0.03", "0.01", "0.001")) and "…" in label for label in labels[1:]] == [True] * 3
        assert all(len(strip.label(each)) + len(strip.words(each)) <= 54 for each in strip.variants)


def test_the_axis_of_a_strip_holds_the_line_of_one_deviation(tmp_path: Path) -> None:
    for seed in (0, 1):
        make_run(tmp_path / str(seed), treatments()[0], seed, {**treatments()[0].settings, "run.seed": seed})
    [strip] = figures_of(read_subject(tmp_path))[0].rows[0]
    assert isinstance(strip, StripPlot)
    found = strip.variants[0].summary(strip.measure)
    assert found is not None
    assert found.deviation
    low, high = (strip.x(found.mean + sign * found.deviation) for sign in (-1, 1))
    assert strip.rim < low < high < strip.width - strip.rim


def test_a_strip_says_which_means_are_of_unfinished_runs(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    base, noise, *_ = treatments()
    make_run(tmp_path / "base", base, 0, base.settings)
    make_run(tmp_path / "noise", noise, 0, noise.settings)
    status = tmp_path / "noise" / "status.json"
    status.write_text(status.read_text().replace('"finished"', '"stopped"'))
    drawn: list[Figure] = []
    monkeypatch.setattr(drawing, "save", lambda figure, path: drawn.append(figure))
    [glance, *_] = figures_of(read_subject(tmp_path))
    [strip] = glance.rows[0]
    assert isinstance(strip, StripPlot)
    drawing.save_figures([glance], tmp_path, "png")
    labels = [label.get_text() for label in drawn[0].axes[0].get_yticklabels()]
    for texts in (labels, [strip.words(variant) for variant in strip.variants]):
        assert ["not finished" in text.replace("\n", " ") for text in texts] == [False, True]


def test_a_band_below_0_does_not_fall_at_once_on_a_logarithmic_axis() -> None:
    points = (Point(0.0, 2.0, band=(1.0, 3.0)), Point(1.0, 1.0, band=(-1.0, 3.0)), Point(2.0, 0.0))
    height = Axis("loss", 0.1, 10.0, plain, is_logarithmic=True)
    chart = Chart("key", "", "", Axis("epoch", 0.0, 2.0, plain), height, (Series("a", "s1", points),))
    [axes] = drawing.stacked([chart], (3.0,), "").axes
    [band], [line] = axes.collections, axes.lines
    assert numpy.asarray(band.get_paths()[0].vertices)[:, 1].min() == pytest.approx(1e-4)
    assert numpy.asarray(line.get_ydata())[-1] == pytest.approx(1e-4)
