"""Charts of sharpness: against generalization, with rank correlations, and along training with its stability limit."""

from __future__ import annotations

import json
import math
from collections.abc import Collection, Iterator, Mapping, Sequence
from dataclasses import dataclass
from statistics import fmean
from typing import Literal

import numpy
from scipy import special

from dist_train.report.measures import (
    FINAL_ACCURACY,
    GAP,
    TRAIN_LOSS,
    Measure,
    commonest_settings,
    mean_points,
    sharpness_measures,
)
from dist_train.report.stored_run import EIGENVALUE, StoredRun
from dist_train.report.tables import lost_note, measured_note
from dist_train.report.variants import Panel, Variant, counted_runs, duplicates_of
from dist_train.rundir.records import EvaluationRecord, TrainRecord
from dist_train.watch.figure import (
    Axis,
    Chart,
    Point,
    Series,
    epochs_axis,
    linear_axis,
    percent_tick,
    plain,
    three_digits,
)


@dataclass(frozen=True)
class RankCorrelation:
    """Spearman's rho with Fisher's 95 % interval; the ends are NaN if it has none."""

    rho: float
    low: float
    high: float


def spearman(first: Sequence[float], second: Sequence[float]) -> float | None:
    """Return the rank correlation; None for fewer than three pairs, or if one side is constant."""
    if len(first) < 3 or len(set(first)) < 2 or len(set(second)) < 2:
        return None
    from scipy.stats import spearmanr  # importing it takes longer than making most reports

    return float(spearmanr(first, second).statistic)


def partial_spearman(first: Sequence[float], second: Sequence[float], given: Sequence[float]) -> float | None:
    """Return the partial rank correlation of `first` and `second` given `given`; None if it is undefined.

    It is for fewer than four triples: between the residuals of three it is always 1 or -1.
    """
    if len(first) < 4:
        return None
    pairs = ((first, second), (first, given), (second, given))
    plain, first_given, second_given = (spearman(one, other) for one, other in pairs)
    if plain is None or first_given is None or second_given is None:
        return None
    unexplained = (1 - first_given**2) * (1 - second_given**2)
    return (plain - first_given * second_given) / math.sqrt(unexplained) if unexplained > 1e-12 else None


def rank_correlation(
    first: Sequence[float], second: Sequence[float], given: Sequence[float] | None = None
) -> RankCorrelation | None:
    """Return the rank correlation (partial if `given` is not None) with its interval; None if it is undefined.

    The interval is Fisher's, tanh(atanh(rho) +- 1.96 sqrt((1 + rho^2 / 2) / (n - 3 - k))), k = 1 for a partial
    correlation, otherwise 0, with the variance for ranks of Bonett and Wright (Psychometrika 65, 2000). It assumes
    independent pairs.
    """
    rho = spearman(first, second) if given is None else partial_spearman(first, second, given)
    if rho is None:
        return None
    freedom = len(first) - 3 - (given is not None)
    if freedom < 1 or abs(rho) >= 1 - 1e-12:
        return RankCorrelation(rho, math.nan, math.nan)
    half = float(special.ndtri(0.975)) * math.sqrt((1 + rho**2 / 2) / freedom)
    return RankCorrelation(rho, math.tanh(math.atanh(rho) - half), math.tanh(math.atanh(rho) + half))


@dataclass(frozen=True)
class Correlation:
    """Spearman's rank correlation with `other` among `among`, None if undefined; `note` says how many values it has."""

    other: str
    among: str
    found: RankCorrelation | None
    note: str

    @property
    def text(self) -> str:
        """Return the correlation with its interval and note in brackets; a dash if there is none."""
        if self.found is None:
            return "\u2013"
        numbers = [f"{each:.2f}" for each in (self.found.low, self.found.high)]
        ends = "" if math.isnan(self.found.low) else f"{' to '.join(numbers)}; "
        return f"{self.found.rho:.2f} ({ends}{self.note})".replace("-", "\u2212")


@dataclass(frozen=True)
class Scatter:
    """One measure of sharpness against test accuracy, and its rank correlations with what `_CORRELATED` lists."""

    chart: Chart
    correlations: tuple[Correlation, ...]


@dataclass(frozen=True)
class _Related:
    """A run with its `value` of the measure and those of the `others`; `form` distinguishes panels."""

    panel: Panel
    form: Literal["dots", "squares"]
    variant: Variant
    run: StoredRun
    value: float
    others: tuple[float, ...]


def sharpness_scatters(panels: Sequence[Panel]) -> tuple[Scatter, ...]:
    """Return a scatter for each sharpness measure that two or more finished runs have, without duplicate runs."""
    runs = [run for run in counted_runs(panels) if run.is_finished]
    every = {panel.short: [run for variant in panel.variants for run in variant.runs] for panel in panels}
    every["all runs"] = [run for found in every.values() for run in found]
    # Two studies in one folder may hold the same run.
    repeated = duplicates_of(every["all runs"])
    distinct = {run.name for run in runs} - repeated.keys()
    lost = {among: lost_note([[run] for run in found if run.name not in repeated]) for among, found in every.items()}
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
"""What sharpness is correlated with; of two, given the second."""


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


def _correlations(
    measure: Measure, others: Sequence[Measure], related: Sequence[_Related], lost: Mapping[str, str]
) -> Iterator[Correlation]:
    """Yield them over all runs, within batch sizes, and over variants' means; `lost`: their number, by `among`."""

    def correlation(among: str, groups: Collection[Sequence[_Related]]) -> Correlation:
        """Return the correlation over the means of `groups`."""
        values = [fmean(item.value for item in group) for group in groups]
        columns = [[fmean(item.others[at] for item in group) for group in groups] for at in range(len(others))]
        note = measured_note(measure, [[item.run for item in group] for group in groups]) + lost.get(among, "")
        return Correlation(
            ", given ".join(each.title for each in others), among, rank_correlation(values, *columns), note
        )

    shorts = dict.fromkeys(item.panel.short for item in related)
    for among in ("all runs", *(shorts if len(shorts) > 1 else ())):
        yield correlation(among, [[item] for item in related if among in ("all runs", item.panel.short)])
    by_variant: dict[tuple[str, str], list[_Related]] = {}
    for item in related:
        by_variant.setdefault((item.panel.title, item.variant.name), []).append(item)
    if 3 <= len(by_variant) < len(related):
        yield correlation("variants' means", by_variant.values())


def _scatter(key: str, measure: Measure, related: Sequence[_Related]) -> Chart:
    groups: dict[tuple[str, str, Literal["dots", "squares"]], list[Point]] = {}
    for item in related:
        label, accuracy = item.variant.title, item.others[0]
        seed = "" if item.run.seed is None else f", seed {item.run.seed}"
        words = f"{label}{seed}: {measure.described(item.run, item.value)}, test {accuracy * 100:.2f} %"
        point = Point(item.value, accuracy, words)
        groups.setdefault((label, f"s{item.variant.colour}", item.form), []).append(point)
    series = tuple(Series(label, style, tuple(points), form) for (label, style, form), points in groups.items())
    x = [item.value for item in related]
    axis = linear_axis(measure.title, x, plain, margin=0.08)
    if min(x) > 0 and max(x) / min(x) > 30:
        axis = Axis(measure.title, min(x) / 1.4, max(x) * 1.4, plain, is_logarithmic=True)
    description = f"{measure.title} against final test accuracy, {len(x)} runs."
    accuracies = linear_axis("final test accuracy, %", [item.others[0] for item in related], percent_tick, margin=0.1)
    return Chart(key, measure.title, description, axis, accuracies, series)


_MOST_POINTS = 400


def sharpness_courses(panels: Sequence[Panel]) -> tuple[Chart, ...]:
    """Return a chart per panel: the eigenvalue of runs with two or more measured checkpoints, and the limit of SGD.

    Only measurements with the commonest settings are used. All charts share a logarithmic y axis.
    """
    results = (item for run in counted_runs(panels) for item in run.analyses.sharpness)
    settings = commonest_settings([item for item in results if EIGENVALUE in item.measures])
    drawn = [(panel, _series(panel, settings)) for panel in panels]
    values = [point.y for _, series in drawn for each in series for point in each.points if point.y > 0]
    if not values:
        return ()
    # Towards the end of a decay the limit grows without bound.
    eigenvalues = [point.y for _, series in drawn for each in _measured(series) for point in each.points]
    low, high = min(values), min(max(values), 30 * max(eigenvalues))
    axis = Axis(EIGENVALUE, low / 1.4, high * 1.4, plain, is_logarithmic=True)
    return tuple(
        Chart(f"course-{number}", panel.title, _described(panel, series), epochs_axis(series), axis, series)
        for number, (panel, series) in enumerate(drawn)
        if series
    )


def eigenvalues_of(run: StoredRun, settings: str | None) -> tuple[tuple[int, float], ...]:
    """Return (step, largest eigenvalue) pairs measured with `settings`, by ascending step."""
    found = {
        item.step: item.measures[EIGENVALUE]
        for item in run.analyses.sharpness
        if item.shared_settings == settings and item.measures.get(EIGENVALUE, 0) > 0
    }
    return tuple(sorted(found.items()))


def epoch_at(run: StoredRun, step: int) -> float | None:
    """Return the epochs done after `step` updates, interpolated between records; None beyond the last one."""
    records: tuple[TrainRecord | EvaluationRecord, ...] = (*run.train, *run.evaluations)
    epochs = {0: 0.0} | {record.step: record.epoch for record in records}
    steps = sorted(epochs)
    return float(numpy.interp(step, steps, [epochs[at] for at in steps])) if step <= steps[-1] else None


def _series(panel: Panel, settings: str | None) -> tuple[Series, ...]:
    """Return each variant's eigenvalues and, for SGD, the limit above which it is unstable, if these are comparable."""
    series: list[Series] = []
    for variant in panel.variants:
        runs = [run for run in variant.counted if len(eigenvalues_of(run, settings)) > 1]
        if points := _eigenvalues(runs, settings):
            style = f"s{variant.colour}"
            series.append(Series(variant.label, style, points))
            factor = stability_factor(runs[0].settings)
            if factor is not None and _is_of_training(runs[0], settings):
                limit = _stability_limit(runs[0], factor)
                series.append(Series(f"{variant.label}, limit of stability", style, limit, "dashed"))
    return tuple(series)


def _is_of_training(run: StoredRun, settings: str | None) -> bool:
    """Whether eigenvalues measured with `settings` are of the loss that SGD descends, by each batch's statistics."""
    is_normalized = run.settings.get("model.norm") not in ("group", "none")
    return not is_normalized or json.loads(settings or "{}").get("statistics") == "batch"


def _measured(series: Sequence[Series]) -> list[Series]:
    return [each for each in series if each.form != "dashed"]


def stability_factor(settings: Mapping[str, object]) -> float | None:
    """Return the Hessian's eigenvalue times the learning rate above which SGD is unstable on a quadratic loss.

    2, with momentum m 2 + 2 m, with Nesterov's (2 + 2 m) / (1 + 2 m): Cohen et al., arXiv 2103.00065, appendix B. None
    for other optimizers and for IVON, which scales the gradient itself, or if the settings are missing.
    """
    momentum = settings.get("optimizer.momentum")
    is_sgd = settings.get("optimizer.name") == "sgd" and settings.get("noise.method") != "ivon"
    if not is_sgd or not isinstance(momentum, int | float):
        return None
    return (2 + 2 * momentum) / (1 + 2 * momentum if settings.get("optimizer.nesterov") else 1)


def _eigenvalues(runs: Sequence[StoredRun], settings: str | None) -> tuple[Point, ...]:
    values: dict[float, list[float]] = {}
    for run in runs:
        for step, value in eigenvalues_of(run, settings):
            if (epoch := epoch_at(run, step)) is not None:
                values.setdefault(epoch, []).append(value)
    return mean_points(sorted(values.items()), lambda found: f"{three_digits(found.mean)} (n = {found.count})")


def _stability_limit(run: StoredRun, factor: float) -> tuple[Point, ...]:
    every = max(1, math.ceil(len(run.train) / _MOST_POINTS))
    limits = (
        (record.epoch, factor / record.learning_rate) for record in run.train[::every] if record.learning_rate > 0
    )
    return tuple(Point(epoch, limit, f"{factor:.3g} / rate = {three_digits(limit)}") for epoch, limit in limits)


def _described(panel: Panel, series: Sequence[Series]) -> str:
    measured = _measured(series)
    limit = ", and the limit of stability" if len(measured) < len(series) else ""
    ends = "; ".join(f"{each.label} {each.points[-1].text}" for each in measured)
    return f"Largest eigenvalue of the Hessian along training{limit}, {panel.title}; {ends}"
