"""Loss and accuracy of a run as curves made of characters."""

from __future__ import annotations

import math
import re
from collections.abc import Callable, Sequence
from dataclasses import dataclass

from rich.console import Group
from rich.text import Text
from uniplot import plot_to_string

from dist_train.rundir.records import EvaluationRecord
from dist_train.watch.history import History, Point

LEAST_HEIGHT = 7
_FRAME = 4
"""Lines that are not the curves themselves: heading, border, labels below."""
_LOG_RANGE = 15.0
_SMOOTHED_TO = 60
"""Batches are averaged so that a curve shows about so many independent values."""
_COLOURS = {"batch": "cyan", "train": "yellow", "test": "magenta"}


@dataclass(frozen=True)
class _Curve:
    name: str
    across: tuple[float, ...]
    up: tuple[float, ...]
    latest: float


def draw_loss(history: History, columns: int, rows: int) -> Group:
    """Return the losses, on a logarithmic axis where they span a wide range."""
    curves = _curves(history, lambda it: it.loss)
    values = [value for curve in curves for value in curve.up if math.isfinite(value)]
    logarithmic = bool(values) and min(values) > 0 and max(values) / min(values) > _LOG_RANGE
    heading = _heading("loss", curves, lambda value: f"{value:.3g}")
    return Group(heading, _plot(curves, columns, rows, _across(history), logarithmic=logarithmic))


def draw_accuracy(history: History, columns: int, rows: int) -> Group:
    """Return the accuracies in percent."""
    curves = _curves(history, lambda it: it.accuracy * 100)
    heading = _heading("accuracy", curves, lambda value: f"{value:.1f} %")
    return Group(heading, _plot(curves, columns, rows, _across(history), unit="%"))


def _curves(history: History, take: Callable[[Point | EvaluationRecord], float]) -> list[_Curve]:
    per_epoch = history.steps_per_epoch or 1.0
    curves = []
    points = history.batches.points()
    if points:
        values = [take(point) for point in points]
        latest = history.latest[-1] if history.latest else points[-1]
        across = tuple(point.step / per_epoch for point in points)
        curves.append(_Curve("batch", across, _smooth(values), take(Point(0, latest.loss, latest.accuracy))))
    for split, records in history.evaluations.items():
        across = tuple(record.step / per_epoch for record in records)
        up = tuple(take(record) for record in records)
        curves.append(_Curve(split, across, up, up[-1]))
    return curves


def _smooth(values: Sequence[float]) -> tuple[float, ...]:
    """Return means over the latest values of each, over fewer at the beginning; not finite ones stay gaps."""
    window = math.ceil(len(values) / _SMOOTHED_TO)
    smooth = []
    total, kept = 0.0, 0
    for at, value in enumerate(values):
        if math.isfinite(value):
            total, kept = total + value, kept + 1
        gone = values[at - window] if at >= window else math.nan
        if math.isfinite(gone):
            total, kept = total - gone, kept - 1
        smooth.append(total / kept if math.isfinite(value) else math.nan)
    return tuple(smooth)


def _heading(what: str, curves: Sequence[_Curve], word: Callable[[float], str]) -> Text:
    heading = Text(no_wrap=True, overflow="ellipsis").append(what, style="bold")
    for curve in curves:
        value = word(curve.latest) if math.isfinite(curve.latest) else "not finite"
        heading.append("  ").append(f"{curve.name} {value}", style=_COLOURS.get(curve.name, "green"))
    return heading


def _across(history: History) -> str:
    return "epoch" if history.steps_per_epoch else "step"


def _plot(
    curves: Sequence[_Curve], columns: int, rows: int, across: str, *, unit: str = "", logarithmic: bool = False
) -> Text:
    """Return `curves` as at most `rows` - 1 lines of `columns`."""
    thinned = [_drawable(curve, 2 * columns) for curve in curves]
    shown = [curve for curve in thinned if any(map(math.isfinite, curve.up))]
    if not shown:
        return Text("nothing measured yet", style="dim")
    plot = plot_to_string(
        [curve.up for curve in shown],
        [curve.across for curve in shown],
        lines=[True] * len(shown),
        color=[_COLOURS.get(curve.name, "green") for curve in shown],
        character_set="braille",
        rounded_corners=True,
        width=columns,
        height=max(1, rows - _FRAME),
        line_length_hard_cap=columns,
        x_min=0.0,
        x_gridlines=[],
        y_gridlines=[],
        y_unit=unit,
        y_as_log=logarithmic,
    )
    *lines, labels = plot.split("\n")
    return Text.from_ansi("\n".join([*lines, _with_name(labels, across)]), no_wrap=True)


def _with_name(labels: str, name: str) -> str:
    """Return the labels below a plot with the axis' name in their widest gap."""
    gap = max(re.finditer(" +", labels), key=lambda match: len(match[0]), default=None)
    if gap is None or len(gap[0]) < len(name) + 2:
        return labels
    return labels[: gap.start()] + name.center(len(gap[0])) + labels[gap.end() :]


def _drawable(curve: _Curve, most: int) -> _Curve:
    """Return means over equal chunks: a line of `columns` shows two points a column."""
    size = math.ceil(len(curve.up) / most)
    if size <= 1:
        return curve
    chunks = range(0, len(curve.up), size)
    return _Curve(
        curve.name,
        tuple(_mean(curve.across[at : at + size]) for at in chunks),
        tuple(_mean(curve.up[at : at + size]) for at in chunks),
        curve.latest,
    )


def _mean(values: Sequence[float]) -> float:
    return sum(values) / len(values)
