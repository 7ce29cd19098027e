"""One row an arm: every seed a dot, their mean a bar."""

from __future__ import annotations

from collections.abc import Iterator, Sequence

from markupsafe import Markup

from dist_train.study.report.arms import Arm, Panel
from dist_train.study.report.measures import Measure
from dist_train.study.report.scales import Axis, linear_axis, plain
from dist_train.study.report.tables import arm_cell

_WIDTH, _ROW, _LEFT, _RIGHT, _FOOT = 400, 34, 10, 10, 34


def strip_plot(panels: Sequence[Panel], measure: Measure) -> tuple[tuple[Panel, Markup], ...]:
    """Return, for each panel, its arms' values of `measure` on one axis that all panels share."""
    values = [value * measure.factor for panel in panels for arm in panel.arms for value in _values(arm, measure)]
    if not values:
        return ()
    axis = linear_axis(
        f"{measure.title}, {measure.unit}" if measure.unit else measure.title, values, plain, margin=0.05
    )
    return tuple(
        (panel, Markup("").join(_draw(panel, measure, axis)))
        for panel in panels
        if any(_values(arm, measure) for arm in panel.arms)
    )


def _values(arm: Arm, measure: Measure) -> list[float]:
    return [value for _, value in arm.measured(measure)]


def _draw(panel: Panel, measure: Measure, axis: Axis) -> Iterator[Markup]:
    arms = [arm for arm in panel.arms if _values(arm, measure)]
    bottom = 6 + _ROW * len(arms)
    key = f"strip-{'none' if panel.batch is None else panel.batch}"
    yield Markup('<svg viewBox="0 0 {} {}" role="img" aria-labelledby="{}-title">').format(_WIDTH, bottom + _FOOT, key)
    told = "; ".join(f"{arm.label} {_told(arm, measure)}" for arm in arms)
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
    for index, arm in enumerate(arms):
        yield from _row(arm, measure, axis, 6 + _ROW * index)
    yield Markup("</svg>")


def _row(arm: Arm, measure: Measure, axis: Axis, top: float) -> Iterator[Markup]:
    yield Markup('<g class="series s{}">').format(arm.colour)
    yield Markup('<text class="arm" x="{:g}" y="{:g}">{}</text>').format(_LEFT, top + 10, arm.label)
    yield Markup('<text class="value" x="{:g}" y="{:g}" text-anchor="end">{}</text>').format(
        _WIDTH - _RIGHT, top + 10, _told(arm, measure)
    )
    summary = arm.summary(measure)
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
    for run, value in arm.measured(measure):
        seed = "" if run.seed is None else f"seed {run.seed}: "
        yield Markup('<circle class="mark" cx="{:.1f}" cy="{:g}" r="4"><title>{}{}</title></circle>').format(
            _place(axis, value * measure.factor), y, seed, measure.told(run, value)
        )
    yield Markup("</g>")


def _told(arm: Arm, measure: Measure) -> str:
    cell = arm_cell(arm, measure)
    return f"{'≥ ' if cell.is_bound else ''}{cell.text}{f' ± {cell.spread}' if cell.spread else ''}, {cell.note}"


def _place(axis: Axis, value: float) -> float:
    return _LEFT + min(1.0, max(0.0, axis.share(value))) * (_WIDTH - _LEFT - _RIGHT)
