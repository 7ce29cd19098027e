"""The tables of the page: variants, differences from the base line, runs; and what it takes to run them again."""

from __future__ import annotations

import shlex
from collections import Counter
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from datetime import datetime
from typing import Generic, TypeVar

from dist_train.config import Config
from dist_train.report.measures import Interval, Measure, measures_of, sharpness_measures
from dist_train.report.stored_run import StoredRun, Subject
from dist_train.report.variants import Lost, Panel, Variant, shown
from dist_train.rundir.paths import RunDirectory, StudyDirectory
from dist_train.watch.run_table import flat_settings

_EFFECTS = ("final_test", "final_train", "gap", "test_loss", "train_loss")
_Content = TypeVar("_Content")


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

    @property
    def as_text(self) -> str:
        """Return the number with its bound and spread."""
        return f"{'≥ ' if self.is_bound else ''}{self.text}{f' ± {self.spread}' if self.spread else ''}"


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
class Row(Generic[_Content]):
    """A variant's cells under its `label`; `is_provisional` where they are of runs that have not finished."""

    variant: Variant
    label: str
    is_provisional: bool
    cells: tuple[_Content, ...]


@dataclass(frozen=True)
class Table(Generic[_Content]):
    """Variants by panel; `measures` heads the columns."""

    title: str
    measures: tuple[Measure, ...]
    groups: tuple[tuple[Panel, tuple[Row[_Content], ...]], ...]


def variant_tables(panels: Sequence[Panel]) -> tuple[Table[Cell], ...]:
    """Return a table for each group of measures."""
    tables = []
    for title, chosen in _grouped(measures_of(_counted(panels))):
        groups = []
        for panel in panels:
            numbers = [(each, tuple(variant_cell(each, measure) for measure in chosen)) for each in panel.variants]
            groups.append((panel, tuple(Row(each, each.label, each.is_provisional, cells) for each, cells in numbers)))
        tables.append(Table(title, chosen, tuple(groups)))
    return tuple(tables)


def variant_cell(variant: Variant, measure: Measure) -> Cell:
    """Return the mean of `measure` over the runs that have it."""
    found = variant.summary(measure)
    if found is None:
        return Cell()
    spread = "" if found.deviation is None else measure.spread(found.mean, found.deviation)
    note = measured_note(found.count, found.censored, measure, [[run] for run, _ in variant.measured(measure)])
    note += lost_note(variant.lost(measure))
    return Cell(found.mean, measure.write(found.mean * measure.factor), spread, found.censored > 0, note)


def limits(count: int, censored: int, unresolved: int, guessed: int = 0) -> str:
    """Return what a reader must know of a mean over `count` values: n = 3, 1 censored, 2 unresolved."""
    words = ((censored, "censored"), (unresolved, "unresolved"), (guessed, "as if guessing"))
    return ", ".join([f"n = {count}", *(f"{number} {word}" for number, word in words if number)])


def measured_note(count: int, censored: int, measure: Measure, values: Sequence[Sequence[StoredRun]]) -> str:
    """Return the limits of `count` values of `measure`, each of the runs in an entry of `values`."""
    unresolved, guessed = (
        sum(any(map(does, runs)) for runs in values) for does in (measure.is_unresolved, measure.is_guess)
    )
    return limits(count, censored, unresolved, guessed)


def lost_note(lost: Lost) -> str:
    """Return how many runs that are wanted a number lacks, and why: they diverged, or have not finished."""
    words = ((lost.diverged, "diverged"), (lost.unfinished, "unfinished"))
    return "".join(f", {number} {word}" for number, word in words if number)


def run_cells(run: StoredRun, measures: Sequence[Measure]) -> tuple[Cell, ...]:
    """Return the numbers of `run`."""
    cells = []
    for measure in measures:
        value = measure.take(run)
        if value is None:
            cells.append(Cell())
        else:
            bound = measure.is_bound(run)
            cells.append(Cell(value, measure.write(value * measure.factor), is_bound=bound, note=measure.note(run)))
    return tuple(cells)


def effect_tables(panels: Sequence[Panel]) -> tuple[Table[Effect | None], ...]:
    """Return the differences from the base line of the same batch, and of base lines from that of the smallest batch.

    A table for each group of measures, without those of which no two seeds can be compared.
    """
    runs = _counted(panels)
    basic = [measure for measure in measures_of(runs) if measure.key in _EFFECTS]
    tables = (_effect_table(title, panels, group) for title, group in _grouped([*basic, *sharpness_measures(runs)]))
    return tuple(table for table in tables if table.measures)


def _effect_table(title: str, panels: Sequence[Panel], measures: Sequence[Measure]) -> Table[Effect | None]:
    every = [(panel, list(_effect_rows(panel, panels[0], measures))) for panel in panels]
    kept = [at for at in range(len(measures)) if any(row.cells[at] for _, rows in every for row in rows)]
    groups = []
    for panel, rows in every:
        chosen = tuple(
            Row(row.variant, row.label, row.is_provisional, tuple(row.cells[at] for at in kept))
            for row in rows
            if any(row.cells)
        )
        if chosen:
            groups.append((panel, chosen))
    return Table(title, tuple(measures[at] for at in kept), tuple(groups))


def _effect_rows(panel: Panel, first: Panel, measures: Sequence[Measure]) -> Iterator[Row[Effect | None]]:
    for variant in panel.variants:
        base, label = panel.base, variant.label
        if variant.is_base:
            base, label = first.base if panel is not first else None, f"{label}, from that of {first.short}"
        if base is not None:
            cells = tuple(_effect(variant, base, measure) for measure in measures)
            yield Row(variant, label, variant.is_provisional or base.is_provisional, cells)


def _effect(variant: Variant, base: Variant, measure: Measure) -> Effect | None:
    interval = variant.difference(base, measure)
    if interval is None:
        return None
    note = difference_note(variant, base, measure, interval)
    difference, low, high = (signed(measure, each) for each in (interval.difference, interval.low, interval.high))
    if interval.censored:
        return Effect(interval, f"{interval.sign} {difference}" if interval.sign else "", "", note)
    return Effect(interval, difference, f"{low} to {high}", note)


def difference_note(variant: Variant, base: Variant, measure: Measure, interval: Interval) -> str:
    """Return of how many pairs a difference is, what limits these, and why others are missing."""
    pairs = [[run for run, _ in pair] for pair in variant.pairs(base, measure)]
    return measured_note(interval.count, interval.censored, measure, pairs) + lost_note(variant.lost(measure, base))


def signed(measure: Measure, value: float) -> str:
    """Return a difference as it is read, with its sign."""
    sign = "" if value == 0 else "+" if value > 0 else "\u2212"
    return sign + measure.write(abs(value) * measure.factor)


def _counted(panels: Sequence[Panel]) -> list[StoredRun]:
    return [run for panel in panels for variant in panel.variants for run in variant.counted]


def _grouped(measures: Sequence[Measure]) -> Iterator[tuple[str, tuple[Measure, ...]]]:
    for title in dict.fromkeys(measure.group for measure in measures):
        yield title, tuple(measure for measure in measures if measure.group == title)


_NOT_RECORDED = "not recorded"


Sections = Mapping[str, Sequence[tuple[str, str, bool]]]
"""Settings by section: name, value, and whether it is the default."""


def sections_of(settings: Mapping[str, object]) -> Sections:
    """Return `settings`, which are by dotted path, by section."""
    defaults = dict(flat_settings(Config().model_dump(mode="json")))
    sections: dict[str, list[tuple[str, str, bool]]] = {}
    for path, value in settings.items():
        section, _, name = path.partition(".")
        is_default = path in defaults and defaults[path] == value
        sections.setdefault(section, []).append((name or section, shown(value), is_default))
    return sections


def shared_settings(runs: Sequence[StoredRun]) -> Sections:
    """Return the settings that all of `runs` have in common, by section."""
    first, *others = [run.settings for run in runs if run.settings] or [{}]
    missing = object()
    return sections_of(
        {path: value for path, value in first.items() if all(each.get(path, missing) == value for each in others)}
    )


def environment(runs: Sequence[StoredRun]) -> tuple[tuple[str, str], ...]:
    """Return where and when `runs` ran, as names and values."""
    known = [run.status for run in runs if run.status]
    rows = (
        ("hosts", _listed(status.host for status in known)),
        ("ranks", _listed(f"{status.world_size}" for status in known)),
        ("Slurm jobs", _listed(status.slurm_job for status in known)),
        ("last launch began", _span([status.started for status in known])),
        ("ended", _span([status.finished for status in known if status.finished])),
    )
    return tuple((name, value) for name, value in rows if value)


def versions(runs: Sequence[StoredRun]) -> tuple[tuple[str, str], ...]:
    """Return what `runs` ran with, as names and values; where they differ, how many of them had which."""
    recorded = [run.status.environment for run in runs if run.status]
    if recorded and not any(recorded):
        return (("versions", _NOT_RECORDED),)
    rows = []
    for name in dict.fromkeys(name for environment in recorded for name in environment):
        counts = Counter(environment.get(name, _NOT_RECORDED) for environment in recorded).most_common()
        differ = "runs differ: " + ", ".join(f"{value} ({count})" for value, count in counts)
        rows.append((name, differ if len(counts) > 1 else counts[0][0]))
    return tuple(rows)


def commands(subject: Subject) -> tuple[str, ...]:
    """Return the commands that make the runs, and this page, again."""
    folder = shlex.quote(str(subject.directory))
    report = f"dist-train report {folder}"
    if subject.kind != "run":
        return (report,)
    name = subject.runs[0].settings.get("run.name", "run")
    config = shlex.quote(str(RunDirectory(subject.directory).config))
    return (f"dist-train train {config} run.name={name}-again run.resume=never", report)


def command_of(run: StoredRun) -> str:
    """Return the command that makes `run` of a study again; empty where its study does not say it."""
    if run.planned is None or not run.planned.overrides:
        return ""
    return shlex.join(["dist-train", "train", str(StudyDirectory(run.directory.parent).base), *run.planned.overrides])


def _listed(values: Iterable[str]) -> str:
    return ", ".join(sorted({value for value in values if value}))


def _span(moments: Sequence[str]) -> str:
    try:
        known = sorted(datetime.fromisoformat(moment) for moment in moments)
    except ValueError:
        return ""
    if not known:
        return ""
    first, last = (f"{moment:%Y-%m-%d %H:%M} UTC" for moment in (known[0], known[-1]))
    return first if first == last else f"{first} to {last}"
