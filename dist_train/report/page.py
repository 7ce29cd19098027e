"""The report as one file that asks for nothing from outside: HTML, or tables in Markdown."""

from __future__ import annotations

import base64
import hashlib
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

from jinja2 import Environment, FileSystemLoader, StrictUndefined
from markupsafe import Markup

from dist_train import __version__
from dist_train.outcome import UsageError
from dist_train.report import facts
from dist_train.report.comparisons import Effect, EffectTable, Scatter, effect_tables, sharpness_scatters, strip_plot
from dist_train.report.curves import curve_records, run_curves, study_curves
from dist_train.report.landscape_charts import landscape_figure, plane_pictures, run_landscapes
from dist_train.report.measures import Measure, measures_of, sharpness_of
from dist_train.report.stored_run import StoredRun, Subject, read_subject
from dist_train.report.tables import Cell, VariantTable, run_cells, run_table, variant_tables
from dist_train.report.variants import Panel, Variant, panels_of, shown
from dist_train.rundir import atomic

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


_FOLDER = Path(__file__).parent
_COLOURS = 9
"""Colours of the style sheet beside the base line's; further variants have them again, dashed."""


@dataclass(frozen=True)
class Key:
    """A series that the reader can switch on and off: a class of the style sheet and its words."""

    style: str
    label: str


def write_report(directory: Path, output: Path) -> Subject:
    """Write the page of the run, the study or the folder of runs in `directory`; its tables alone to a file *.md.

    Raises:
        UsageError: there is no run, or `output` cannot be written.
    """
    subject = read_subject(directory)
    text = tables_in_markdown(subject) if output.suffix == ".md" else render(subject)
    try:
        atomic.write_text(output, text)
    except OSError as error:
        raise UsageError(
            f"cannot write {output} ({error.strerror or error}): choose another file with -o FILE"
        ) from error
    return subject


def render(subject: Subject, now: datetime | None = None) -> str:
    """Return the page as HTML."""
    environment = Environment(
        loader=FileSystemLoader(_FOLDER),
        autoescape=True,
        undefined=StrictUndefined,
        trim_blocks=True,
        lstrip_blocks=True,
    )
    environment.filters["shown"] = shown
    environment.filters["sentence"] = _sentence
    only = subject.runs[0] if subject.kind == "run" else None
    content = _of_run(only) if only else _of_study(subject)
    script = (_FOLDER / "script.js").read_text(encoding="utf-8")
    style = (_FOLDER / "style.css").read_text(encoding="utf-8") + _series_rules(content["keys"])
    # files of this folder and numbers of variants; what runs say of themselves is escaped
    trusted_style, trusted_script = Markup(style), Markup(script)  # nosec B704
    template = environment.get_template("run.html.jinja" if only else "study.html.jinja")
    return template.render(
        title=subject.title,
        subject=subject,
        made=f"{now or datetime.now(UTC):%Y-%m-%d %H:%M} UTC",
        policy=_policy(style, script),
        style=trusted_style,
        script=trusted_script,
        version=__version__,
        commands=facts.commands(subject),
        environment=(*facts.environment(subject.runs), *facts.versions(subject.runs)),
        **content,
    )


def _of_study(subject: Subject) -> dict[str, Any]:
    panels = panels_of(subject.runs)
    tables = variant_tables(panels)
    variants = [variant for panel in panels for variant in panel.variants]
    strip_measure = next((measure for table in tables for measure in table.measures), None)
    return {
        "panels": panels,
        "strips": strip_plot(panels, strip_measure) if strip_measure else (),
        "curves": study_curves(panels),
        "trained_noisily": _are_batches(variants),
        "tables": tables,
        "effects": effect_tables(panels),
        "landscapes": landscape_figure(panels),
        "planes": plane_pictures(subject.runs),
        "scatters": sharpness_scatters(panels),
        "sharpness_left_out": _sharpness_left_out([run for variant in variants for run in variant.counted]),
        "runs": run_table(panels),
        "repeated": [pair for variant in variants for pair in variant.repeated.items()],
        "troubled": [run for run in subject.runs if not run.is_finished],
        "problems": [(run, problem) for run in subject.runs for problem in run.analyses.problems],
        "shared": facts.shared_settings(subject.runs),
        "again": [(run, command) for run in subject.runs if (command := facts.command_of(run))],
        "keys": tuple(
            dict.fromkeys(Key(f"s{variant.colour}", variant.label) for variant in variants if variant.counted)
        ),
    }


def _of_run(run: StoredRun) -> dict[str, Any]:
    measures = measures_of([run])
    return {
        "run": run,
        "numbers": tuple(zip(measures, run_cells(run, measures), strict=True)),
        "curves": run_curves(run),
        "landscapes": run_landscapes(run),
        "planes": plane_pictures([run]),
        "sections": facts.sections_of(run),
        "checkpoints": facts.checkpoints_of(run),
        "events": facts.events_of(run),
        "problems": run.analyses.problems,
        "keys": (),
    }


def _sharpness_left_out(runs: Sequence[StoredRun]) -> int:
    """Return how many results were made with other settings or at an earlier step, and stand in no table."""
    return sum(len(run.analyses.sharpness) for run in runs) - len(sharpness_of(runs))


def _are_batches(variants: Sequence[Variant]) -> bool:
    """Whether a curve of the training split is made of updates, for want of evaluations."""
    return any(
        curve_records(run, "train") and not run.split("train") for variant in variants for run in variant.counted
    )


def _sentence(text: str) -> str:
    return text[:1].upper() + text[1:]


def _series_rules(keys: Sequence[Key]) -> str:
    """Return the rules that give each series its colour, and hide it while its box is not ticked."""
    styles = [*(key.style for key in keys), "loss", "accuracy", "train", "test"]
    rules = [
        f".figure:has(input[value={style}]:not(:checked)) .series.{style}{{display:none}}"
        for style in dict.fromkeys(styles)
    ]
    for key in keys:
        number = int(key.style[1:])
        if number > _COLOURS:
            rules.append(f".{key.style}{{--c:var(--c{(number - 1) % _COLOURS + 1});--dash:7 3}}")
    return "\n".join(rules) + "\n"


def _policy(style: str, script: str) -> str:
    """Return the content security policy: nothing is fetched, and no code runs but ours."""
    return f"default-src 'none'; style-src '{_digest(style)}'; script-src '{_digest(script)}'; img-src data:; " + (
        "base-uri 'none'; form-action 'none'"
    )


def _digest(text: str) -> str:
    return "sha256-" + base64.b64encode(hashlib.sha256(text.encode()).digest()).decode()
