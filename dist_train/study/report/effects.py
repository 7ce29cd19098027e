"""What each arm does to accuracy, width and sharpness: its difference from the base line, with its interval."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from dist_train.study.report.arms import Arm, Panel
from dist_train.study.report.measures import Measure, measures_of, sharpness_measures
from dist_train.study.report.numbers import Interval

_ACCURACIES = ("final_test", "gap")


@dataclass(frozen=True)
class Effect:
    """A difference from the base line as it is read, and the exact one."""

    interval: Interval
    text: str
    ends: str

    @property
    def is_clear(self) -> bool:
        """Whether the interval leaves out zero."""
        return self.interval.low > 0 or self.interval.high < 0


@dataclass(frozen=True)
class EffectTable:
    """Arms by panel; `measures` heads the columns. A cell is None where under two seeds have both values."""

    title: str
    measures: tuple[Measure, ...]
    groups: tuple[tuple[Panel, tuple[tuple[Arm, tuple[Effect | None, ...]], ...]], ...]


def effect_tables(panels: Sequence[Panel]) -> tuple[EffectTable, ...]:
    """Return the differences of all arms but the base lines, a table for each group of measures.

    None where no two seeds can be compared.
    """
    runs = [run for panel in panels for arm in panel.arms for run in arm.counted]
    basic = tuple(measure for measure in measures_of(runs) if measure.key in _ACCURACIES)
    measures = (*basic, *sharpness_measures(runs))
    tables = (
        _table(title, panels, [measure for measure in measures if measure.group == title])
        for title in dict.fromkeys(measure.group for measure in measures)
    )
    return tuple(table for table in tables if table.measures)


def _table(title: str, panels: Sequence[Panel], measures: Sequence[Measure]) -> EffectTable:
    every = [[[_effect(arm, panel, measure) for measure in measures] for arm in panel.arms] for panel in panels]
    kept = [column for column in range(len(measures)) if any(row[column] for rows in every for row in rows)]
    groups = []
    for panel, rows in zip(panels, every, strict=True):
        chosen = tuple(
            (arm, tuple(row[column] for column in kept)) for arm, row in zip(panel.arms, rows, strict=True) if any(row)
        )
        if chosen:
            groups.append((panel, chosen))
    return EffectTable(title, tuple(measures[column] for column in kept), tuple(groups))


def _effect(arm: Arm, panel: Panel, measure: Measure) -> Effect | None:
    if panel.base is None or arm.is_base:
        return None
    interval = arm.difference(panel.base, measure)
    if interval is None:
        return None
    low, high = (_signed(measure, value) for value in (interval.low, interval.high))
    return Effect(interval, _signed(measure, interval.difference), f"{low} to {high}")


def _signed(measure: Measure, value: float) -> str:
    sign = "" if value == 0 else "+" if value > 0 else "\u2212"
    return sign + measure.write(abs(value) * measure.factor)
