"""Sharpness along training: the largest eigenvalue of the Hessian at each checkpoint measured, against 2 / rate."""

from __future__ import annotations

import math
from bisect import bisect_left
from collections.abc import Sequence

from dist_train.report.figures import mean_points
from dist_train.report.measures import Summary, commonest_settings
from dist_train.report.stored_run import StoredRun
from dist_train.report.variants import Panel
from dist_train.rundir.records import EvaluationRecord, TrainRecord
from dist_train.watch.figure import Axis, Chart, Point, Series, epochs_axis, plain, three_digits

EIGENVALUE = "largest Hessian eigenvalue"
_MOST_POINTS = 400


def sharpness_courses(panels: Sequence[Panel]) -> tuple[Chart, ...]:
    """Return a chart a panel of the runs of which two checkpoints or more were measured, with 2 / learning rate.

    Only measurements with the commonest settings are taken. The upright axes are the same, and logarithmic.
    """
    drawn = [(panel, _series(panel, _settings(panels))) for panel in panels]
    values = [point.y for _, series in drawn for each in series for point in each.points if point.y > 0]
    if not values:
        return ()
    # towards the end of a decay 2 / rate has no bounds
    eigenvalues = [point.y for _, series in drawn for each in series[::2] for point in each.points]
    low, high = min(values), min(max(values), 30 * max(eigenvalues))
    axis = Axis("largest eigenvalue; dashed: 2 / rate", low / 1.4, high * 1.4, plain, is_logarithmic=True)
    return tuple(
        Chart(f"course-{number}", panel.title, _described(panel, series), epochs_axis(series), axis, series)
        for number, (panel, series) in enumerate(drawn)
        if series
    )


def eigenvalues_of(run: StoredRun, settings: str | None) -> tuple[tuple[int, float], ...]:
    """Return the steps at which the eigenvalue was measured with `settings`, ascending, and the eigenvalues."""
    found = {
        item.step: item.measures[EIGENVALUE]
        for item in run.analyses.sharpness
        if item.settings == settings and item.step is not None and item.measures.get(EIGENVALUE, 0) > 0
    }
    return tuple(sorted(found.items()))


def epoch_at(run: StoredRun, step: int) -> float | None:
    """Return the epochs done after `step` updates, by the record there, else between those around it."""
    records: tuple[TrainRecord | EvaluationRecord, ...] = (*run.train, *run.evaluations)
    known = sorted({record.step: record.epoch for record in records}.items())
    at = bisect_left(known, (step, -math.inf))
    if at == len(known):
        return None
    right, left = known[at], known[at - 1] if at else (0, 0.0)
    part = (step - left[0]) / (right[0] - left[0]) if right[0] != left[0] else 1.0
    return left[1] + part * (right[1] - left[1])


def _settings(panels: Sequence[Panel]) -> str | None:
    runs = [run for panel in panels for variant in panel.variants for run in variant.counted]
    return commonest_settings([item for run in runs for item in run.analyses.sharpness if EIGENVALUE in item.measures])


def _series(panel: Panel, settings: str | None) -> tuple[Series, ...]:
    """Return for each variant its eigenvalues and its 2 / rate, one after the other."""
    series: list[Series] = []
    for variant in panel.variants:
        runs = [run for run in variant.counted if len(eigenvalues_of(run, settings)) > 1]
        if runs:
            style = f"s{variant.colour}"
            series += [
                Series(variant.label, style, _eigenvalues(runs, settings)),
                Series(f"{variant.label}, 2 / rate", style, _limit(runs[0]), "dashed"),
            ]
    return tuple(series)


def _eigenvalues(runs: Sequence[StoredRun], settings: str | None) -> tuple[Point, ...]:
    values: dict[float, list[float]] = {}
    for run in runs:
        for step, value in eigenvalues_of(run, settings):
            if (epoch := epoch_at(run, step)) is not None:
                values.setdefault(epoch, []).append(value)

    def words(found: Summary) -> str:
        return f"{three_digits(found.mean)} (n = {found.count})"

    return mean_points(sorted(values.items()), words)


def _limit(run: StoredRun) -> tuple[Point, ...]:
    every = max(1, math.ceil(len(run.train) / _MOST_POINTS))
    records = [record for record in run.train[::every] if record.learning_rate > 0]
    return tuple(
        Point(record.epoch, 2 / record.learning_rate, f"2 / rate = {three_digits(2 / record.learning_rate)}")
        for record in records
    )


def _described(panel: Panel, series: Sequence[Series]) -> str:
    return f"Largest eigenvalue of the Hessian along training, and 2 / learning rate, {panel.title}; " + "; ".join(
        f"{each.label} {each.points[-1].text}" for each in series[::2]
    )
