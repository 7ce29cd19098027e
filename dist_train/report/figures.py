"""The charts of the page but for landscapes: learning curves, seeds at a glance, sharpness."""

from __future__ import annotations

import math
from collections.abc import Callable, Collection, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from statistics import fmean
from typing import Literal

from dist_train.report.chart import WIDTH
from dist_train.report.correlations import RankCorrelation, rank_correlation
from dist_train.report.measures import (
    FINAL_ACCURACY,
    GAP,
    TRAIN_LOSS,
    Measure,
    Summary,
    sharpness_measures,
    summary,
)
from dist_train.report.stored_run import StoredRun
from dist_train.report.tables import limits, lost_note, variant_cell
from dist_train.report.variants import Lost, Panel, Variant, duplicates_of
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


@dataclass(frozen=True)
class Correlation:
    """Spearman's rank correlation with `other`, among what `note` counts; None where that is too little.

    A censored value has the rank of its bound.
    """

    other: str
    among: str
    found: RankCorrelation | None
    note: str

    @property
    def text(self) -> str:
        """Return the correlation and, in brackets, its interval and what it is of; a dash without one."""
        if self.found is None:
            return "\u2013"
        numbers = [f"{each:.2f}".replace("-", "\u2212") for each in (self.found.low, self.found.high)]
        ends = "" if math.isnan(self.found.low) else f"{' to '.join(numbers)}; "
        return f"{self.found.rho:.2f} ({ends}{self.note})".replace("-", "\u2212")


@dataclass(frozen=True)
class Scatter:
    """One measure of sharpness against test accuracy, and its correlations: with that, with the training loss, and with
    the generalization gap, also given the training loss.
    """

    chart: Chart
    correlations: tuple[Correlation, ...]


@dataclass(frozen=True)
class _Related:
    """A run that has a measure and the `others`, and their values; `form` tells panels apart."""

    panel: Panel
    form: Literal["dots", "squares"]
    variant: Variant
    run: StoredRun
    value: float
    others: tuple[float, ...]


def sharpness_scatters(panels: Sequence[Panel]) -> tuple[Scatter, ...]:
    """Return a scatter for every measure of sharpness that at least two finished runs have; duplicates left out."""
    runs = [run for panel in panels for variant in panel.variants for run in variant.counted if run.is_finished]
    # two studies in one folder may hold the same run
    distinct = {run.name for run in runs} - duplicates_of(runs).keys()
    lost = {panel.short: _lost(panel.variants) for panel in panels}
    lost["all runs"] = _lost([variant for panel in panels for variant in panel.variants])
    scatters: list[Scatter] = []
    for measure in sharpness_measures(runs):
        with_accuracy = _related(panels, distinct, measure, (FINAL_ACCURACY,))
        if len(with_accuracy) >= 2:
            correlations = tuple(
                correlation
                for others in _CORRELATED
                for correlation in _correlations(measure, others, _related(panels, distinct, measure, others), lost)
            )
            scatters.append(Scatter(_scatter(f"scatter-{len(scatters)}", measure, with_accuracy), correlations))
    return tuple(scatters)


_CORRELATED = ((FINAL_ACCURACY,), (TRAIN_LOSS,), (GAP,), (GAP, TRAIN_LOSS))
"""With what; and where there are two, given the second."""


def _related(
    panels: Sequence[Panel], distinct: Collection[str], measure: Measure, others: Sequence[Measure]
) -> list[_Related]:
    return [
        _Related(panel, "squares" if number % 2 else "dots", variant, run, value, values)
        for number, panel in enumerate(panels)
        for variant in panel.variants
        for run, value in variant.measured(measure)
        if run.name in distinct
        and len(values := tuple(found for other in others if (found := other.take(run)) is not None)) == len(others)
    ]


def _lost(variants: Sequence[Variant]) -> Lost:
    """Return how many runs of `variants` have no part in correlations, since they diverged or have not finished."""
    runs = {run.name: run for variant in variants for run in variant.distinct}.values()
    diverged = sum(run.is_diverged for run in runs)
    return Lost(diverged, sum(not run.is_finished for run in runs) - diverged)


def _correlations(
    measure: Measure, others: Sequence[Measure], related: Sequence[_Related], lost: Mapping[str, Lost]
) -> Iterator[Correlation]:
    """Yield the correlation over all runs, over each batch size where there are several, and over variants' means.

    `lost` are the runs that have no part in it, by the first column's names.
    """
    other = ", given ".join(each.title for each in others)
    shorts = dict.fromkeys(item.panel.short for item in related)
    for among in ("all runs", *(shorts if len(shorts) > 1 else ())):
        found = [item for item in related if among in ("all runs", item.panel.short)]
        columns = [[item.others[at] for item in found] for at in range(len(others))]
        rho = rank_correlation([item.value for item in found], *columns)
        censored = sum(measure.is_bound(item.run) for item in found)
        unresolved = sum(measure.is_unresolved(item.run) for item in found)
        yield Correlation(other, among, rho, limits(len(found), censored, unresolved) + lost_note(lost[among]))
    means: dict[tuple[str, str], list[_Related]] = {}
    for item in related:
        means.setdefault((item.panel.title, item.variant.name), []).append(item)
    if 3 <= len(means) < len(related):
        first = [fmean(item.value for item in found) for found in means.values()]
        rest = [[fmean(item.others[at] for item in found) for found in means.values()] for at in range(len(others))]
        bounds = sum(any(measure.is_bound(item.run) for item in found) for found in means.values())
        yield Correlation(other, "variants' means", rank_correlation(first, *rest), limits(len(means), bounds, 0))


def _scatter(key: str, measure: Measure, related: Sequence[_Related]) -> Chart:
    groups: dict[tuple[str, str], list[_Related]] = {}
    for item in related:
        groups.setdefault((f"{item.panel.short}, {item.variant.label}", f"s{item.variant.colour}"), []).append(item)
    series = []
    for (label, style), found in groups.items():
        points = []
        for item in found:
            seed = "" if item.run.seed is None else f", seed {item.run.seed}"
            value = measure.described(item.run, item.value)
            words = f"{label}{seed}: {value}, test {item.others[0] * 100:.2f} %"
            points.append(Point(item.value, item.others[0], words))
        series.append(Series(label, style, tuple(points), found[0].form))
    x = [item.value for item in related]
    axis = linear_axis(measure.title, x, plain, margin=0.08)
    if min(x) > 0 and max(x) / min(x) > 30:
        axis = Axis(measure.title, min(x) / 1.4, max(x) * 1.4, plain, is_logarithmic=True)
    description = f"{measure.title} against final test accuracy, {len(x)} runs."
    accuracy = linear_axis("final test accuracy, %", [item.others[0] for item in related], percent_tick, margin=0.1)
    return Chart(key, measure.title, description, axis, accuracy, tuple(series))
