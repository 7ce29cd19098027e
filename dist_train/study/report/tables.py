"""The tables of the page: arms, runs, and what sets arms apart."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from dist_train.study.report.arms import Arm, Panel
from dist_train.study.report.measures import Measure, measures_of
from dist_train.study.report.stored_run import StoredRun


@dataclass(frozen=True)
class Cell:
    """A number as it is read, `spread` with it; `value` is the exact one. Without a value there is none to show.

    `is_bound`: the true one is this much or more.
    """

    value: float | None = None
    text: str = ""
    spread: str = ""
    is_bound: bool = False


@dataclass(frozen=True)
class ArmRow:
    """An arm with its numbers."""

    arm: Arm
    counted: int
    planned: int
    cells: tuple[Cell, ...]


@dataclass(frozen=True)
class ArmTable:
    """Arms by panel; `measures` heads the columns."""

    title: str
    measures: tuple[Measure, ...]
    groups: tuple[tuple[Panel, tuple[ArmRow, ...]], ...]


@dataclass(frozen=True)
class RunRow:
    """A run with its numbers."""

    run: StoredRun
    arm: Arm
    panel: Panel
    cells: tuple[Cell, ...]


@dataclass(frozen=True)
class RunTable:
    """Every run, also those that are missing."""

    measures: tuple[Measure, ...]
    rows: tuple[RunRow, ...]


def arm_tables(panels: Sequence[Panel]) -> tuple[ArmTable, ...]:
    """Return a table for each group of measures."""
    measures = measures_of([run for panel in panels for arm in panel.arms for run in arm.counted])
    tables = []
    for title in dict.fromkeys(measure.group for measure in measures):
        chosen = tuple(measure for measure in measures if measure.group == title)
        groups = tuple((panel, tuple(_arm_row(arm, chosen) for arm in panel.arms)) for panel in panels)
        tables.append(ArmTable(title, chosen, groups))
    return tuple(tables)


def run_table(panels: Sequence[Panel]) -> RunTable:
    """Return every run with all that is measured of it."""
    measures = measures_of([run for panel in panels for arm in panel.arms for run in arm.runs])
    return RunTable(
        measures,
        tuple(
            RunRow(run, arm, panel, run_cells(run, measures))
            for panel in panels
            for arm in panel.arms
            for run in arm.runs
        ),
    )


def run_cells(run: StoredRun, measures: Sequence[Measure]) -> tuple[Cell, ...]:
    """Return the numbers of `run`."""
    cells = []
    for measure in measures:
        value = measure.take(run)
        cells.append(
            Cell()
            if value is None
            else Cell(value, measure.write(value * measure.factor), is_bound=measure.is_bound(run))
        )
    return tuple(cells)


def _arm_row(arm: Arm, measures: Sequence[Measure]) -> ArmRow:
    return ArmRow(arm, len(arm.counted), len(arm.runs), tuple(_arm_cell(arm, measure) for measure in measures))


def _arm_cell(arm: Arm, measure: Measure) -> Cell:
    found = arm.summary(measure)
    if found is None:
        return Cell()
    spread = "" if found.deviation is None else measure.spread(found.mean, found.deviation)
    is_bound = any(measure.is_bound(run) for run in arm.counted)
    return Cell(found.mean, measure.write(found.mean * measure.factor), spread, is_bound)
