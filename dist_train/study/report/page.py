"""The page: template, style and script put together into one file that asks for nothing from outside."""

from __future__ import annotations

import base64
import hashlib
from collections.abc import Sequence
from dataclasses import dataclass
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

from jinja2 import Environment, FileSystemLoader, StrictUndefined
from markupsafe import Markup

from dist_train import __version__, atomic
from dist_train.outcome import UsageError
from dist_train.study.report import facts
from dist_train.study.report.comparisons import sharpness_scatters
from dist_train.study.report.curves import curve_records, run_curves, study_curves
from dist_train.study.report.effects import effect_tables
from dist_train.study.report.landscape_charts import landscape_figure, plane_pictures, run_landscapes
from dist_train.study.report.markdown import tables_in_markdown
from dist_train.study.report.measures import measures_of, sharpness_of
from dist_train.study.report.reading import Subject, read_subject
from dist_train.study.report.stored_run import StoredRun
from dist_train.study.report.strip import strip_plot
from dist_train.study.report.tables import run_cells, run_table, variant_tables
from dist_train.study.report.variants import Variant, panels_of, shown

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
