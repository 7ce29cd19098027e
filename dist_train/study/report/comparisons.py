"""Arms against each other: test accuracy of every seed, and sharpness against test accuracy."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Literal

from dist_train.study.report.arms import Arm, Panel
from dist_train.study.report.chart import Chart, Point, Series
from dist_train.study.report.measures import Measure, final_accuracy, sharpness_measures
from dist_train.study.report.numbers import spearman
from dist_train.study.report.scales import Axis, linear_axis, percent_tick, plain


@dataclass(frozen=True)
class Correlation:
    """Spearman's rank correlation with test accuracy, among `count` runs; None where they are too few."""

    among: str
    rho: float | None
    count: int


@dataclass(frozen=True)
class Scatter:
    """One measure of sharpness against test accuracy."""

    chart: Chart
    correlations: tuple[Correlation, ...]


def sharpness_scatters(panels: Sequence[Panel]) -> tuple[Scatter, ...]:
    """Return a scatter for every measure of sharpness that at least two finished runs have."""
    runs = [run for panel in panels for arm in panel.arms for run in arm.counted if run.is_finished]
    scatters: list[Scatter] = []
    for measure in sharpness_measures(runs):
        pairs = {panel.title: _pairs(panel.arms, measure) for panel in panels}
        everything = [pair for found in pairs.values() for pair in found]
        if len(everything) < 2:
            continue
        correlations = [_correlation("all runs", everything)]
        if sum(bool(found) for found in pairs.values()) > 1:
            correlations += [_correlation(panel.short, pairs[panel.title]) for panel in panels if pairs[panel.title]]
        scatters.append(Scatter(_chart(len(scatters), measure, panels), tuple(correlations)))
    return tuple(scatters)


def _pairs(arms: Sequence[Arm], measure: Measure) -> list[tuple[float, float]]:
    return [
        (value, accuracy)
        for arm in arms
        for run in arm.counted
        if run.is_finished
        and (value := measure.take(run)) is not None
        and (accuracy := final_accuracy(run)) is not None
    ]


def _correlation(among: str, pairs: Sequence[tuple[float, float]]) -> Correlation:
    return Correlation(among, spearman([x for x, _ in pairs], [y for _, y in pairs]), len(pairs))


def _chart(index: int, measure: Measure, panels: Sequence[Panel]) -> Chart:
    series = []
    for number, panel in enumerate(panels):
        for arm in panel.arms:
            points = tuple(_points(arm, panel, measure))
            if points:
                form: Literal["dots", "squares"] = "dots" if number % 2 == 0 else "squares"
                series.append(Series(f"{panel.short}, {arm.label}", f"s{arm.colour}", points, form))
    x = [point.x for item in series for point in item.points]
    y = [point.y for item in series for point in item.points]
    axis = linear_axis(measure.title, x, plain, margin=0.08)
    if min(x) > 0 and max(x) / min(x) > 30:
        axis = Axis(measure.title, min(x) / 1.4, max(x) * 1.4, plain, is_logarithmic=True)
    description = f"{measure.title} against final test accuracy, {len(x)} runs."
    accuracy = linear_axis("final test accuracy, %", y, percent_tick, margin=0.1)
    return Chart(f"scatter-{index}", measure.title, description, axis, accuracy, tuple(series))


def _points(arm: Arm, panel: Panel, measure: Measure) -> list[Point]:
    points = []
    for run in arm.counted:
        value, accuracy = measure.take(run), final_accuracy(run)
        if run.is_finished and value is not None and accuracy is not None:
            seed = "" if run.seed is None else f", seed {run.seed}"
            text = f"{panel.short}, {arm.label}{seed}: {measure.text(value)}, test {accuracy * 100:.2f} %"
            points.append(Point(value, accuracy, text))
    return points
