"""Learning curves: of variants, mean and spread over seeds (figure 2), and of one run."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Sequence
from itertools import groupby

from dist_train.report.chart import Axis, Chart, Point, Series, linear_axis, loss_axis, percent_tick, plain
from dist_train.report.measures import three_digits
from dist_train.report.numbers import summary
from dist_train.report.stored_run import StoredRun
from dist_train.report.variants import Panel, Variant
from dist_train.rundir.records import EvaluationRecord, TrainRecord

_MOST_POINTS = 400
_SETTLED = 0.35
"""Share of a curve that may leave the frame at its beginning, so that its end can be told apart."""

Measurement = TrainRecord | EvaluationRecord


def study_curves(panels: Sequence[Panel]) -> tuple[tuple[Chart, ...], ...]:
    """Return rows of charts, one chart a panel: test and train accuracy, test and train loss."""
    rows: list[tuple[Chart, ...]] = []
    for name, split, take in _ROWS:
        curves = {
            panel.title: [
                (variant, points) for variant in panel.variants if (points := _mean_curve(variant, split, take))
            ]
            for panel in panels
        }
        if not any(curves.values()):
            continue
        everything = [points for drawn in curves.values() for _, points in drawn]
        axis = _axis(name, take, everything)
        rows.append(
            tuple(
                _curve_chart(f"curve-{len(rows)}-{index}", panel, name, axis, curves[panel.title])
                for index, panel in enumerate(panels)
                if curves[panel.title]
            )
        )
    return tuple(rows)


def run_curves(run: StoredRun) -> tuple[Chart, ...]:
    """Return the charts of one run: accuracy, loss, rates, speed."""
    charts: list[Chart] = []
    for name, take in (("accuracy, %", accuracy), ("loss", loss)):
        series = [
            Series("train, each batch", "s5", _thinned(run.train, take), "faint"),
            Series("train", "train", _plain_curve(run.split("train"), take)),
            Series("test", "test", _plain_curve(run.split("test"), take)),
        ]
        drawn = tuple(item for item in series if item.points)
        if drawn:
            axis = _axis(name, take, [item.points for item in drawn])
            description = f"{name} of {run.name} against epochs, {len(drawn)} curves."
            charts.append(Chart(f"run-{len(charts)}", _heading(name), description, _epochs(drawn), axis, drawn))
    for name, title, take_train in _RATES:
        points = _thinned(run.train, take_train)
        if any(point.y > 0 for point in points):
            drawn = (Series(name, "s0", points),)
            axis = linear_axis(title, [0.0, *(point.y for point in points)], plain, margin=0.03)
            axis = Axis(title, 0.0, axis.high, plain)
            text = f"{name} of {run.name} against epochs."
            charts.append(Chart(f"run-{len(charts)}", _heading(name), text, _epochs(drawn), axis, drawn))
    return tuple(charts)


def accuracy(record: Measurement) -> float:
    """Return its accuracy."""
    return record.accuracy


def loss(record: Measurement) -> float:
    """Return its loss."""
    return record.loss


_ROWS: tuple[tuple[str, str, Callable[[Measurement], float]], ...] = (
    ("test accuracy, %", "test", accuracy),
    ("train accuracy, %", "train", accuracy),
    ("test loss", "test", loss),
    ("train loss", "train", loss),
)
_RATES: tuple[tuple[str, str, Callable[[TrainRecord], float]], ...] = (
    ("learning rate", "learning rate", lambda record: record.learning_rate),
    ("noise amplitude", "amplitude", lambda record: record.noise_amplitude),
    ("gradient norm", "norm", lambda record: record.gradient_norm),
    ("speed", "images/s", lambda record: record.samples_per_second),
)


def curve_records(run: StoredRun, split: str) -> tuple[Measurement, ...]:
    """Return what is drawn of a split: its evaluations; without any of the training split, its updates."""
    evaluated = run.split(split)
    return evaluated if evaluated or split == "test" else run.train


def _mean_curve(variant: Variant, split: str, take: Callable[[Measurement], float]) -> tuple[Point, ...]:
    values: dict[int, list[tuple[float, float]]] = {}
    for run in variant.counted:
        for record in curve_records(run, split):
            if math.isfinite(take(record)):
                values.setdefault(record.step, []).append((record.epoch, take(record)))
    points = []
    for _, measured in sorted(values.items()):
        found = summary([value for _, value in measured])
        assert found is not None
        spread = found.deviation
        points.append(
            Point(
                x=measured[0][0],
                y=found.mean,
                text=_told(take, found.mean, spread, found.count),
                low=None if spread is None else found.mean - spread,
                high=None if spread is None else found.mean + spread,
            )
        )
    every = math.ceil(len(points) / _MOST_POINTS)
    # the last one always stands: it is the result
    return tuple(points[::-every][::-1]) if every > 1 else tuple(points)


def _plain_curve(records: Sequence[EvaluationRecord], take: Callable[[Measurement], float]) -> tuple[Point, ...]:
    return tuple(Point(record.epoch, take(record), _told(take, take(record), None, None)) for record in records)


def _thinned(records: Sequence[TrainRecord], take: Callable[[TrainRecord], float]) -> tuple[Point, ...]:
    """Return the records, or means over equal chunks of them where they are many."""
    finite = [record for record in records if math.isfinite(take(record))]
    size = max(1, math.ceil(len(finite) / _MOST_POINTS))
    points = []
    for _, chunk in groupby(enumerate(finite), key=lambda item: item[0] // size):
        chosen = [record for _, record in chunk]
        value = math.fsum(map(take, chosen)) / len(chosen)
        is_accuracy = take is accuracy
        points.append(Point(chosen[-1].epoch, value, f"{value * 100:.2f} %" if is_accuracy else three_digits(value)))
    return tuple(points)


def _told(take: Callable[[Measurement], float], mean: float, deviation: float | None, count: int | None) -> str:
    if take is accuracy:
        text = f"{mean * 100:.2f}" + (f" ± {deviation * 100:.2f}" if deviation is not None else "") + " %"
    else:
        text = f"{mean:.4f}" + (f" ± {deviation:.4f}" if deviation is not None else "")
    return f"{text} (n = {count})" if count is not None else text


def _axis(name: str, take: Callable[[Measurement], float], curves: Sequence[Sequence[Point]]) -> Axis:
    if take is not accuracy:
        return loss_axis(name, [point.y for points in curves for point in points], plain)
    settled = [value for points in curves for value in _settled(points)]
    axis = linear_axis(name, settled, percent_tick, margin=0.06)
    return Axis(name, max(0.0, axis.low), min(1.0, axis.high) if max(settled) > 0.97 else axis.high, percent_tick)


def _settled(points: Sequence[Point]) -> Iterator[float]:
    begins = points[0].x + _SETTLED * (points[-1].x - points[0].x)
    for point in points:
        if point.x >= begins:
            yield point.y if point.low is None else point.low
            yield point.y if point.high is None else point.high


def _curve_chart(
    key: str, panel: Panel, name: str, axis: Axis, curves: Sequence[tuple[Variant, tuple[Point, ...]]]
) -> Chart:
    series = tuple(Series(variant.label, f"s{variant.colour}", points) for variant, points in curves)
    ends = "; ".join(f"{variant.label} {points[-1].text}" for variant, points in curves)
    description = f"{name} against epochs, {panel.title}. At the end: {ends}."
    return Chart(key, panel.title, description, _epochs(series), axis, series)


def _epochs(series: Sequence[Series]) -> Axis:
    last = max(point.x for item in series for point in item.points)
    return Axis("epoch", 0.0, last or 1.0, plain)


def _heading(name: str) -> str:
    words = name.removesuffix(", %")
    return words[0].upper() + words[1:]
