"""Variants against each other: accuracy of every seed, differences from the base line, sharpness."""

from __future__ import annotations

from collections.abc import Collection, Iterator, Sequence
from dataclasses import dataclass
from typing import Literal

from markupsafe import Markup

from dist_train.report.chart import Axis, Chart, Point, Series, linear_axis, percent_tick, plain
from dist_train.report.measures import FINAL_ACCURACY, TRAIN_LOSS, Measure, measures_of, sharpness_measures
from dist_train.report.numbers import Interval, spearman
from dist_train.report.stored_run import StoredRun
from dist_train.report.tables import limits, variant_cell
from dist_train.report.variants import Panel, Variant, duplicates_of

_BASIC = ("final_test", "final_train", "gap", "test_loss", "train_loss")


@dataclass(frozen=True)
class Effect:
    """A difference from the base line as it is read, and the exact one; `note` as in a Cell.

    A bound has its sign in `text` and no `ends`; `text` is empty where nothing is known.
    """

    interval: Interval
    text: str
    ends: str
    note: str

    @property
    def is_clear(self) -> bool:
        """Whether the interval leaves out zero."""
        return self.interval.low > 0 or self.interval.high < 0


@dataclass(frozen=True)
class EffectTable:
    """Variants by panel; `measures` heads the columns. A cell is None where under two seeds have both values."""

    title: str
    measures: tuple[Measure, ...]
    groups: tuple[tuple[Panel, tuple[tuple[EffectRow, tuple[Effect | None, ...]], ...]], ...]


@dataclass(frozen=True)
class EffectRow:
    """A variant and the one that it is compared with; `is_provisional` where the runs of either have not finished."""

    variant: Variant
    base: Variant
    label: str

    @property
    def is_provisional(self) -> bool:
        """Whether the difference is of runs that have not finished."""
        return self.variant.is_provisional or self.base.is_provisional


def effect_tables(panels: Sequence[Panel]) -> tuple[EffectTable, ...]:
    """Return the differences from the base line of the same batch, and of base lines from that of the smallest batch.

    A table for each group of measures; none where no two seeds can be compared.
    """
    runs = [run for panel in panels for variant in panel.variants for run in variant.counted]
    basic = tuple(measure for measure in measures_of(runs) if measure.key in _BASIC)
    measures = (*basic, *sharpness_measures(runs))
    tables = (
        _table(title, panels, [measure for measure in measures if measure.group == title])
        for title in dict.fromkeys(measure.group for measure in measures)
    )
    return tuple(table for table in tables if table.measures)


def _table(title: str, panels: Sequence[Panel], measures: Sequence[Measure]) -> EffectTable:
    every = [
        (panel, [(row, [_effect(row, measure) for measure in measures]) for row in _rows(panel, panels[0])])
        for panel in panels
    ]
    kept = [column for column in range(len(measures)) if any(cells[column] for _, rows in every for _, cells in rows)]
    groups = []
    for panel, rows in every:
        chosen = tuple((row, tuple(cells[column] for column in kept)) for row, cells in rows if any(cells))
        if chosen:
            groups.append((panel, chosen))
    return EffectTable(title, tuple(measures[column] for column in kept), tuple(groups))


def _rows(panel: Panel, first: Panel) -> Iterator[EffectRow]:
    for variant in panel.variants:
        if not variant.is_base and panel.base is not None:
            yield EffectRow(variant, panel.base, variant.label)
        elif variant.is_base and panel is not first and first.base is not None:
            yield EffectRow(variant, first.base, f"{variant.label}, from that of {first.short}")


def _effect(row: EffectRow, measure: Measure) -> Effect | None:
    interval = row.variant.difference(row.base, measure)
    if interval is None:
        return None
    pairs = row.variant.pairs(row.base, measure)
    unresolved = sum(any(measure.is_unresolved(run) for run, _ in pair) for pair in pairs)
    note = limits(interval.count, interval.censored, unresolved)
    if interval.censored:
        sign = interval.sign
        return Effect(interval, f"{sign} {_signed(measure, interval.difference)}" if sign else "", "", note)
    low, high = (_signed(measure, value) for value in (interval.low, interval.high))
    return Effect(interval, _signed(measure, interval.difference), f"{low} to {high}", note)


def _signed(measure: Measure, value: float) -> str:
    sign = "" if value == 0 else "+" if value > 0 else "\u2212"
    return sign + measure.write(abs(value) * measure.factor)


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


@dataclass(frozen=True)
class Correlation:
    """Spearman's rank correlation with `other`, among the runs that `note` counts; None where they are too few.

    A censored value has the rank of its bound.
    """

    other: str
    among: str
    rho: float | None
    note: str


@dataclass(frozen=True)
class Scatter:
    """One measure of sharpness against test accuracy, and its correlations with that and with the training loss."""

    chart: Chart
    correlations: tuple[Correlation, ...]


@dataclass(frozen=True)
class _Related:
    variant: Variant
    run: StoredRun
    value: float
    other: float


def sharpness_scatters(panels: Sequence[Panel]) -> tuple[Scatter, ...]:
    """Return a scatter for every measure of sharpness that at least two finished runs have; duplicates left out."""
    runs = [run for panel in panels for variant in panel.variants for run in variant.counted if run.is_finished]
    # two studies in one folder may hold the same run
    repeated = duplicates_of(runs)
    distinct = {run.name for run in runs if run.name not in repeated}
    scatters: list[Scatter] = []
    for measure in sharpness_measures(runs):
        with_accuracy = [_related(panel, distinct, measure, FINAL_ACCURACY) for panel in panels]
        if sum(map(len, with_accuracy)) < 2:
            continue
        with_loss = [_related(panel, distinct, measure, TRAIN_LOSS) for panel in panels]
        correlations = (
            *_correlations(measure, FINAL_ACCURACY, panels, with_accuracy),
            *_correlations(measure, TRAIN_LOSS, panels, with_loss),
        )
        scatters.append(Scatter(_chart(len(scatters), measure, panels, with_accuracy), correlations))
    return tuple(scatters)


def _related(panel: Panel, distinct: Collection[str], measure: Measure, other: Measure) -> list[_Related]:
    """Return the runs of `panel` that have both, with both values."""
    return [
        _Related(variant, run, value, second)
        for variant in panel.variants
        for run, value in variant.measured(measure)
        if run.name in distinct and (second := other.take(run)) is not None
    ]


def _correlations(
    measure: Measure, other: Measure, panels: Sequence[Panel], related: Sequence[Sequence[_Related]]
) -> Iterator[Correlation]:
    """Yield the correlation over all runs, and over each batch size where there are several."""
    groups = [(panel.short, found) for panel, found in zip(panels, related, strict=True) if found]
    everything = ("all runs", [item for _, found in groups for item in found])
    for among, found in [everything, *(groups if len(groups) > 1 else [])]:
        rho = spearman([item.value for item in found], [item.other for item in found])
        censored = sum(measure.is_bound(item.run) for item in found)
        unresolved = sum(measure.is_unresolved(item.run) for item in found)
        yield Correlation(other.title, among, rho, limits(len(found), censored, unresolved))


def _chart(index: int, measure: Measure, panels: Sequence[Panel], related: Sequence[Sequence[_Related]]) -> Chart:
    series = []
    for number, (panel, found) in enumerate(zip(panels, related, strict=True)):
        for variant in panel.variants:
            points = tuple(_point(item, panel, measure) for item in found if item.variant is variant)
            if points:
                form: Literal["dots", "squares"] = "dots" if number % 2 == 0 else "squares"
                series.append(Series(f"{panel.short}, {variant.label}", f"s{variant.colour}", points, form))
    x = [point.x for item in series for point in item.points]
    y = [point.y for item in series for point in item.points]
    axis = linear_axis(measure.title, x, plain, margin=0.08)
    if min(x) > 0 and max(x) / min(x) > 30:
        axis = Axis(measure.title, min(x) / 1.4, max(x) * 1.4, plain, is_logarithmic=True)
    description = f"{measure.title} against final test accuracy, {len(x)} runs."
    accuracy = linear_axis("final test accuracy, %", y, percent_tick, margin=0.1)
    return Chart(f"scatter-{index}", measure.title, description, axis, accuracy, tuple(series))


def _point(item: _Related, panel: Panel, measure: Measure) -> Point:
    seed = "" if item.run.seed is None else f", seed {item.run.seed}"
    value = measure.told(item.run, item.value)
    text = f"{panel.short}, {item.variant.label}{seed}: {value}, test {item.other * 100:.2f} %"
    return Point(item.value, item.other, text)
