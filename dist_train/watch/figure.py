"""Charts as data, and a run's learning curves; drawn by `watch/view.py`, `report/chart.py` and `report/drawing.py`."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from statistics import fmean, median
from typing import Any, Literal

from dist_train.rundir.records import EvaluationRecord, Record, TrainRecord

_LOG_RANGE = 25.0
_BLOW_UP = 1e3  # loss above which a few values do not extend the axis
_SETTLED = 0.35  # fraction of a curve, at its start, that may lie outside the frame so that its end is readable
_FEW_POINTS = 12  # a curve of at most as many lies within the frame: of a short run each point counts


@dataclass(frozen=True)
class Axis:
    """A linear or logarithmic axis from `low` to `high`; `write` formats a tick."""

    title: str
    low: float
    high: float
    write: Callable[[float], str]
    is_logarithmic: bool = False

    def drawn(self, value: float) -> float:
        """Return `value`; on a logarithmic axis, which has no 0, at least what lies three decades below its end."""
        return max(value, self.low / 1e3) if self.is_logarithmic else value

    def share(self, value: float) -> float:
        """Return the position of `value`: 0 at `low`, 1 at `high`, beyond them for values outside."""
        if self.is_logarithmic:
            return math.log(self.drawn(value) / self.low) / math.log(self.high / self.low)
        return (value - self.low) / (self.high - self.low)


@dataclass(frozen=True)
class Point:
    """A value with the ends of its band; `text` is its tooltip, `step` the last update that it is of, if of updates."""

    x: float
    y: float
    text: str = ""
    band: tuple[float, float] | None = None
    step: int | None = None


@dataclass(frozen=True)
class Series:
    """Points drawn as one curve or set of marks; renderers map each `style` to a colour."""

    label: str
    style: str
    points: tuple[Point, ...]
    form: Literal["line", "dashed", "faint", "dots", "squares"] = "line"
    axis: Literal["left", "right"] = "left"


@dataclass(frozen=True)
class Chart:
    """A panel of a figure; `key` is unique on the page."""

    key: str
    title: str
    description: str
    x: Axis
    left: Axis
    series: tuple[Series, ...]
    right: Axis | None = None
    letter: str = ""
    note: str = ""
    upright: float | None = None  # position of a vertical line, for instance at the solution

    @property
    def is_scatter(self) -> bool:
        """Whether it shows single points rather than curves."""
        return any(series.form in ("dots", "squares") for series in self.series)


def linear_axis(title: str, values: Iterable[float], write: Callable[[float], str], *, margin: float = 0.05) -> Axis:
    """Return an axis that holds all finite `values`, with `margin` as a fraction of their range at both ends."""
    finite = [value for value in values if math.isfinite(value)] or [0.0, 1.0]
    low, high = min(finite), max(finite)
    if high - low < 1e-9 * max(1.0, abs(high)):
        half = abs(high) * 0.05 or 0.5
        low, high = low - half, high + half
    rim = (high - low) * margin
    return Axis(title, low - rim, high + rim, write)


def loss_axis(title: str, values: Iterable[float]) -> Axis:
    """Return an axis from 0, or a logarithmic axis if a linear one would hide the small values.

    It begins below 0 if some values do, as a plug-in's loss may.
    """
    finite = [value for value in values if math.isfinite(value)]
    if min(finite, default=0.0) < 0:
        return linear_axis(title, finite, plain)
    positive = [value for value in finite if value > 0]
    if not positive:
        return Axis(title, 0.0, 1.0, plain)
    least, most = min(positive), max(positive)
    if median(positive) < _BLOW_UP:  # a blow-up in a few updates must not hide the curve
        most = min(most, _BLOW_UP)
    if most / least > _LOG_RANGE:
        # A few values near 0 must not take the whole height.
        return Axis(title, max(least, most / 1e5) / 1.3, most * 1.3, plain, is_logarithmic=True)
    return Axis(title, 0.0, most * 1.06, plain)


def plain(value: float) -> str:
    """Return a tick without superfluous digits."""
    return f"{value:,.10g}" if abs(value) >= 1000 else f"{value:.6g}".replace("-", "\u2212")


def percent_tick(value: float) -> str:
    """Return a fraction in [0, 1] as a percentage."""
    return f"{value * 100:.6g}"


def three_digits(value: float) -> str:
    """Return `value` with at least three digits, in scientific notation if very small or large."""
    if value and not 1e-3 <= abs(value) < 1e6:
        return f"{value:.2e}"
    return f"{value:,.{max(0, 2 - math.floor(math.log10(abs(value))))}f}" if value else "0"


def _accuracy_axis(title: str, curves: Sequence[Sequence[Point]]) -> Axis:
    settled = [
        value
        for points in curves
        for point in points
        if len(points) <= _FEW_POINTS or point.x >= points[0].x + _SETTLED * (points[-1].x - points[0].x)
        if math.isfinite(point.y)
        for value in point.band or (point.y,)
    ]
    axis = linear_axis(title, settled, percent_tick, margin=0.06)
    high = min(1.0, axis.high) if max(settled, default=1.0) > 0.97 else axis.high
    return Axis(title, max(0.0, axis.low), high, percent_tick)


def _loss_axis(title: str, curves: Sequence[Sequence[Point]]) -> Axis:
    return loss_axis(title, [point.y for points in curves for point in points])


def _rate_axis(title: str, curves: Sequence[Sequence[Point]]) -> Axis:
    axis = linear_axis(title, [0.0, *(point.y for points in curves for point in points)], plain, margin=0.03)
    return Axis(title, 0.0, axis.high, plain)


@dataclass(frozen=True)
class Quantity:
    """A field of records, to be drawn against epochs; shown times `factor`, in `unit`."""

    name: str
    title: str  # the axis title
    take: Callable[[Any], float]
    write: Callable[[float], str]
    axis: Callable[[str, Sequence[Sequence[Point]]], Axis] = _rate_axis
    factor: float = 1.0
    unit: str = ""

    def text(self, value: float, spread: float | None = None) -> str:
        """Return `value`, with its spread if given, as text."""
        numbers = [self.write(number * self.factor) for number in (value, spread) if number is not None]
        return f"{' ± '.join(numbers)} {self.unit}".rstrip()


ACCURACY = Quantity("accuracy", "accuracy, %", lambda it: it.accuracy, "{:.2f}".format, _accuracy_axis, 100.0, "%")
LOSS = Quantity("loss", "loss", lambda it: it.loss, "{:.4f}".format, _loss_axis)
LEARNING_RATE = Quantity("learning rate", "learning rate", lambda it: it.learning_rate, three_digits)
NOISE = Quantity("noise amplitude", "amplitude", lambda it: it.noise_amplitude, three_digits)
RATES = (
    LEARNING_RATE,
    NOISE,
    Quantity("gradient norm", "norm", lambda it: it.gradient_norm, three_digits),
    Quantity("speed", "images/s", lambda it: it.samples_per_second, three_digits),
)
BATCH = "batch"  # style of the series measured at each update; an evaluation's style is the name of its split


_FURTHER_SPLITS = ("validation", "train-averaged", "validation-averaged", "test-averaged")


@dataclass(frozen=True)
class Measured:
    """A run's measurements, evaluations by split."""

    name: str
    train: Sequence[TrainRecord]
    evaluations: Mapping[str, Sequence[EvaluationRecord]]


def measured_of(name: str, records: Iterable[Record]) -> Measured:
    """Return the measurements among `records`; the splits train and test come first."""
    records = tuple(records)
    train = [record for record in records if isinstance(record, TrainRecord)]
    tests = [record for record in records if isinstance(record, EvaluationRecord)]
    found = {record.split for record in tests}
    names = ("train", "test", *(split for split in _FURTHER_SPLITS if split in found))
    splits = {split: [record for record in tests if record.split == split] for split in names}
    return Measured(name, train, splits)


def learning_curve(quantity: Quantity, measured: Measured, most: int) -> Chart | None:
    """Return loss or accuracy at each update and on each split, at most `most` points each; None if there are none."""
    batches = Series("train, each batch", BATCH, _thinned(measured.train, quantity, most), "faint")
    splits = (
        Series(split, split, _thinned(records, quantity, most)) for split, records in measured.evaluations.items()
    )
    drawn = tuple(series for series in (batches, *splits) if series.points)
    return _chart(quantity, measured, drawn, f", {len(drawn)} curves") if drawn else None


def rate_curve(quantity: Quantity, measured: Measured, most: int) -> Chart | None:
    """Return one of RATES at each update; None if it is 0 throughout."""
    points = _thinned(measured.train, quantity, most)
    drawn = (Series(quantity.name, "s0", points),)
    return _chart(quantity, measured, drawn) if any(point.y > 0 for point in points) else None


def _chart(quantity: Quantity, measured: Measured, drawn: tuple[Series, ...], count: str = "") -> Chart:
    return Chart(
        f"run-{quantity.name.replace(' ', '-')}",
        quantity.name[0].upper() + quantity.name[1:],
        f"{quantity.title if count else quantity.name} of {measured.name} against epochs{count}.",
        epochs_axis(drawn),
        quantity.axis(quantity.title, [series.points for series in drawn]),
        drawn,
    )


def epochs_axis(drawn: Iterable[Series]) -> Axis:
    """Return an axis from the start of training to just beyond the last point of all series, whose mark is whole."""
    last = max((point.x for series in drawn for point in series.points), default=0.0)
    return Axis("epoch", 0.0, 1.02 * last or 1.0, plain)


def _thinned(records: Sequence[TrainRecord | EvaluationRecord], quantity: Quantity, most: int) -> tuple[Point, ...]:
    """Return the records as at most `most` points: means over equal chunks, NaN if a value is not finite."""
    size = max(1, math.ceil(len(records) / most))
    points = []
    for at in range(0, len(records), size):
        chunk = records[at : at + size]
        value = fmean(quantity.take(record) for record in chunk)
        step = chunk[-1].step if isinstance(chunk[-1], TrainRecord) else None
        points.append(Point(fmean(record.epoch for record in chunk), value, quantity.text(value), step=step))
    return tuple(points)
