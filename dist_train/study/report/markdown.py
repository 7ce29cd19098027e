"""The page's tables of variants as Markdown, for papers and notes: the same numbers, as they are read."""

from __future__ import annotations

from collections.abc import Iterator, Sequence

from dist_train.study.report.comparisons import Scatter, sharpness_scatters
from dist_train.study.report.effects import Effect, EffectTable, effect_tables
from dist_train.study.report.measures import Measure
from dist_train.study.report.reading import Subject
from dist_train.study.report.tables import Cell, VariantTable, variant_tables
from dist_train.study.report.variants import Panel, panels_of

_NONE = "\u2013"
_UNFINISHED = " (not finished)"


def tables_in_markdown(subject: Subject) -> str:
    """Return the tables of variants, their differences from the base line, and the rank correlations."""
    panels = panels_of(subject.runs)
    parts = [_left_out(panels)] if any(variant.repeated for panel in panels for variant in panel.variants) else []
    parts += [_section(table.title, _variants(table)) for table in variant_tables(panels)]
    parts += [
        _section(f"Differences from the base line: {table.title[0].lower()}{table.title[1:]}", _effects(table))
        for table in effect_tables(panels)
    ]
    scatters = sharpness_scatters(panels)
    if scatters:
        for other in dict.fromkeys(found.other for scatter in scatters for found in scatter.correlations):
            parts.append(_section(f"Rank correlation with {other}", _correlations(scatters, other)))
    return "\n".join(parts)


def _section(title: str, rows: Iterator[Sequence[str]]) -> str:
    head, *body = rows
    rule = ["---"] * len(head)
    lines = [f"| {' | '.join(cell.replace('|', '/') for cell in row)} |" for row in (head, rule, *body)]
    return f"## {title}\n\n" + "\n".join(lines) + "\n"


def _left_out(panels: Sequence[Panel]) -> str:
    repeated = [pair for panel in panels for variant in panel.variants for pair in variant.repeated.items()]
    lines = [f"- {name}: the settings and seed of {kept}, which counts" for name, kept in repeated]
    return "## Left out as duplicates\n\n" + "\n".join(lines) + "\n"


def _variants(table: VariantTable) -> Iterator[Sequence[str]]:
    yield "variant", "seeds", *map(_heading, table.measures)
    for panel, rows in table.groups:
        for row in rows:
            count = str(row.counted) if row.counted == row.planned else f"{row.counted} of {row.planned}"
            label = f"{row.variant.label}{_UNFINISHED if row.variant.is_provisional else ''}"
            yield f"{panel.short}, {label}", count, *map(_number, row.cells)


def _effects(table: EffectTable) -> Iterator[Sequence[str]]:
    yield "variant", *map(_heading, table.measures)
    for panel, rows in table.groups:
        for row, cells in rows:
            yield f"{panel.short}, {row.label}{_UNFINISHED if row.is_provisional else ''}", *map(_effect, cells)


def _correlations(scatters: Sequence[Scatter], other: str) -> Iterator[Sequence[str]]:
    chosen = [(scatter, [item for item in scatter.correlations if item.other == other]) for scatter in scatters]
    names = list(dict.fromkeys(item.among for _, items in chosen for item in items))
    yield "measure", *names
    for scatter, items in chosen:
        found = {item.among: item for item in items}
        cells = (
            f"{found[name].rho:.2f} ({found[name].note})" if name in found and found[name].rho is not None else _NONE
            for name in names
        )
        yield scatter.chart.title, *(cell.replace("-", "\u2212") for cell in cells)


def _heading(measure: Measure) -> str:
    return f"{measure.title}, {measure.unit}" if measure.unit else measure.title


def _number(cell: Cell) -> str:
    if cell.value is None:
        return _NONE
    bound = "≥ " if cell.is_bound else ""
    return f"{bound}{cell.text}{f' ± {cell.spread}' if cell.spread else ''}{f' ({cell.note})' if cell.note else ''}"


def _effect(effect: Effect | None) -> str:
    if effect is None:
        return _NONE
    text = f"**{effect.text}**" if effect.is_clear else effect.text or "unknown"
    return f"{text} ({'; '.join(part for part in (effect.ends, effect.note) if part)})"
