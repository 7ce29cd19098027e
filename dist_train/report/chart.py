"""How charts look: the colours, dashes and marks of series, and where lines, bands, marks and ticks lie on the page.

Colours are the same on the page and in files, also for colour-blind readers. `charts.jinja` writes the places as SVG.
matplotlib's SVG was measured against this: eight charts of a study take 238 kB in place of 105 kB and 0.7 s in place of
0.03 s, and its colours are style attributes, which neither follow dark mode nor pass the page's security policy.
"""

from __future__ import annotations

import json
import math
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass

from dist_train.watch.figure import Axis, Chart, Series

LIGHT = ("#1d2126", "#0a12e6", "#de6822", "#0d997b", "#d962d9", "#5c3405")
DARK = ("#f0f1f2", "#4e55ff", "#cc2e29", "#64ef8c", "#ae4985", "#eac327")
"""By number, on a light and on a dark ground: the base line's, then those of the other variants.

Found by a search for the largest least distance between any two, for normal and for each kind of colour-blind vision.
"""

_DASHES = ("", "7 3", "2 3", "9 3 2 3")


@dataclass(frozen=True)
class Look:
    """`colour` is a number in LIGHT and DARK; `dashes` are lengths of strokes and gaps, none for a whole line."""

    colour: int
    dashes: tuple[float, ...] = ()
    is_hollow: bool = False
    """Whether marks are outlines."""


_AVERAGED = (7.0, 3.0)
ROLES: Mapping[str, Look] = {
    "train": Look(1),
    "validation": Look(4),
    "test": Look(2),
    "train-averaged": Look(1, _AVERAGED),
    "validation-averaged": Look(4, _AVERAGED),
    "test-averaged": Look(2, _AVERAGED),
    "batch": Look(3),
    "loss": Look(1),
    "accuracy": Look(2),
}
"""Series that are not variants'. One of a landscape has two, such as loss and train: of those the last one counts."""


def look_of(style: str) -> Look:
    """Return how a series of `style` is drawn: s0 is the base line, beyond the colours s6 has that of s1, dashed."""
    role = style.split()[0]
    if role in ROLES:
        return ROLES[role]
    turn, place = divmod(int(role[1:]) - 1, len(LIGHT) - 1) if role != "s0" else (0, -1)
    dashes = _DASHES[turn % len(_DASHES)]
    return Look(place + 1, tuple(map(float, dashes.split())), turn % 2 == 1)


def style_rules(styles: Iterable[str]) -> Iterator[str]:
    """Yield the rules of CSS that give the colours their names, and `styles` their looks."""
    light, dark = (";".join(f"--c{at}:{colour}" for at, colour in enumerate(colours)) for colours in (LIGHT, DARK))
    yield f":root{{{light}}}"
    yield f"@media screen and (prefers-color-scheme:dark){{:root{{{dark}}}}}"
    for style in styles:
        look = look_of(style)
        dashes = f";--dash:{' '.join(f'{each:g}' for each in look.dashes)};--stroke:dashed" if look.dashes else ""
        yield f".{style}{{--c:var(--c{look.colour}){dashes}{';--fill:var(--paper)' if look.is_hollow else ''}}}"


WIDTH, HEIGHT = 400, 272
_TOP, _BOTTOM, _LEFT, _RIGHT_BARE, _RIGHT_AXIS = 26, 40, 46, 14, 42
_MOST_MARKS = 24


def ticks(axis: Axis, most: int = 6) -> tuple[float, ...]:
    """Return round values on `axis`, at most about `most`."""
    if not axis.is_logarithmic:
        rough = (axis.high - axis.low) / most
        power = 10.0 ** math.floor(math.log10(rough))
        step = next(factor * power for factor in (1, 2, 5, 10) if factor * power >= rough * 0.999)
        first, last = math.ceil(axis.low / step - 1e-9), math.floor(axis.high / step + 1e-9)
        return tuple(round(index * step, 12) for index in range(first, last + 1))
    powers = range(math.floor(math.log10(axis.low)), math.ceil(math.log10(axis.high)) + 1)
    for factors in ((1, 2, 5), (1, 3), (1,)):
        found = [factor * 10.0**power for power in powers for factor in factors]
        inside = tuple(tick for tick in found if axis.low <= tick <= axis.high)
        if len(inside) <= most + 1:
            return inside
    return inside[:: math.ceil(len(inside) / most)]


@dataclass(frozen=True)
class Drawn:
    """A series at its place: paths of its line and its band, and its marks with their words.

    `points` is JSON for a reader who points at the chart: place, words and x of each.
    """

    series: Series
    line: str
    band: str
    marks: tuple[tuple[float, float, str], ...]
    points: str


@dataclass(frozen=True)
class Frame:
    """The rectangle of `chart` that curves lie in, within the drawing."""

    chart: Chart
    left: int
    right: int
    top: int = _TOP
    bottom: int = HEIGHT - _BOTTOM
    width: int = WIDTH
    height: int = HEIGHT

    @classmethod
    def of(cls, chart: Chart) -> Frame:
        """Return the frame of `chart`; a second upright axis takes room at the right."""
        return cls(chart, _LEFT, WIDTH - (_RIGHT_AXIS if chart.right else _RIGHT_BARE))

    @property
    def is_scatter(self) -> bool:
        """Whether a reader points at single points rather than at a place along x."""
        return any(series.form in ("dots", "squares") for series in self.chart.series)

    def x(self, value: float) -> float:
        """Return the place of `value` on the chart's x axis."""
        return self.left + self.chart.x.share(value) * (self.right - self.left)

    def y(self, axis: Axis, value: float) -> float:
        """Return the place of `value`; far outside is cut off by the frame, the number need not grow with it."""
        return self.bottom - min(3.0, max(-3.0, axis.share(value))) * (self.bottom - self.top)

    def drawn(self) -> Iterator[Drawn]:
        """Yield each series at its place."""
        for series in self.chart.series:
            axis = self.chart.right if series.axis == "right" and self.chart.right else self.chart.left
            points = [point for point in series.points if math.isfinite(point.x) and math.isfinite(point.y)]
            places = [(self.x(point.x), self.y(axis, point.y)) for point in points]
            band = [
                (self.x(point.x), self.y(axis, point.low), self.y(axis, point.high))
                for point in points
                if point.low is not None and point.high is not None
            ]
            outline = [(x, high) for x, _, high in band] + [(x, low) for x, low, _ in reversed(band)]
            pointed = [(round(x, 1), round(y, 1), point.text) for (x, y), point in zip(places, points, strict=True)]
            marked = self.is_scatter or (series.form == "line" and len(places) <= _MOST_MARKS)
            values = [[*place, round(point.x, 4)] for place, point in zip(pointed, points, strict=True)]
            yield Drawn(
                series,
                "" if self.is_scatter else _path(places),
                f"{_path(outline)}Z" if len(band) > 1 else "",
                tuple(pointed) if marked else (),
                json.dumps(values, ensure_ascii=False, separators=(",", ":")),
            )


def _path(places: Sequence[tuple[float, float]]) -> str:
    return "M" + "L".join(f"{x:.1f} {y:.1f}" for x, y in places) if places else ""
