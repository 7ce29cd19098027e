"""Variants against each other: test accuracy of every seed, and sharpness against test accuracy."""

from __future__ import annotations

from collections.abc import Collection, Iterator, Sequence
from dataclasses import dataclass
from typing import Literal

from dist_train.study.report.chart import Chart, Point, Series
from dist_train.study.report.measures import FINAL_ACCURACY, TRAIN_LOSS, Measure, sharpness_measures
from dist_train.study.report.numbers import spearman
from dist_train.study.report.scales import Axis, linear_axis, percent_tick, plain
from dist_train.study.report.stored_run import StoredRun
from dist_train.study.report.tables import limits
from dist_train.study.report.variants import Panel, Variant, duplicates_of


@dataclass(frozen=True)
class Correlation:
    """Spearman's rank correlation with `other`, among the runs that `note` counts; None where they are too few.

    A censored value has the rank of its bound.
    """

    other: str
    among: str
    rho: float | None
    note: str


@dataclass(frozen=True)
class Scatter:
    """One measure of sharpness against test accuracy, and its correlations with that and with the training loss."""

    chart: Chart
    correlations: tuple[Correlation, ...]


@dataclass(frozen=True)
class _Related:
    variant: Variant
    run: StoredRun
    value: float
    other: float


def sharpness_scatters(panels: Sequence[Panel]) -> tuple[Scatter, ...]:
    """Return a scatter for every measure of sharpness that at least two finished runs have; duplicates left out."""
    runs = [run for panel in panels for variant in panel.variants for run in variant.counted if run.is_finished]
    # two studies in one folder may hold the same run
    repeated = duplicates_of(runs)
    distinct = {run.name for run in runs if run.name not in repeated}
    scatters: list[Scatter] = []
    for measure in sharpness_measures(runs):
        with_accuracy = [_related(panel, distinct, measure, FINAL_ACCURACY) for panel in panels]
        if sum(map(len, with_accuracy)) < 2:
            continue
        with_loss = [_related(panel, distinct, measure, TRAIN_LOSS) for panel in panels]
        correlations = (
            *_correlations(measure, FINAL_ACCURACY, panels, with_accuracy),
            *_correlations(measure, TRAIN_LOSS, panels, with_loss),
        )
        scatters.append(Scatter(_chart(len(scatters), measure, panels, with_accuracy), correlations))
    return tuple(scatters)


def _related(panel: Panel, distinct: Collection[str], measure: Measure, other: Measure) -> list[_Related]:
    """Return the runs of `panel` that have both, with both values."""
    return [
        _Related(variant, run, value, second)
        for variant in panel.variants
        for run, value in variant.measured(measure)
        if run.name in distinct and (second := other.take(run)) is not None
    ]


def _correlations(
    measure: Measure, other: Measure, panels: Sequence[Panel], related: Sequence[Sequence[_Related]]
) -> Iterator[Correlation]:
    """Yield the correlation over all runs, and over each batch size where there are several."""
    groups = [(panel.short, found) for panel, found in zip(panels, related, strict=True) if found]
    everything = ("all runs", [item for _, found in groups for item in found])
    for among, found in [everything, *(groups if len(groups) > 1 else [])]:
        rho = spearman([item.value for item in found], [item.other for item in found])
        censored = sum(measure.is_bound(item.run) for item in found)
        unresolved = sum(measure.is_unresolved(item.run) for item in found)
        yield Correlation(other.title, among, rho, limits(len(found), censored, unresolved))


def _chart(index: int, measure: Measure, panels: Sequence[Panel], related: Sequence[Sequence[_Related]]) -> Chart:
    series = []
    for number, (panel, found) in enumerate(zip(panels, related, strict=True)):
        for variant in panel.variants:
            points = tuple(_point(item, panel, measure) for item in found if item.variant is variant)
            if points:
                form: Literal["dots", "squares"] = "dots" if number % 2 == 0 else "squares"
                series.append(Series(f"{panel.short}, {variant.label}", f"s{variant.colour}", points, form))
    x = [point.x for item in series for point in item.points]
    y = [point.y for item in series for point in item.points]
    axis = linear_axis(measure.title, x, plain, margin=0.08)
    if min(x) > 0 and max(x) / min(x) > 30:
        axis = Axis(measure.title, min(x) / 1.4, max(x) * 1.4, plain, is_logarithmic=True)
    description = f"{measure.title} against final test accuracy, {len(x)} runs."
    accuracy = linear_axis("final test accuracy, %", y, percent_tick, margin=0.1)
    return Chart(f"scatter-{index}", measure.title, description, axis, accuracy, tuple(series))


def _point(item: _Related, panel: Panel, measure: Measure) -> Point:
    seed = "" if item.run.seed is None else f", seed {item.run.seed}"
    value = measure.told(item.run, item.value)
    text = f"{panel.short}, {item.variant.label}{seed}: {value}, test {item.other * 100:.2f} %"
    return Point(item.value, item.other, text)
