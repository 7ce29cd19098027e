"""The charts of the page but for landscapes: learning curves (figure 2), seeds at a glance, sharpness."""

from __future__ import annotations

import math
from collections.abc import Callable, Collection, Iterable, Iterator, Sequence
from dataclasses import dataclass

from markupsafe import Markup

from dist_train.report.chart import WIDTH, element, line, mark, text, ticks
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


_ROW, _RIM, _FOOT = 34, 10, 34


def strip_plot(panels: Sequence[Panel], measure: Measure) -> tuple[tuple[Panel, Markup], ...]:
    """Return, for each panel, its variants' values of `measure` on one axis that all panels share."""
    shown = [(panel, [variant for variant in panel.variants if variant.measured(measure)]) for panel in panels]
    values = [
        value * measure.factor for _, variants in shown for each in variants for _, value in each.measured(measure)
    ]
    axis = linear_axis(measure.heading, values, plain)
    return tuple((panel, _strip(panel, variants, measure, axis)) for panel, variants in shown if variants)


def _strip(panel: Panel, variants: Sequence[Variant], measure: Measure, axis: Axis) -> Markup:
    bottom = 6 + _ROW * len(variants)
    key = f"strip-{'none' if panel.batch is None else panel.batch}-title"
    words = "; ".join(f"{variant.label} {_value(variant, measure)}" for variant in variants)
    axes = []
    for tick in ticks(axis):
        x = _place(axis, tick)
        axes += [line("grid", x, x, 4, bottom), text(x, bottom + 13, axis.write(tick))]
    axes.append(text(WIDTH / 2, bottom + 29, axis.title, style="name"))
    rows = [_strip_row(variant, measure, axis, 6 + _ROW * index) for index, variant in enumerate(variants)]
    title = element("title", f"{panel.title}, {measure.title}: {words}", id=key)
    return element(
        "svg",
        Markup("").join([title, element("g", Markup("").join(axes), class_="axes"), *rows]),
        viewBox=f"0 0 {WIDTH} {bottom + _FOOT}",
        role="img",
        aria_labelledby=key,
    )


def _strip_row(variant: Variant, measure: Measure, axis: Axis, top: int) -> Markup:
    found = variant.summary(measure)
    assert found is not None
    y = top + 21
    middle = found.mean * measure.factor
    parts = [
        text(_RIM, top + 10, variant.label, "start", "variant"),
        text(WIDTH - _RIM, top + 10, _value(variant, measure), "end", "value"),
    ]
    if found.deviation is not None:
        spread = found.deviation * measure.factor
        parts.append(line("spread", _place(axis, middle - spread), _place(axis, middle + spread), y, y))
    parts.append(line("mean", _place(axis, middle), _place(axis, middle), y - 6, y + 6))
    for run, value in variant.measured(measure):
        seed = "" if run.seed is None else f"seed {run.seed}: "
        parts.append(mark(_place(axis, value * measure.factor), y, seed + measure.described(run, value), radius=4))
    return element("g", Markup("").join(parts), class_=f"series s{variant.colour}")


def _value(variant: Variant, measure: Measure) -> str:
    cell = variant_cell(variant, measure)
    return f"{cell.as_text}, {cell.note}"


def _place(axis: Axis, value: float) -> float:
    return _RIM + min(1.0, max(0.0, axis.share(value))) * (WIDTH - 2 * _RIM)


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
