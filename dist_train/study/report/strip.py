"""One row a variant: every seed a dot, their mean a bar."""

from __future__ import annotations

from collections.abc import Iterator, Sequence

from markupsafe import Markup

from dist_train.study.report.measures import Measure
from dist_train.study.report.scales import Axis, linear_axis, plain
from dist_train.study.report.tables import variant_cell
from dist_train.study.report.variants import Panel, Variant

_WIDTH, _ROW, _LEFT, _RIGHT, _FOOT = 400, 34, 10, 10, 34


def strip_plot(panels: Sequence[Panel], measure: Measure) -> tuple[tuple[Panel, Markup], ...]:
    """Return, for each panel, its variants' values of `measure` on one axis that all panels share."""
    values = [
        value * measure.factor for panel in panels for variant in panel.variants for value in _values(variant, measure)
    ]
    if not values:
        return ()
    axis = linear_axis(
        f"{measure.title}, {measure.unit}" if measure.unit else measure.title, values, plain, margin=0.05
    )
    return tuple(
        (panel, Markup("").join(_draw(panel, measure, axis)))
        for panel in panels
        if any(_values(variant, measure) for variant in panel.variants)
    )


def _values(variant: Variant, measure: Measure) -> list[float]:
    return [value for _, value in variant.measured(measure)]


def _draw(panel: Panel, measure: Measure, axis: Axis) -> Iterator[Markup]:
    variants = [variant for variant in panel.variants if _values(variant, measure)]
    bottom = 6 + _ROW * len(variants)
    key = f"strip-{'none' if panel.batch is None else panel.batch}"
    yield Markup('<svg viewBox="0 0 {} {}" role="img" aria-labelledby="{}-title">').format(_WIDTH, bottom + _FOOT, key)
    told = "; ".join(f"{variant.label} {_told(variant, measure)}" for variant in variants)
    yield Markup('<title id="{}-title">{}, {}: {}</title>').format(key, panel.title, measure.title, told)
    yield Markup('<g class="axes">')
    for tick in axis.ticks():
        x = _place(axis, tick)
        yield Markup('<line class="grid" x1="{:.1f}" x2="{:.1f}" y1="4" y2="{:g}"/>').format(x, x, bottom)
        yield Markup('<text x="{:.1f}" y="{:g}" text-anchor="middle">{}</text>').format(
            x, bottom + 13, axis.write(tick)
        )
    yield Markup('<text class="name" x="{:g}" y="{:g}" text-anchor="middle">{}</text></g>').format(
        _WIDTH / 2, bottom + 29, axis.title
    )
    for index, variant in enumerate(variants):
        yield from _row(variant, measure, axis, 6 + _ROW * index)
    yield Markup("</svg>")


def _row(variant: Variant, measure: Measure, axis: Axis, top: float) -> Iterator[Markup]:
    yield Markup('<g class="series s{}">').format(variant.colour)
    yield Markup('<text class="variant" x="{:g}" y="{:g}">{}</text>').format(_LEFT, top + 10, variant.label)
    yield Markup('<text class="value" x="{:g}" y="{:g}" text-anchor="end">{}</text>').format(
        _WIDTH - _RIGHT, top + 10, _told(variant, measure)
    )
    summary = variant.summary(measure)
    assert summary is not None
    y = top + 21
    if summary.deviation is not None:
        low, high = summary.mean - summary.deviation, summary.mean + summary.deviation
        yield Markup('<line class="spread" x1="{:.1f}" x2="{:.1f}" y1="{:g}" y2="{:g}"/>').format(
            _place(axis, low * measure.factor), _place(axis, high * measure.factor), y, y
        )
    middle = _place(axis, summary.mean * measure.factor)
    yield Markup('<line class="mean" x1="{:.1f}" x2="{:.1f}" y1="{:g}" y2="{:g}"/>').format(
        middle, middle, y - 6, y + 6
    )
    for run, value in variant.measured(measure):
        seed = "" if run.seed is None else f"seed {run.seed}: "
        yield Markup('<circle class="mark" cx="{:.1f}" cy="{:g}" r="4"><title>{}{}</title></circle>').format(
            _place(axis, value * measure.factor), y, seed, measure.told(run, value)
        )
    yield Markup("</g>")


def _told(variant: Variant, measure: Measure) -> str:
    cell = variant_cell(variant, measure)
    return f"{'≥ ' if cell.is_bound else ''}{cell.text}{f' ± {cell.spread}' if cell.spread else ''}, {cell.note}"


def _place(axis: Axis, value: float) -> float:
    return _LEFT + min(1.0, max(0.0, axis.share(value))) * (_WIDTH - _LEFT - _RIGHT)
