"""What each variant does to accuracy, width and sharpness: its difference from the base line, with its interval."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass

from dist_train.study.report.measures import Measure, measures_of, sharpness_measures
from dist_train.study.report.numbers import Interval
from dist_train.study.report.tables import limits
from dist_train.study.report.variants import Panel, Variant

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
