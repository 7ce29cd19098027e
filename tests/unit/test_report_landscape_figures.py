"""Figures of landscapes."""

from __future__ import annotations

import math
import xml.etree.ElementTree as ElementTree
from collections.abc import Callable, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

from dist_train.analysis.landscape_files import SPLITS, Landscape, Point, PointRow
from dist_train.analysis.landscape_points import axis, line_points, plane_points
from dist_train.report.figures import landscape_axes, landscape_chart
from dist_train.report.landscape_figures import draw_landscape

ALPHAS = axis(-1.0, 1.0, 5)


def bowl(point: Point, split: str) -> float:
    return 0.1 + point.alpha**2 + 2 * point.beta**2 + 0.1 * point.direction + (split == "test")


def landscape(
    kind: str, points: Sequence[Point], loss: Callable[[Point, str], float] = bowl, **settings: Any
) -> Landscape:
    rows = [
        PointRow(point.direction, point.alpha, point.beta, split, loss(point, split), 1 / (1 + loss(point, split)))
        for point in points
        for split in SPLITS
    ]
    checkpoints = [{"path": f"runs/{name}/checkpoints/step-00000007.pt", "step": 7} for name in ("sb", "lb")]
    fields = {"statistics": "recomputed", "directions": 3, "normalization": "filter", **settings}
    return Landscape(kind, checkpoints, fields, rows)


def words(output: Path) -> set[str]:
    content = output.read_text()
    ElementTree.fromstring(content)
    return {line.strip()[4:-3].strip() for line in content.splitlines() if line.strip().startswith("<!--")}


def test_a_line_between_two_runs_names_what_it_shows(tmp_path: Path) -> None:
    outputs = [tmp_path / "figure.svg", tmp_path / "figure.png"]
    draw_landscape(landscape("interpolate", line_points(ALPHAS, 1)), outputs)
    assert words(outputs[0]) >= {
        "from sb step 7 (0) to lb step 7 (1); statistics recomputed",
        "\u03b1",
        "loss",
        "accuracy, %",
        "train loss",
        "test loss",
        "train accuracy",
        "test accuracy",
        "100",
    }
    assert outputs[1].read_bytes().startswith(b"\x89PNG")


def test_the_same_result_gives_the_same_file(tmp_path: Path) -> None:
    for name in ("a.svg", "b.svg"):
        draw_landscape(landscape("direction", line_points(ALPHAS, 3)), [tmp_path / name], "log")
    assert (tmp_path / "a.svg").read_bytes() == (tmp_path / "b.svg").read_bytes()
    assert words(tmp_path / "a.svg") >= {
        "sb step 7, 3 random directions, mean and standard deviation, normalized by",
        "filter; statistics recomputed",
    }


@pytest.mark.parametrize("scale", ["linear", "log"])
def test_loss_is_on_the_left_and_accuracy_on_the_right_train_solid_and_test_dashed(scale: str) -> None:
    shown = landscape("direction", line_points(ALPHAS, 1))
    chart = landscape_chart("line", "", "", [shown], axes=landscape_axes([shown], scale))
    assert chart.left.is_logarithmic == (scale == "log")
    assert [(each.label, each.style, each.axis, each.form) for each in chart.series] == [
        ("train loss", "loss train", "left", "line"),
        ("train accuracy", "accuracy train", "right", "line"),
        ("test loss", "loss test", "left", "dashed"),
        ("test accuracy", "accuracy test", "right", "dashed"),
    ]
    assert [point.y for point in chart.series[2].points] == [row.loss for row in shown.rows if row.split == "test"]


@pytest.mark.parametrize(("scale", "is_logarithmic"), [("linear", False), ("log", True), ("auto", True)])
def test_a_very_large_loss_changes_the_axis_of_the_report_alone(scale: str, is_logarithmic: bool) -> None:
    steep = landscape("direction", line_points(ALPHAS, 1), lambda point, _: 10 ** (4 * abs(point.alpha)))
    assert landscape_axes([steep], scale)[1].is_logarithmic == is_logarithmic


def test_several_directions_give_mean_and_band() -> None:
    train = landscape_chart("line", "", "", [landscape("direction", line_points(ALPHAS, 3))]).series[0].points
    assert [point.y for point in train] == pytest.approx([0.2 + alpha**2 for alpha in ALPHAS])
    assert [point.band for point in train] == [pytest.approx((0.1 + alpha**2, 0.3 + alpha**2)) for alpha in ALPHAS]


def test_a_mean_line_ends_where_one_of_its_lines_is_not_finite() -> None:
    def steep(point: Point, split: str) -> float:
        return math.inf if point.direction == 1 and point.alpha > 0.7 else bowl(point, split) * 100**point.direction

    drawn = landscape_chart("line", "", "", [landscape("direction", line_points(ALPHAS, 2), steep)]).series
    [losses] = [series.points for series in drawn if series.label == "train loss"]
    # the other line alone is far lower
    assert [point.x for point in losses] == [-1.0, -0.5, 0.0, 0.5]


@pytest.mark.parametrize("scale", ["linear", "log"])
def test_a_plane_is_drawn_as_contours(tmp_path: Path, scale: str) -> None:
    draw_landscape(landscape("plane", plane_points(ALPHAS, ALPHAS)), [tmp_path / "figure.svg"], scale)
    assert words(tmp_path / "figure.svg") >= {
        "alpha",
        "beta",
        "loss: train filled, test dashed",
        "accuracy: train filled, test dashed",
    }


def test_the_way_of_a_run_is_drawn_over_the_plane(tmp_path: Path) -> None:
    path = [{"step": 3, "alpha": 0.9, "beta": 0.1}, {"step": 6, "alpha": 0.5, "beta": -0.5}]
    trajectory = {"explained": [0.9, 0.07], "path": [*path, {"step": 9, "alpha": 0.0, "beta": 0.0}]}
    shown = landscape("plane", plane_points(ALPHAS, ALPHAS), trajectory=True)
    draw_landscape(replace(shown, trajectory=trajectory), [tmp_path / "figure.svg"], "log")
    assert words(tmp_path / "figure.svg") >= {
        "step 3",
        "alpha (90.0 % of the squared distances)",
        "beta (7.0 % of the squared distances)",
    }


@pytest.mark.parametrize("kind", ["direction", "plane"])
@pytest.mark.parametrize("everywhere", [True, False])
def test_points_without_a_finite_loss_are_left_out(tmp_path: Path, kind: str, everywhere: bool) -> None:
    def wall(point: Point, split: str) -> float:
        return math.nan if everywhere or point.alpha > 0.7 else math.inf if point.alpha < -0.7 else bowl(point, split)

    points = plane_points(ALPHAS, ALPHAS) if kind == "plane" else line_points(ALPHAS, 2)
    draw_landscape(landscape(kind, points, wall), [tmp_path / "figure.svg"], "log")
    assert "loss" in {word.split(":")[0] for word in words(tmp_path / "figure.svg")} or everywhere
