"""Contrasts: variants against a reference, paired by seed, with intervals corrected for their number."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass, replace

from dist_train.report.measures import JUDGED_ACCURACY, JUDGED_LOSS, Interval, Measure
from dist_train.report.stored_run import NamedContrast, StoredRun
from dist_train.report.tables import Row, difference_note, signed
from dist_train.report.variants import Panel, Variant
from dist_train.watch.figure import three_digits

_EQUAL_LOSS = replace(
    JUDGED_ACCURACY,
    key="equal_loss",
    title="test accuracy at equal training loss",
    explanation="Where the training loss first fell to the level in the cell, the lowest that all of the cell's runs "
    "reached: between two evaluations linear in the logarithm of the loss. A run whose first evaluation is below it "
    "has none.",
    is_guess=lambda run: False,
)
_CONFIDENCE = 0.95


@dataclass(frozen=True)
class Contrast:
    """A paired difference as it is read, with its 95 % interval and that at 1 - 0.05 / k for k comparisons.

    A bound has its sign in `text` and no ends; `text` is empty where nothing is known; `corrected_ends` is empty where
    there is one comparison alone.
    """

    interval: Interval
    corrected: Interval
    text: str
    ends: str
    corrected_ends: str
    note: str

    @property
    def is_clear(self) -> bool:
        """Whether the corrected interval leaves out zero."""
        return self.corrected.low > 0 or self.corrected.high < 0


@dataclass(frozen=True)
class ContrastTable:
    """Variants against one reference; the intervals are corrected for all `rows`."""

    title: str
    measures: tuple[Measure, ...]
    rows: tuple[tuple[str, Row[Contrast | None]], ...]
    """The panel's short name with each."""
    comparisons: int


def contrast_tables(panels: Sequence[Panel], named: Sequence[NamedContrast]) -> tuple[ContrastTable, ...]:
    """Return the contrasts that a study names, then all variants against the base lines of the smallest batch and of
    the largest; variants without two seeds in common with the reference, and what no two seeds have, are left out.
    """
    placed = {variant.name: (panel, variant) for panel in panels for variant in panel.variants}
    tables = []
    for contrast in named:
        if (reference := placed.get(contrast.against)) is not None:
            chosen = [placed[name] for name in contrast.variants if name in placed]
            title = contrast.title or f"{', '.join(contrast.variants)} against {contrast.against}"
            tables.append(_table(f"{title}: difference from {_called(*reference)}", reference[1], chosen))
    for panel in {panel.title: panel for panel in (*panels[:1], *panels[-1:])}.values():
        if panel.base is not None:
            others = [each for each in placed.values() if each[1] is not panel.base]
            tables.append(_table(f"All variants: difference from {_called(panel, panel.base)}", panel.base, others))
    return tuple(table for table in tables if table.measures)


def evaluates_along_training(panels: Sequence[Panel]) -> bool:
    """Whether any run has evaluated the training split more than once."""
    return any(len(run.split("train")) > 1 for panel in panels for each in panel.variants for run in each.distinct)


def accuracy_at(run: StoredRun, level: float) -> float | None:
    """Return the test accuracy where the training loss first fell to `level`; None where no two evaluations hold it.

    Between two evaluations it is linear in the logarithm of the training loss.
    """
    before: tuple[float, float] | None = None
    for loss, accuracy in _course(run):
        if loss <= level:
            if before is None:
                return accuracy if loss == level else None
            part = math.log(before[0] / level) / math.log(before[0] / loss)
            return before[1] + part * (accuracy - before[1])
        before = loss, accuracy
    return None


def _course(run: StoredRun) -> list[tuple[float, float]]:
    """Return training loss and test accuracy of each evaluation of both; none of a run that diverged."""
    tests = {record.step: record.accuracy for record in run.split("test")}
    if run.is_diverged:
        return []
    return [(it.loss, tests[it.step]) for it in run.split("train") if it.step in tests and it.loss > 0]


def _seeds(variant: Variant) -> set[int]:
    return {run.seed for run in variant.distinct if run.seed is not None}


def _called(panel: Panel, variant: Variant) -> str:
    return f"{panel.short}, {variant.label}"


def _table(title: str, reference: Variant, chosen: Sequence[tuple[Panel, Variant]]) -> ContrastTable:
    measures = (JUDGED_ACCURACY, JUDGED_LOSS, _EQUAL_LOSS)
    # by what is planned, so that the correction does not grow as runs finish
    chosen = [(panel, variant) for panel, variant in chosen if len(_seeds(variant) & _seeds(reference)) > 1]
    every = []
    for panel, variant in chosen:
        cells = [_contrast(variant, reference, measure, len(chosen)) for measure in measures[:-1]]
        every.append((panel, variant, [*cells, _at_equal_loss(variant, reference, len(chosen))]))
    kept = [at for at in range(len(measures)) if any(cells[at] for *_, cells in every)]
    rows = tuple(
        (
            panel.short,
            Row(
                variant,
                variant.label,
                variant.is_provisional or reference.is_provisional,
                tuple(cells[at] for at in kept),
            ),
        )
        for panel, variant, cells in every
    )
    return ContrastTable(title, tuple(measures[at] for at in kept), rows, len(chosen))


def _at_equal_loss(variant: Variant, base: Variant, comparisons: int) -> Contrast | None:
    """Return the contrast at the lowest training loss that all runs of both variants reached."""
    courses = [course for each in (variant, base) for run in each.counted if len(course := _course(run)) > 1]
    if not courses:
        return None
    level = max(min(loss for loss, _ in course) for course in courses)
    measure = replace(_EQUAL_LOSS, take=lambda run: accuracy_at(run, level))
    found = _contrast(variant, base, measure, comparisons)
    return found and replace(found, note=f"at loss {three_digits(level)}; {found.note}")


def _contrast(variant: Variant, base: Variant, measure: Measure, comparisons: int) -> Contrast | None:
    interval = variant.difference(base, measure)
    corrected = variant.difference(base, measure, 1 - (1 - _CONFIDENCE) / comparisons)
    if interval is None or corrected is None:
        return None
    note = difference_note(variant, base, measure, interval)
    text = signed(measure, interval.difference)
    if interval.censored:
        return Contrast(interval, corrected, f"{interval.sign} {text}" if interval.sign else "", "", "", note)
    ends, wider = (f"{signed(measure, each.low)} to {signed(measure, each.high)}" for each in (interval, corrected))
    return Contrast(interval, corrected, text, ends, wider if comparisons > 1 else "", note)
