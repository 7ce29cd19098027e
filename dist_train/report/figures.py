"""The figures of a report: learning curves, seeds at a glance, and all of a page, numbered in order."""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field, replace

from dist_train.report.chart import WIDTH
from dist_train.report.landscape_charts import LandscapeFigure, Plane, planes_of, run_landscapes
from dist_train.report.measures import (
    Measure,
    mean_points,
)
from dist_train.report.sharpness_charts import Scatter, sharpness_courses
from dist_train.report.stored_run import StoredRun
from dist_train.report.tables import variant_cell
from dist_train.report.variants import Panel, Variant
from dist_train.rundir.records import EvaluationRecord, TrainRecord
from dist_train.watch.figure import (
    ACCURACY,
    LOSS,
    RATES,
    Axis,
    Chart,
    Quantity,
    Series,
    epochs_axis,
    learning_curve,
    linear_axis,
    measured_of,
    plain,
    rate_curve,
)

_MOST_POINTS = 400
_ROWS = (("test", ACCURACY), ("train", ACCURACY), ("test", LOSS), ("train", LOSS))


def study_curves(panels: Sequence[Panel]) -> tuple[tuple[Chart, ...], ...]:
    """Return rows of charts, one chart a panel: test and train accuracy, test and train loss."""
    rows: list[tuple[Chart, ...]] = []
    for split, quantity in _ROWS:
        found = [[_mean_curve(variant, split, quantity) for variant in panel.variants] for panel in panels]
        drawn = [tuple(series for series in curves if series.points) for curves in found]
        if any(drawn):
            axis = quantity.axis(f"{split} {quantity.title}", [series.points for curves in drawn for series in curves])
            rows.append(
                tuple(
                    _curve_chart(f"curve-{len(rows)}-{index}", panel, axis, drawn[index])
                    for index, panel in enumerate(panels)
                    if drawn[index]
                )
            )
    return tuple(rows)


def run_curves(run: StoredRun) -> tuple[Chart, ...]:
    """Return the charts of one run: accuracy, loss, rates, speed."""
    measured = measured_of(run.name, (*run.train, *run.evaluations))
    charts = [learning_curve(quantity, measured, _MOST_POINTS) for quantity in (ACCURACY, LOSS)]
    charts += [rate_curve(quantity, measured, _MOST_POINTS) for quantity in RATES]
    return tuple(filter(None, charts))


def curve_records(run: StoredRun, split: str) -> Sequence[TrainRecord | EvaluationRecord]:
    """Return what is drawn of a split: its evaluations; without any of the training split, its updates."""
    evaluated = run.split(split)
    return evaluated if evaluated or split == "test" else run.train


def _mean_curve(variant: Variant, split: str, quantity: Quantity) -> Series:
    values: dict[int, list[tuple[float, float]]] = {}
    for run in variant.counted:
        for record in curve_records(run, split):
            if math.isfinite(quantity.take(record)):
                values.setdefault(record.step, []).append((record.epoch, quantity.take(record)))
    points = mean_points(
        ((measured[0][0], [value for _, value in measured]) for _, measured in sorted(values.items())),
        lambda found: f"{quantity.text(found.mean, found.deviation)} (n = {found.count})",
    )
    every = max(1, math.ceil(len(points) / _MOST_POINTS))
    # the last one always stands: it is the result
    return Series(variant.label, f"s{variant.colour}", points[::-every][::-1])


def _curve_chart(key: str, panel: Panel, axis: Axis, series: tuple[Series, ...]) -> Chart:
    ends = "; ".join(f"{item.label} {item.points[-1].text}" for item in series)
    description = f"{axis.title} against epochs, {panel.title}. At the end: {ends}."
    return Chart(key, panel.title, description, epochs_axis(series), axis, series)


@dataclass(frozen=True)
class Strip:
    """Those variants of a panel that have `measure`, a row each, along one axis in the measure's unit."""

    panel: Panel
    measure: Measure
    variants: tuple[Variant, ...]
    axis: Axis
    width: int = WIDTH
    rim: int = 10

    def x(self, value: float) -> float:
        """Return the place of a value of the measure."""
        share = self.axis.share(value * self.measure.factor)
        return self.rim + min(1.0, max(0.0, share)) * (self.width - 2 * self.rim)

    def words(self, variant: Variant) -> str:
        """Return the mean of a variant as people read it."""
        cell = variant_cell(variant, self.measure)
        return f"{cell.as_text}, {cell.note}"


def strips(panels: Sequence[Panel], measure: Measure) -> tuple[Strip, ...]:
    """Return, for each panel, its variants' values of `measure` on one axis that all panels share."""
    shown = [(panel, tuple(each for each in panel.variants if each.measured(measure))) for panel in panels]
    values = [value for _, variants in shown for each in variants for _, value in each.measured(measure)]
    axis = linear_axis(measure.heading, [value * measure.factor for value in values], plain)
    return tuple(Strip(panel, measure, variants, axis) for panel, variants in shown if variants)


_BATCHES = {"batch": "train, each batch", "train": "train split", "test": "test split"} | {
    "validation": "validation split",
    **{f"{split}-averaged": f"{split} split, averaged weights" for split in ("train", "validation", "test")},
}
_LINES = {"loss": "loss, left axis", "accuracy": "accuracy, right axis", "train": "train", "test": "test"}


@dataclass(frozen=True)
class NumberedFigure:
    """Rows of panels, or planes, under one title; `legend` is what readers can switch on the page, by style."""

    key: str
    title: str
    rows: tuple[tuple[Chart | Strip, ...], ...] = ()
    planes: tuple[Plane, ...] = ()
    legend: Mapping[str, str] = field(default_factory=dict)
    number: int = 0


def figures_of_run(run: StoredRun) -> dict[str, NumberedFigure]:
    """Return the figures of one run, by key; those without content are left out."""
    curves = run_curves(run)
    drawn = {series.style for chart in curves for series in chart.series}
    legend = {style: label for style, label in _BATCHES.items() if style in drawn}
    return _numbered(
        NumberedFigure("curves", "Learning curves and rates", (curves,), legend=legend),
        NumberedFigure("landscapes", "The loss around the solution", (run_landscapes(run),), legend=_LINES),
        NumberedFigure("planes", "Planes through the solution", planes=planes_of([run])),
    )


def figures_of_study(
    panels: Sequence[Panel],
    runs: Sequence[StoredRun],
    measure: Measure | None,
    landscape: LandscapeFigure,
    scatters: Sequence[Scatter],
) -> dict[str, NumberedFigure]:
    """Return the figures of several runs, by key; `measure` is the one shown at a glance."""
    legend = dict(_legend(panels))
    around = tuple(row for row in (landscape.panels, landscape.others) if row)
    return _numbered(
        NumberedFigure("glance", "At a glance", (strips(panels, measure),) if measure else ()),
        NumberedFigure("curves", "Learning curves", study_curves(panels), legend=legend),
        NumberedFigure("landscapes", "The loss around the solutions", around, legend=_LINES),
        NumberedFigure("between", "Between two solutions", (landscape.between,), legend=_LINES),
        NumberedFigure("planes", "Planes through the solutions", planes=planes_of(runs)),
        NumberedFigure(
            "sharpness",
            "Sharpness against generalization",
            (tuple(scatter.chart for scatter in scatters),),
            legend=legend,
        ),
        NumberedFigure("course", "Sharpness along training", (sharpness_courses(panels),), legend=legend),
    )


def _numbered(*figures: NumberedFigure) -> dict[str, NumberedFigure]:
    found = [figure for figure in figures if any(figure.rows) or figure.planes]
    return {figure.key: replace(figure, number=number) for number, figure in enumerate(found, start=1)}


def _legend(panels: Sequence[Panel]) -> Iterator[tuple[str, str]]:
    """Yield style and label of the variants that have begun, base lines first; base lines may differ by panel."""
    labels: dict[int, dict[str, None]] = {}
    for variant in (variant for panel in panels for variant in panel.variants if variant.counted):
        labels.setdefault(variant.colour, {})[variant.label] = None
    yield from ((f"s{colour}", " / ".join(words)) for colour, words in labels.items())
