"""The style of charts (colours, dashes, marks) and the coordinates of their lines, bands, marks and ticks.

The page and the figure files share the colours, which colour-blind readers can tell apart. `charts.jinja` writes the
coordinates as SVG. We do not use matplotlib's SVG on the page: eight charts of a study take 238 kB instead of 105 kB
and 0.7 s instead of 0.03 s, and its colours are style attributes, which neither follow dark mode nor pass the page's
content security policy.
"""

from __future__ import annotations

import json
import math
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass

from dist_train.watch.figure import Axis, Chart, Series

LIGHT = ("#1d2126", "#0a12e6", "#de6822", "#0d997b", "#d962d9", "#5c3405")
DARK = ("#f0f1f2", "#4e55ff", "#cc2e29", "#64ef8c", "#ae4985", "#eac327")
"""Series colours on a light and on a dark background; the first is the baseline's.

A search maximized the smallest distance between any two, for normal and for each kind of colour-blind vision.
"""

_DASHES: Sequence[tuple[float, ...]] = ((), (7, 3), (2, 3), (9, 3, 2, 3))
_FILLS = (1.0, 0.0, 0.4)


@dataclass(frozen=True)
class SeriesStyle:
    """The look of a series. `colour` indexes LIGHT and DARK; `dashes` are stroke and gap lengths, () is solid."""

    colour: int
    dashes: tuple[float, ...] = ()
    fill: float = 1.0  # how much of the colour marks have within their outline; 0: none


ROLES: Mapping[str, SeriesStyle] = {
    "train": SeriesStyle(1),
    "validation": SeriesStyle(4),
    "test": SeriesStyle(2),
    "train-averaged": SeriesStyle(1, _DASHES[1]),
    "validation-averaged": SeriesStyle(4, _DASHES[1]),
    "test-averaged": SeriesStyle(2, _DASHES[1]),
    "batch": SeriesStyle(3),
    "loss": SeriesStyle(1),
    "accuracy": SeriesStyle(2),
}
"""Styles of series that are not variants. A landscape's series has two, such as loss and train; CSS uses the last."""


def style_of(style: str) -> SeriesStyle:
    """Return the look of a series style: s0 is the baseline; s6 has the colour of s1, dashed and hollow, and so on."""
    role = style.split()[0]
    if role in ROLES:
        return ROLES[role]
    turn, place = divmod(int(role[1:]) - 1, len(LIGHT) - 1) if role != "s0" else (0, -1)
    return SeriesStyle(place + 1, _DASHES[turn % len(_DASHES)], _FILLS[turn % len(_FILLS)])


def style_rules(styles: Iterable[str]) -> Iterator[str]:
    """Yield the CSS rules that define the colour variables and the looks of `styles`."""
    light, dark = (";".join(f"--c{at}:{colour}" for at, colour in enumerate(colours)) for colours in (LIGHT, DARK))
    yield f":root{{{light}}}"
    yield f"@media screen and (prefers-color-scheme:dark){{:root{{{dark}}}}}"
    for style in styles:
        look = style_of(style)
        dashes = f";--dash:{' '.join(f'{each:g}' for each in look.dashes)};--stroke:dashed" if look.dashes else ""
        mix = f"color-mix(in srgb,var(--c{look.colour}) {look.fill:.0%},var(--paper))"
        fill = f";--fill:{mix}" if look.fill < 1.0 else ""
        yield f".{style}{{--c:var(--c{look.colour}){dashes}{fill}}}"


WIDTH = 400
_MOST_MARKS = 24


def ticks(axis: Axis, most: int = 6) -> tuple[float, ...]:
    """Return at most about `most` round values on `axis`."""
    if axis.is_logarithmic and len(found := _powers(axis, most)) > 1:
        return found
    rough = (axis.high - axis.low) / most
    power = 10.0 ** math.floor(math.log10(rough))
    step = next(factor * power for factor in (1, 2, 5, 10) if factor * power >= rough * 0.98)
    first, last = math.ceil(axis.low / step - 1e-9), math.floor(axis.high / step + 1e-9)
    return tuple(round(index * step, 12) for index in range(first, last + 1))


def _powers(axis: Axis, most: int) -> tuple[float, ...]:
    """Return powers of ten on `axis`, with multiples where there is room; a short axis may hold none."""
    powers = range(math.floor(math.log10(axis.low)), math.ceil(math.log10(axis.high)) + 1)
    for factors in ((1, 2, 5), (1, 3), (1,)):
        found = [factor * 10.0**power for power in powers for factor in factors]
        inside = tuple(tick for tick in found if axis.low <= tick <= axis.high)
        if len(inside) <= most + 1:
            return inside
    return inside[:: math.ceil(len(inside) / most)]


@dataclass(frozen=True)
class Drawn:
    """A series in SVG coordinates: paths of line and band, marks with tooltips, `points` as JSON for script.js."""

    series: Series
    line: str
    band: str
    marks: tuple[tuple[float, float, str], ...]
    points: str


@dataclass(frozen=True)
class Frame:
    """The plot area of `chart` within its SVG."""

    width, height, left, top, bottom = WIDTH, 272, 46, 26, 232
    chart: Chart

    @property
    def right(self) -> int:
        """The right edge, further left if there is a right axis."""
        return self.width - (42 if self.chart.right else 14)

    @property
    def x_ticks(self) -> tuple[float, ...]:
        """The ticks of the horizontal axis; the labels of a logarithmic one, unevenly spaced, need more room."""
        return ticks(self.chart.x, 3 if self.chart.x.is_logarithmic else 6)

    def x(self, value: float) -> float:
        """Return the horizontal SVG coordinate of `value`."""
        return self.left + self.chart.x.share(value) * (self.right - self.left)

    def y(self, axis: Axis, value: float) -> float:
        """Return the vertical SVG coordinate of `value` on `axis`, limited to three frame heights."""
        return self.bottom - min(3.0, max(-3.0, axis.share(value))) * (self.bottom - self.top)

    def drawn(self) -> Iterator[Drawn]:
        """Yield each series in SVG coordinates."""
        for series in self.chart.series:
            axis = self.chart.right if series.axis == "right" and self.chart.right else self.chart.left
            points = [point for point in series.points if math.isfinite(point.x) and math.isfinite(point.y)]
            marks = [(round(self.x(point.x), 1), round(self.y(axis, point.y), 1), point.text) for point in points]
            band = [(self.x(point.x), *(self.y(axis, end) for end in point.band)) for point in points if point.band]
            outline = [(x, high) for x, _, high in band] + [(x, low) for x, low, _ in reversed(band)]
            is_marked = self.chart.is_scatter or (series.form == "line" and len(marks) <= _MOST_MARKS)
            values = [
                [*mark, round(point.x, 4), *([] if point.step is None else [point.step])]
                for mark, point in zip(marks, points, strict=True)
            ]
            yield Drawn(
                series,
                "" if self.chart.is_scatter else _path([(x, y) for x, y, _ in marks]),
                f"{_path(outline)}Z" if len(band) > 1 else "",
                tuple(marks) if is_marked else (),
                json.dumps(values, ensure_ascii=False, separators=(",", ":")),
            )


def _path(places: Sequence[tuple[float, float]]) -> str:
    return "M" + "L".join(f"{x:.1f} {y:.1f}" for x, y in places) if places else ""
