"""The tables of the page: variants, runs, and what sets variants apart."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from dist_train.report.measures import Measure, measures_of
from dist_train.report.stored_run import StoredRun
from dist_train.report.variants import Panel, Variant


@dataclass(frozen=True)
class Cell:
    """A number as it is read, `spread` with it; `value` is the exact one. Without a value there is none to show.

    `is_bound`: the true one is this much or more. `note`: of how many runs it is, and what limits it.
    """

    value: float | None = None
    text: str = ""
    spread: str = ""
    is_bound: bool = False
    note: str = ""


@dataclass(frozen=True)
class VariantRow:
    """A variant with its numbers; `counted` of its `planned` seeds have finished."""

    variant: Variant
    counted: int
    planned: int
    cells: tuple[Cell, ...]


@dataclass(frozen=True)
class VariantTable:
    """Variants by panel; `measures` heads the columns."""

    title: str
    measures: tuple[Measure, ...]
    groups: tuple[tuple[Panel, tuple[VariantRow, ...]], ...]


@dataclass(frozen=True)
class RunRow:
    """A run with its numbers; `is_counted` where it has finished, and is not a duplicate."""

    run: StoredRun
    variant: Variant
    panel: Panel
    cells: tuple[Cell, ...]

    @property
    def is_counted(self) -> bool:
        """Whether its numbers are results."""
        return self.run.is_finished and self.run.name not in self.variant.repeated


@dataclass(frozen=True)
class RunTable:
    """Every run, also those that are missing."""

    measures: tuple[Measure, ...]
    rows: tuple[RunRow, ...]


def variant_tables(panels: Sequence[Panel]) -> tuple[VariantTable, ...]:
    """Return a table for each group of measures."""
    measures = measures_of([run for panel in panels for variant in panel.variants for run in variant.counted])
    tables = []
    for title in dict.fromkeys(measure.group for measure in measures):
        chosen = tuple(measure for measure in measures if measure.group == title)
        groups = tuple((panel, tuple(_variant_row(variant, chosen) for variant in panel.variants)) for panel in panels)
        tables.append(VariantTable(title, chosen, groups))
    return tuple(tables)


def run_table(panels: Sequence[Panel]) -> RunTable:
    """Return every run with all that is measured of it."""
    measures = measures_of([run for panel in panels for variant in panel.variants for run in variant.runs])
    return RunTable(
        measures,
        tuple(
            RunRow(run, variant, panel, run_cells(run, measures))
            for panel in panels
            for variant in panel.variants
            for run in variant.runs
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
            else Cell(
                value,
                measure.write(value * measure.factor),
                is_bound=measure.is_bound(run),
                note="unresolved" if measure.is_unresolved(run) else "",
            )
        )
    return tuple(cells)


def _variant_row(variant: Variant, measures: Sequence[Measure]) -> VariantRow:
    return VariantRow(
        variant, len(variant.counted), variant.seeds, tuple(variant_cell(variant, measure) for measure in measures)
    )


def variant_cell(variant: Variant, measure: Measure) -> Cell:
    """Return the mean of `measure` over the runs that have it."""
    found = variant.summary(measure)
    if found is None:
        return Cell()
    spread = "" if found.deviation is None else measure.spread(found.mean, found.deviation)
    unresolved = sum(measure.is_unresolved(run) for run, _ in variant.measured(measure))
    note = limits(found.count, found.censored, unresolved)
    return Cell(found.mean, measure.write(found.mean * measure.factor), spread, found.censored > 0, note)


def limits(count: int, censored: int, unresolved: int) -> str:
    """Return what a reader must know of a mean over `count` values: n = 3, 1 censored, 2 unresolved."""
    told = [f"n = {count}"]
    told += [f"{number} {word}" for number, word in ((censored, "censored"), (unresolved, "unresolved")) if number]
    return ", ".join(told)
