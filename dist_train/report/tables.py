"""The tables of the page: variants, differences from the baseline, contrasts (paired by seed), runs."""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace
from typing import Generic, TypeVar

from dist_train.report.measures import (
    JUDGED_ACCURACY,
    JUDGED_LOSS,
    SHARPNESS,
    Measure,
    measures_of,
    paired_difference,
    sharpness_measures,
    spread,
)
from dist_train.report.stored_run import StoredRun
from dist_train.report.variants import Panel, Variant, counted_runs
from dist_train.sweep.study_file import Contrast
from dist_train.watch.figure import three_digits

_EFFECTS = ("final_test", "final_train", "gap", "test_loss", "train_loss")
_CONFIDENCE = 0.95
_Content = TypeVar("_Content")


@dataclass(frozen=True)
class Cell:
    """A number as `text`; `value` is exact, None for an empty cell. `note`: number of runs, and qualification."""

    value: float | None = None
    text: str = ""
    spread: str = ""
    is_bound: bool = False
    note: str = ""

    @property
    def as_text(self) -> str:
        """Return the number with its bound and spread."""
        return f"{'≥ ' if self.is_bound else ''}{self.text}{f' ± {self.spread}' if self.spread else ''}"


@dataclass(frozen=True)
class Effect:
    """A paired difference, and as text; with its 95 % interval and the corrected one, at 1 - 0.05 / k of k comparisons.

    It `is_clear` if the corrected interval excludes zero. A bound has its sign in `text` and no `ends`, and equal
    differences have none; `text` is empty if nothing is known; `corrected_ends` is empty for a single comparison.
    `note` as in Cell.
    """

    difference: float
    is_clear: bool
    text: str
    ends: str
    corrected_ends: str
    note: str


@dataclass(frozen=True)
class Row(Generic[_Content]):
    """A variant's cells under its `label`; it `is_provisional` if they come from unfinished runs."""

    variant: Variant
    label: str
    is_provisional: bool
    cells: tuple[_Content | None, ...]


@dataclass(frozen=True)
class Table(Generic[_Content]):
    """Variants by panel, or compared with one reference; the columns are `measures`. `note`: what it lacks, and why."""

    title: str
    measures: tuple[Measure, ...]
    groups: tuple[tuple[Panel, tuple[Row[_Content], ...]], ...]
    note: str = ""


def variant_tables(panels: Sequence[Panel]) -> tuple[Table[Cell], ...]:
    """Return a table for each group of measures."""

    def row(variant: Variant, measures: Sequence[Measure]) -> Row[Cell]:
        cells = tuple(variant_cell(variant, measure) for measure in measures)
        return Row(variant, variant.label, variant.is_provisional, cells)

    return tuple(
        Table(title, chosen, tuple((panel, tuple(row(each, chosen) for each in panel.variants)) for panel in panels))
        for title, chosen in _grouped(measures_of(counted_runs(panels)))
    )


def variant_cell(variant: Variant, measure: Measure) -> Cell:
    """Return the mean of `measure` over the runs that have it."""
    found = variant.summary(measure)
    if found is None:
        return Cell()
    mean = found.mean * measure.factor
    deviation = "" if found.deviation is None else spread(measure.write, mean, found.deviation * measure.factor)
    note = measured_note(measure, [[run] for run, _ in variant.measured(measure)]) + lost_note(variant.lacking(measure))
    return Cell(found.mean, _with_minus(measure, found.mean), deviation, found.censored > 0, note)


def limits(count: int, censored: int, unresolved: int, guessed: int = 0) -> str:
    """Return the note of a mean over `count` values, for instance "n = 3, 1 censored, 2 unresolved"."""
    words = ((censored, "censored"), (unresolved, "unresolved"), (guessed, "as if guessing"))
    return ", ".join([f"n = {count}", *(f"{number} {word}" for number, word in words if number)])


def measured_note(measure: Measure, values: Sequence[Sequence[StoredRun]]) -> str:
    """Return the note of values of `measure`; each entry of `values` lists the runs behind one value."""
    qualifications = (measure.is_bound, measure.is_unresolved, measure.is_guess)
    return limits(len(values), *(sum(any(map(applies, runs)) for runs in values) for applies in qualifications))


def lost_note(lacking: Sequence[Sequence[StoredRun]]) -> str:
    """Return how many values are missing, and why; each entry of `lacking` lists the runs that lack one value."""
    diverged = sum(any(run.is_diverged for run in runs) for runs in lacking)
    others = [runs for runs in lacking if not any(run.is_diverged for run in runs)]
    changed = sum(any(run.has_other_settings for run in runs) for runs in others)
    unfinished = sum(any(not run.is_finished for run in runs) for runs in others) - changed
    words = ((diverged, "diverged"), (unfinished, "unfinished"), (changed, "with other settings"))
    return "".join(f", {number} {word}" for number, word in words if number)


def run_cells(run: StoredRun, measures: Sequence[Measure]) -> tuple[Cell, ...]:
    """Return the values of `measures` for `run`."""

    def cell(measure: Measure) -> Cell:
        if (value := measure.take(run)) is None:
            return Cell()
        bound, note = measure.is_bound(run), measure.note(run)
        return Cell(value, _with_minus(measure, value), is_bound=bound, note=note)

    return tuple(map(cell, measures))


def effect_tables(panels: Sequence[Panel]) -> tuple[Table[Effect], ...]:
    """Return the differences from the baseline, a table for each group of measures.

    Variants are compared with the baseline of their batch size, and baselines with that of the smallest batch.
    Measures of which no two seeds can be compared are left out.
    """
    runs = counted_runs(panels)
    basic = [measure for measure in measures_of(runs) if measure.key in _EFFECTS]
    # A difference in % could be taken for a relative one.
    basic = [replace(measure, unit="points") if measure.unit == "%" else measure for measure in basic]
    tables = []
    for title, group in _grouped([*basic, *sharpness_measures(runs)]):
        by_panel = [(panel, list(_effect_rows(panel, panels[0], group))) for panel in panels]
        tables.append(_without_empty_columns(title, group, [(panel, rows) for panel, rows in by_panel if rows]))
    return tuple(table for table in tables if table.measures)


def _without_empty_columns(
    title: str, measures: Sequence[Measure], groups: Sequence[tuple[Panel, Sequence[Row[Effect]]]]
) -> Table[Effect]:
    kept = [at for at in range(len(measures)) if any(row.cells[at] for _, rows in groups for row in rows)]
    return Table(
        title,
        tuple(measures[at] for at in kept),
        tuple(
            (panel, tuple(replace(row, cells=tuple(row.cells[at] for at in kept)) for row in rows))
            for panel, rows in groups
        ),
    )


def _effect_rows(panel: Panel, first: Panel, measures: Sequence[Measure]) -> Iterator[Row[Effect]]:
    for variant in panel.variants:
        base, label = panel.base, variant.label
        if variant.is_base:
            base, label = first.base if panel is not first else None, f"{label}, from that of {first.short}"
        if base is not None and any((row := _effect_row(variant, base, label, measures)).cells):
            yield row


def _effect_row(
    variant: Variant, base: Variant, label: str, measures: Sequence[Measure], comparisons: int = 1
) -> Row[Effect]:
    cells = tuple(
        (_at_equal_loss if measure is _EQUAL_LOSS else _effect)(variant, base, measure, comparisons)
        for measure in measures
    )
    return Row(variant, label, variant.is_provisional or base.is_provisional, cells)


def _effect(variant: Variant, base: Variant, measure: Measure, comparisons: int) -> Effect | None:
    pairs = variant.pairs(base, measure)
    values = [(before, after) for (_, before), (_, after) in pairs]
    bounds = [(measure.is_bound(first), measure.is_bound(second)) for (first, _), (second, _) in pairs]
    interval, corrected = (
        paired_difference(values, bounds, 1 - (1 - _CONFIDENCE) / count) for count in (1, comparisons)
    )
    if interval is None or corrected is None:
        return None
    note = measured_note(measure, [[run for run, _ in pair] for pair in pairs])
    note += lost_note(variant.lacking(measure, base))
    text, ends, wider = signed(measure, interval.difference), "", ""
    if interval.censored:
        text = f"{interval.sign} {text}" if interval.sign else ""
    elif math.isnan(interval.low):
        note += ", all pairs differ equally: no interval"
    else:
        ends, wider = (f"{signed(measure, each.low)} to {signed(measure, each.high)}" for each in (interval, corrected))
    is_clear = corrected.low > 0 or corrected.high < 0
    return Effect(interval.difference, is_clear, text, ends, wider if comparisons > 1 else "", note)


def signed(measure: Measure, value: float) -> str:
    """Return a difference as text with its sign."""
    sign = "" if value == 0 else "+" if value > 0 else "\u2212"
    return sign + measure.write(abs(value) * measure.factor)


def _with_minus(measure: Measure, value: float) -> str:
    """Return a value as text, with the minus that differences have."""
    return signed(measure, value).removeprefix("+")


def _grouped(measures: Sequence[Measure]) -> Iterator[tuple[str, tuple[Measure, ...]]]:
    for title in dict.fromkeys(measure.group for measure in measures):
        yield title, tuple(measure for measure in measures if measure.group == title)


_EQUAL_LOSS = replace(
    JUDGED_ACCURACY,
    key="equal_loss",
    title="test accuracy at equal training loss",
    explanation="Test accuracy where the training loss first fell to the level in the cell, the lowest that all of the "
    "cell's runs reached; interpolated between two evaluations, linearly in the logarithm of the loss. A run whose "
    "first evaluation is below the level has none.",
    is_guess=lambda run: False,
)
_JUDGED = (JUDGED_ACCURACY, JUDGED_LOSS, _EQUAL_LOSS)


def contrast_tables(panels: Sequence[Panel], named: Sequence[Contrast]) -> tuple[Table[Effect], ...]:
    """Return the study's named contrasts, then all variants against the baselines of the smallest and largest batch.

    The named ones have a second table, of sharpness. Variants without two seeds in common with the reference, and
    measures that no two seeds have, are left out; the first table of a named contrast has a note about them.
    """
    variants = {variant.name: variant for panel in panels for variant in panel.variants}
    sharpness = [measure for measure in sharpness_measures(counted_runs(panels)) if measure.group == SHARPNESS]
    tables = []
    for contrast in named:
        if (reference := variants.get(contrast.against)) is not None:
            panel = next(panel for panel in panels if reference in panel.variants)
            chosen = [variants[name] for name in contrast.variants if name in variants]
            title = contrast.title or f"{', '.join(contrast.variants)} against {contrast.against}"
            judged = _contrast_table(title, panel, reference, chosen, _JUDGED)
            tables.append(replace(judged, note=_left_out(judged, reference, chosen)))
            tables.append(_contrast_table(f"{title}, sharpness", panel, reference, chosen, sharpness))
    sized = [panel for panel in panels if panel.batch is not None]
    for panel in {panel.title: panel for panel in (*sized[:1], *sized[-1:])}.values():
        if panel.base is not None:
            tables.append(_contrast_table("All variants", panel, panel.base, list(variants.values()), _JUDGED))
    return tuple(table for table in tables if table.measures or table.note)


def _left_out(table: Table[Effect], reference: Variant, chosen: Sequence[Variant]) -> str:
    """Return what `table` lacks of the contrast of `chosen` with `reference`, and why."""
    compared = [row.variant for _, rows in table.groups for row in rows]
    others = [each.title for each in chosen if each not in (reference, *compared)]
    notes = []
    if others:
        notes.append(f"Fewer than two seeds in common, or another data set: {'; '.join(others)}.")
    if compared and not table.measures:
        notes.append("Fewer than two pairs of runs with the same seed have finished.")
    return " ".join(notes)


def evaluates_along_training(panels: Sequence[Panel]) -> bool:
    """Whether any run has evaluated the training split more than once."""
    return any(len(run.split("train")) > 1 for panel in panels for each in panel.variants for run in each.distinct)


def accuracy_at(run: StoredRun, level: float) -> float | None:
    """Return the test accuracy where the training loss first fell to `level`; None if no two evaluations enclose it."""
    before: tuple[float, float] | None = None
    for loss, accuracy in _losses_and_accuracies(run):
        if loss <= level:
            if before is None:
                return accuracy if loss == level else None
            fraction = math.log(before[0] / level) / math.log(before[0] / loss)
            return before[1] + fraction * (accuracy - before[1])
        before = loss, accuracy
    return None


def _losses_and_accuracies(run: StoredRun) -> list[tuple[float, float]]:
    """Return training loss and test accuracy of each step that evaluated both; empty for a run that diverged.

    They are of the weights by which the run is judged, as its final accuracy is.
    """
    if run.is_diverged:
        return []
    tests = {record.step: record.accuracy for record in run.split(f"test{run.judged}")}
    return [(it.loss, tests[it.step]) for it in run.split(f"train{run.judged}") if it.step in tests and it.loss > 0]


def _seeds(variant: Variant) -> set[int]:
    return {run.seed for run in variant.distinct if run.seed is not None}


def _contrast_table(
    title: str, panel: Panel, reference: Variant, chosen: Sequence[Variant], measures: Sequence[Measure]
) -> Table[Effect]:
    """Return the contrasts of `chosen` with `reference`, of `panel`; intervals are corrected for their number."""
    # Chosen by the planned seeds, so that the correction does not grow as runs finish.
    compared = [
        each
        for each in chosen
        if each is not reference and each.has_data_of(reference) and len(_seeds(each) & _seeds(reference)) > 1
    ]
    rows = [_effect_row(each, reference, each.title, measures, len(compared)) for each in compared]
    return _without_empty_columns(f"{title}: difference from {reference.title}", measures, [(panel, rows)])


def _at_equal_loss(variant: Variant, base: Variant, measure: Measure, comparisons: int) -> Effect | None:
    """Return the contrast at the lowest training loss that all runs of both variants reached."""
    runs = (run for each in (variant, base) for run in each.counted)
    curves = [curve for run in runs if len(curve := _losses_and_accuracies(run)) > 1]
    if not curves:
        return None
    level = max(min(loss for loss, _ in curve) for curve in curves)
    found = _effect(variant, base, replace(measure, take=lambda run: accuracy_at(run, level)), comparisons)
    return found and replace(found, note=f"at loss {three_digits(level)}; {found.note}")
