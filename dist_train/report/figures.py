"""The charts of the page but for landscapes: learning curves (figure 2), seeds at a glance, sharpness."""

from __future__ import annotations

import math
from collections.abc import Callable, Collection, Iterable, Iterator, Sequence
from dataclasses import dataclass

from dist_train.report.chart import WIDTH
from dist_train.report.measures import (
    FINAL_ACCURACY,
    TRAIN_LOSS,
    Measure,
    Summary,
    sharpness_measures,
    spearman,
    summary,
)
from dist_train.report.stored_run import StoredRun
from dist_train.report.tables import limits, variant_cell
from dist_train.report.variants import Panel, Variant, duplicates_of
from dist_train.rundir.records import EvaluationRecord, TrainRecord
from dist_train.watch.figure import (
    ACCURACY,
    LOSS,
    RATES,
    Axis,
    Chart,
    Point,
    Quantity,
    Series,
    epochs_axis,
    learning_curve,
    linear_axis,
    measured_of,
    percent_tick,
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


def mean_points(values: Iterable[tuple[float, Sequence[float]]], words: Callable[[Summary], str]) -> tuple[Point, ...]:
    """Return the means of the values at each place, with a band of one standard deviation."""
    points = []
    for x, measured in values:
        if found := summary(measured):
            spread = found.deviation
            low, high = (None, None) if spread is None else (found.mean - spread, found.mean + spread)
            points.append(Point(x, found.mean, words(found), low, high))
    return tuple(points)


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
class StripRow:
    """A variant's mean and standard deviation, and its values with their words, in the measure's unit."""

    label: str
    value: str
    colour: int
    mean: float
    spread: float | None
    values: tuple[tuple[float, str], ...]


@dataclass(frozen=True)
class Strip:
    """The variants of a panel, a row each, along one axis."""

    panel: Panel
    key: str
    title: str
    axis: Axis
    rows: tuple[StripRow, ...]
    width: int = WIDTH
    rim: int = 10

    def x(self, value: float) -> float:
        """Return the place of `value`."""
        return self.rim + min(1.0, max(0.0, self.axis.share(value))) * (self.width - 2 * self.rim)


def strips(panels: Sequence[Panel], measure: Measure) -> tuple[Strip, ...]:
    """Return, for each panel, its variants' values of `measure` on one axis that all panels share."""
    rows = [tuple(_strip_rows(panel, measure)) for panel in panels]
    axis = linear_axis(measure.heading, [value for each in rows for row in each for value, _ in row.values], plain)
    return tuple(
        Strip(
            panel,
            f"strip-{'none' if panel.batch is None else panel.batch}",
            f"{panel.title}, {measure.title}",
            axis,
            own,
        )
        for panel, own in zip(panels, rows, strict=True)
        if own
    )


def _strip_rows(panel: Panel, measure: Measure) -> Iterator[StripRow]:
    for variant in panel.variants:
        if found := variant.summary(measure):
            cell = variant_cell(variant, measure)
            spread = None if found.deviation is None else found.deviation * measure.factor
            values = tuple(
                (
                    value * measure.factor,
                    f"{'' if run.seed is None else f'seed {run.seed}: '}{measure.described(run, value)}",
                )
                for run, value in variant.measured(measure)
            )
            words = f"{cell.as_text}, {cell.note}"
            yield StripRow(variant.label, words, variant.colour, found.mean * measure.factor, spread, values)


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
    """A run that has both measures, and their values."""

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
        related = {
            other.title: [_related(panel, distinct, measure, other) for panel in panels]
            for other in (FINAL_ACCURACY, TRAIN_LOSS)
        }
        with_accuracy = related[FINAL_ACCURACY.title]
        if sum(map(len, with_accuracy)) >= 2:
            correlations = [each for other in related for each in _correlations(measure, other, panels, related[other])]
            scatters.append(Scatter(_scatter(len(scatters), measure, panels, with_accuracy), tuple(correlations)))
    return tuple(scatters)


def _related(panel: Panel, distinct: Collection[str], measure: Measure, other: Measure) -> list[_Related]:
    return [
        _Related(variant, run, value, second)
        for variant in panel.variants
        for run, value in variant.measured(measure)
        if run.name in distinct and (second := other.take(run)) is not None
    ]


def _correlations(
    measure: Measure, other: str, panels: Sequence[Panel], related: Sequence[Sequence[_Related]]
) -> Iterator[Correlation]:
    """Yield the correlation over all runs, and over each batch size where there are several."""
    groups = [(panel.short, found) for panel, found in zip(panels, related, strict=True) if found]
    everything = ("all runs", [item for _, found in groups for item in found])
    for among, found in [everything, *(groups if len(groups) > 1 else [])]:
        rho = spearman([item.value for item in found], [item.other for item in found])
        censored = sum(measure.is_bound(item.run) for item in found)
        unresolved = sum(measure.is_unresolved(item.run) for item in found)
        yield Correlation(other, among, rho, limits(len(found), censored, unresolved))


def _scatter(index: int, measure: Measure, panels: Sequence[Panel], related: Sequence[Sequence[_Related]]) -> Chart:
    series = []
    for number, (panel, found) in enumerate(zip(panels, related, strict=True)):
        for variant in panel.variants:
            points = tuple(_point(item, panel, measure) for item in found if item.variant is variant)
            if points:
                label, style = f"{panel.short}, {variant.label}", f"s{variant.colour}"
                series.append(Series(label, style, points, "squares" if number % 2 else "dots"))
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
    value = measure.described(item.run, item.value)
    words = f"{panel.short}, {item.variant.label}{seed}: {value}, test {item.other * 100:.2f} %"
    return Point(item.value, item.other, words)
