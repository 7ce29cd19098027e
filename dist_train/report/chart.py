"""Charts as SVG: axes, lines with bands, scattered points."""

from __future__ import annotations

import json
import math
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass
from typing import Literal

from markupsafe import Markup

_LOG_RANGE = 25.0
_MOST_LINEAR = 12.0


@dataclass(frozen=True)
class Axis:
    """A linear or logarithmic axis from `low` to `high`; `write` gives a tick as text."""

    title: str
    low: float
    high: float
    write: Callable[[float], str]
    is_logarithmic: bool = False

    def share(self, value: float) -> float:
        """Return where `value` lies, 0 at the low end and 1 at the high one; beyond them for values outside."""
        if self.is_logarithmic:
            floor = self.low / 1e3
            return (math.log(max(value, floor)) - math.log(self.low)) / (math.log(self.high) - math.log(self.low))
        return (value - self.low) / (self.high - self.low)

    def ticks(self, most: int = 6) -> tuple[float, ...]:
        """Return round values on the axis, at most about `most`."""
        return _log_ticks(self.low, self.high, most) if self.is_logarithmic else _even_ticks(self.low, self.high, most)


def linear_axis(title: str, values: Iterable[float], write: Callable[[float], str], *, margin: float = 0.05) -> Axis:
    """Return an axis that holds all finite `values`, with a margin of this share at both ends."""
    low, high = _ends(values)
    room = (high - low) * margin
    return Axis(title, low - room, high + room, write)


def loss_axis(title: str, values: Sequence[float], write: Callable[[float], str]) -> Axis:
    """Return an axis from 0, or a logarithmic one where a linear one would hide the small values."""
    positive = [value for value in values if math.isfinite(value) and value > 0]
    if not positive:
        return Axis(title, 0.0, 1.0, write)
    if max(positive) / min(positive) > _LOG_RANGE:
        # a few values near 0 must not take the whole height
        low = max(min(positive), max(positive) / 1e5)
        return Axis(title, low / 1.3, max(positive) * 1.3, write, is_logarithmic=True)
    return Axis(title, 0.0, max(positive) * 1.06, write)


def height_axis(title: str, values: Iterable[float], write: Callable[[float], str]) -> Axis:
    """Return an axis from 0 as in the paper; a logarithmic one where the loss grows beyond all measure."""
    finite = [value for value in values if math.isfinite(value)]
    if max(finite, default=0.0) > _MOST_LINEAR:
        return loss_axis(title, finite, write)
    return Axis(title, 0.0, max(finite, default=0.0) * 1.03 or 1.0, write)


def span_axis(title: str, values: Iterable[float], write: Callable[[float], str]) -> Axis:
    """Return an axis for what is walked along: it begins and ends with the values."""
    low, high = _ends(values)
    return Axis(title, low, high, write)


def plain(value: float) -> str:
    """Return a tick without superfluous digits."""
    return f"{value:,.10g}" if abs(value) >= 1000 else f"{value:.6g}".replace("-", "\u2212")


def percent_tick(value: float) -> str:
    """Return a share in [0, 1] as a percentage."""
    return f"{value * 100:.6g}"


def _ends(values: Iterable[float]) -> tuple[float, float]:
    finite = [value for value in values if math.isfinite(value)]
    low, high = (min(finite), max(finite)) if finite else (0.0, 1.0)
    if high - low < 1e-9 * max(1.0, abs(high)):
        room = abs(high) * 0.05 or 0.5
        return low - room, high + room
    return low, high


def _even_ticks(low: float, high: float, most: int) -> tuple[float, ...]:
    rough = (high - low) / most
    power = 10.0 ** math.floor(math.log10(rough))
    step = next(factor * power for factor in (1, 2, 5, 10) if factor * power >= rough * 0.999)
    first, last = math.ceil(low / step - 1e-9), math.floor(high / step + 1e-9)
    return tuple(round(index * step, 12) for index in range(first, last + 1))


def _log_ticks(low: float, high: float, most: int) -> tuple[float, ...]:
    powers = range(math.floor(math.log10(low)), math.ceil(math.log10(high)) + 1)
    for factors in ((1, 2, 5), (1, 3), (1,)):
        ticks = [factor * 10.0**power for power in powers for factor in factors]
        inside = tuple(tick for tick in ticks if low <= tick <= high)
        if len(inside) <= most + 1:
            return inside
    return inside[:: math.ceil(len(inside) / most)]


WIDTH, HEIGHT = 400, 272
_TOP, _BOTTOM, _LEFT, _RIGHT_BARE, _RIGHT_AXIS = 26, 40, 46, 14, 42
_MOST_MARKS = 24


@dataclass(frozen=True)
class Point:
    """A value with its band; `text` is what a reader who points at it sees."""

    x: float
    y: float
    text: str
    low: float | None = None
    high: float | None = None


@dataclass(frozen=True)
class Series:
    """Points drawn as one; `style` is a class of the style sheet, for colour and for switching on and off."""

    label: str
    style: str
    points: tuple[Point, ...]
    form: Literal["line", "dashed", "faint", "dots", "squares"] = "line"
    axis: Literal["left", "right"] = "left"


@dataclass(frozen=True)
class Chart:
    """A figure's panel. `key` is unique on the page; `write_x` of the axis gives the place as readers see it."""

    key: str
    title: str
    description: str
    x: Axis
    left: Axis
    series: tuple[Series, ...]
    right: Axis | None = None
    letter: str = ""
    note: str = ""
    upright: float | None = None
    """Where a vertical line stands, such as at the solution."""

    @property
    def is_scatter(self) -> bool:
        """Whether a reader points at single points rather than at a place along x."""
        return any(series.form in ("dots", "squares") for series in self.series)

    def svg(self) -> Markup:
        """Return the drawing."""
        return Markup("").join(_draw(self))


@dataclass(frozen=True)
class _Frame:
    left: float
    right: float
    top: float = _TOP
    bottom: float = HEIGHT - _BOTTOM

    def x(self, axis: Axis, value: float) -> float:
        return self.left + axis.share(value) * (self.right - self.left)

    def y(self, axis: Axis, value: float) -> float:
        # far outside is cut off by the frame; the number need not grow with it
        share = min(3.0, max(-3.0, axis.share(value)))
        return self.bottom - share * (self.bottom - self.top)


def _draw(chart: Chart) -> Iterator[Markup]:
    frame = _Frame(_LEFT, WIDTH - (_RIGHT_AXIS if chart.right else _RIGHT_BARE))
    kind = "scatter" if chart.is_scatter else "lines"
    yield Markup(
        '<svg viewBox="0 0 {} {}" role="img" tabindex="0" aria-labelledby="{}-title {}-text" data-kind="{}" '
        'data-frame="{:g} {:g} {:g} {:g}" data-x="{}">'
    ).format(WIDTH, HEIGHT, chart.key, chart.key, kind, frame.left, frame.top, frame.right, frame.bottom, chart.x.title)
    yield Markup('<title id="{}-title">{}</title><desc id="{}-text">{}</desc>').format(
        chart.key, chart.title, chart.key, chart.description
    )
    yield Markup('<clipPath id="{}-clip"><rect x="{:g}" y="{:g}" width="{:g}" height="{:g}"/></clipPath>').format(
        chart.key, frame.left - 1, frame.top - 1, frame.right - frame.left + 2, frame.bottom - frame.top + 2
    )
    yield from _axes(chart, frame)
    yield Markup('<g clip-path="url(#{}-clip)">').format(chart.key)
    for series in chart.series:
        axis = chart.right if series.axis == "right" and chart.right else chart.left
        yield _series(series, chart.x, axis, frame)
    yield Markup('</g><line class="cross" y1="{:g}" y2="{:g}"/></svg>').format(frame.top, frame.bottom)


def _axes(chart: Chart, frame: _Frame) -> Iterator[Markup]:
    yield Markup('<g class="axes">')
    for tick in chart.left.ticks():
        y = frame.y(chart.left, tick)
        yield Markup('<line class="grid" x1="{:g}" x2="{:g}" y1="{:.1f}" y2="{:.1f}"/>').format(
            frame.left, frame.right, y, y
        )
        yield _text(frame.left - 6, y + 4, chart.left.write(tick), "end", "left")
    for tick in chart.x.ticks():
        x = frame.x(chart.x, tick)
        yield Markup('<line class="tick" x1="{:.1f}" x2="{:.1f}" y1="{:g}" y2="{:g}"/>').format(
            x, x, frame.bottom, frame.bottom + 4
        )
        yield _text(x, frame.bottom + 16, chart.x.write(tick), "middle")
    if chart.right:
        for tick in chart.right.ticks():
            yield _text(frame.right + 6, frame.y(chart.right, tick) + 4, chart.right.write(tick), "start", "right")
        yield _text(WIDTH - 2, 14, chart.right.title, "end", "name right")
    if chart.upright is not None:
        x = frame.x(chart.x, chart.upright)
        yield Markup('<line class="upright" x1="{:.1f}" x2="{:.1f}" y1="{:g}" y2="{:g}"/>').format(
            x, x, frame.top, frame.bottom
        )
    yield Markup('<line class="base" x1="{:g}" x2="{:g}" y1="{:g}" y2="{:g}"/>').format(
        frame.left, frame.right, frame.bottom, frame.bottom
    )
    yield _text(2, 14, chart.left.title, "start", "name left")
    yield _text((frame.left + frame.right) / 2, HEIGHT - 6, chart.x.title, "middle", "name")
    yield Markup("</g>")


def _text(x: float, y: float, text: str, anchor: str, style: str = "") -> Markup:
    return Markup('<text x="{:.1f}" y="{:.1f}" text-anchor="{}" class="{}">{}</text>').format(x, y, anchor, style, text)


def _series(series: Series, x_axis: Axis, y_axis: Axis, frame: _Frame) -> Markup:
    points = [point for point in series.points if math.isfinite(point.x) and math.isfinite(point.y)]
    places = [(frame.x(x_axis, point.x), frame.y(y_axis, point.y)) for point in points]
    told = [
        [round(x, 1), round(y, 1), point.text, round(point.x, 4)] for (x, y), point in zip(places, points, strict=True)
    ]
    inner = [*_band(points, x_axis, y_axis, frame)]
    if series.form in ("dots", "squares"):
        inner += [_mark(x, y, series.form, point.text) for (x, y), point in zip(places, points, strict=True)]
    else:
        inner.append(Markup('<path class="line" d="{}"/>').format(_path(places)))
        if series.form == "line" and len(places) <= _MOST_MARKS:
            inner += [_mark(x, y, "small", "") for x, y in places]
    return Markup('<g class="series {} {}" data-label="{}" data-points="{}">{}</g>').format(
        series.style,
        series.form,
        series.label,
        json.dumps(told, ensure_ascii=False, separators=(",", ":")),
        Markup("").join(inner),
    )


def _band(points: Sequence[Point], x_axis: Axis, y_axis: Axis, frame: _Frame) -> Iterator[Markup]:
    banded = [point for point in points if point.low is not None and point.high is not None]
    if len(banded) < 2:
        return
    upper = [(frame.x(x_axis, point.x), frame.y(y_axis, point.high or 0.0)) for point in banded]
    lower = [(frame.x(x_axis, point.x), frame.y(y_axis, point.low or 0.0)) for point in reversed(banded)]
    yield Markup('<path class="band" d="{}Z"/>').format(_path([*upper, *lower]))


def _path(places: Sequence[tuple[float, float]]) -> str:
    return "M" + "L".join(f"{x:.1f} {y:.1f}" for x, y in places) if places else ""


def _mark(x: float, y: float, form: str, text: str) -> Markup:
    title = Markup("<title>{}</title>").format(text) if text else ""
    if form == "squares":
        return Markup('<rect class="mark" x="{:.1f}" y="{:.1f}" width="8.4" height="8.4">{}</rect>').format(
            x - 4.2, y - 4.2, title
        )
    radius = 1.8 if form == "small" else 4.8
    return Markup('<circle class="mark" cx="{:.1f}" cy="{:.1f}" r="{:g}">{}</circle>').format(x, y, radius, title)
