"""The report as one self-contained file: an HTML page, or its tables in Markdown."""

from __future__ import annotations

import base64
import hashlib
import shlex
from collections import Counter
from collections.abc import Iterable, Iterator, Mapping, Sequence
from datetime import UTC, datetime
from functools import cache
from pathlib import Path
from typing import Any

from jinja2 import Environment, FileSystemLoader, StrictUndefined
from markupsafe import Markup

from dist_train import __version__
from dist_train.monitoring import wording
from dist_train.outcome import UsageError, writing
from dist_train.report.chart import ROLES, Frame, style_rules, ticks
from dist_train.report.figures import NumberedFigure, figures_of_run, figures_of_study
from dist_train.report.measures import measures_of, mixes_statistics, sharpness_left_out, sharpness_settings
from dist_train.report.sharpness_charts import sharpness_scatters
from dist_train.report.stored_run import StoredRun, Subject, read_subject
from dist_train.report.tables import contrast_tables, effect_tables, evaluates_along_training, run_cells, variant_tables
from dist_train.report.variants import DEFAULTS, Panel, counted_runs, panels_of, shown
from dist_train.rundir import atomic
from dist_train.rundir.paths import RunDirectory, StudyDirectory

_FOLDER = Path(__file__).parent


def tables_in_markdown(subject: Subject) -> str:
    """Return the tables of variants, differences from the baseline, contrasts and rank correlations."""
    content = _content_of_tables(subject)
    groups: dict[str, dict[str, None]] = {}
    for found in (found for scatter in content["scatters"] for found in scatter.correlations):
        groups.setdefault(found.other, {})[found.among] = None
    correlations = {other: list(among) for other, among in groups.items()}
    template = _templates().get_template("tables.md.jinja")
    text = template.render(subject=subject, correlations=correlations, **content)
    return f"{text.rstrip()}\n" if text.strip() else ""


def write_report(directory: Path, output: Path) -> Subject:
    """Write the page about the run, study or folder of runs in `directory`; if `output` is *.md, only its tables.

    Raises UsageError if there is no run, or `output` cannot be written or is neither *.html nor *.md.
    """
    if not output.name or output.is_dir():
        raise UsageError(f"{output} is a folder: name a file in it, as with -o report.html", code="report-form")
    form = output.suffix.lower()
    if form not in (".html", ".htm", ".md"):
        page = output.with_suffix(".html")
        raise UsageError(
            f"cannot write {output}: a report is a page (*.html) or its tables (*.md). For a PDF print the page: "
            f"dist-train report {directory} -o {page}, then chromium --headless --no-pdf-header-footer "
            f"--print-to-pdf={output} {page}. For the figures only: --figures FOLDER --format pdf",
            code="report-form",
        )
    subject = read_subject(directory)
    text = tables_in_markdown(subject) if form == ".md" else render(subject)
    with writing(output, "choose another file with -o FILE"):
        # the name of a run in it may not be UTF-8
        atomic.write_bytes(output, text.encode(errors="backslashreplace"), is_shared=True)
    return subject


def render(subject: Subject, now: datetime | None = None) -> str:
    """Return the page as HTML."""
    templates = _templates()
    content = _content(subject)
    script = (_FOLDER / "script.js").read_text(encoding="utf-8")
    style = (_FOLDER / "style.css").read_text(encoding="utf-8") + "\n".join(_series_rules(content))
    # Only files of this folder and variants' numbers are trusted; text from runs is escaped.
    trusted_style, trusted_script = Markup(style), Markup(script)  # nosec B704
    template = templates.get_template("run.html.jinja" if subject.kind == "run" else "study.html.jinja")
    return template.render(
        title=subject.title,
        subject=subject,
        made=f"{now or datetime.now(UTC):%Y-%m-%d %H:%M} UTC",
        policy=_policy(style, script),
        style=trusted_style,
        script=trusted_script,
        version=__version__,
        commands=_commands(subject),
        environment=(*_launch_facts(subject.runs), *versions(subject.runs)),
        **content,
    )


@cache  # compiling them takes a tenth of a second
def _templates() -> Environment:
    # HTML is escaped; in the Markdown there is nothing to escape.
    environment = Environment(  # nosec B701
        loader=FileSystemLoader(_FOLDER),
        autoescape=lambda name: name is None or not name.endswith(".md.jinja"),
        undefined=StrictUndefined,
        trim_blocks=True,
        lstrip_blocks=True,
    )
    environment.filters |= {
        "shown": shown,
        "epochs": wording.epochs,
        "frame": Frame,
        "ticks": ticks,
        "sentence": lambda text: text[:1].upper() + text[1:],
        "quoted": lambda value: shlex.quote(str(value)),
        "base64": lambda path: base64.b64encode(path.read_bytes()).decode(),
    }
    return environment


def figures_of(subject: Subject) -> tuple[NumberedFigure, ...]:
    """Return the figures of the page, in order."""
    figures: Mapping[str, NumberedFigure] = _content(subject)["figures"]
    return tuple(figures.values())


def _content(subject: Subject) -> dict[str, Any]:
    return _run_content(subject.runs[0]) if subject.kind == "run" else _study_content(subject)


def _content_of_tables(subject: Subject) -> dict[str, Any]:
    """Return what the page of several runs and their tables in Markdown have in common."""
    panels = panels_of(subject.runs)
    return {
        "panels": panels,
        "unfinished": [run for run in subject.runs if not run.is_finished],
        "notices": tuple(_notices(subject, panels)),
        "repeated": [pair for panel in panels for variant in panel.variants for pair in variant.repeated.items()],
        "tables": variant_tables(panels),
        "effects": effect_tables(panels),
        "contrasts": contrast_tables(panels, subject.contrasts),
        "evaluates_along_training": evaluates_along_training(panels),
        "scatters": sharpness_scatters(panels),
        "sharpness_settings": sharpness_settings(counted_runs(panels)),
    }


def _notices(subject: Subject, panels: Sequence[Panel]) -> Iterator[str]:
    """Yield what a reader of the tables must know about the runs as a whole."""
    if subject.fault:
        yield subject.fault
    if subject.others:
        others = ", ".join(subject.others)
        yield f"Finished or diverged runs in this folder that the study does not have, and that do not count: {others}."
    if subject.range_tests:
        yield f"Learning-rate range tests in this folder, which do not count: {', '.join(subject.range_tests)}."
    if len(data_sets := sorted({run.data for run in subject.runs} - {""})) > 1:
        yield (
            f"The runs are of {len(data_sets)} data sets ({', '.join(data_sets)}). Runs of different ones are never "
            "paired, but correlations and the axes of figures include all: report each data set on its own."
        )
    for variant in (each for panel in panels for each in panel.variants):
        sizes = {shown(size) for run in variant.counted if (size := run.settings.get("batch.micro_size"))}
        if len(sizes) > 1:
            yield (
                f"Runs of {variant.title} have micro-batches of {' and '.join(sorted(sizes))} samples, on which norms "
                "and noise may depend: set batch.micro_size, which by default each run chooses for its ranks."
            )
    counted = counted_runs(panels)
    codes: dict[str, set[str]] = {}
    for name, digest in (item for run in counted for item in run.plugins.items()):
        codes.setdefault(name, set()).add(digest)
    # In a folder of runs another code makes another variant.
    if subject.kind == "study" and (edited := [name for name, digests in codes.items() if len(digests) > 1]):
        yield (
            f"The code of {', '.join(edited)} was edited between these runs, which differ by that, too: move those "
            "with the other code away, and start the sweep again."
        )
    lengthened = [run.name for run in counted if any(event.event == "lengthened" for event in run.events)]
    if 0 < len(lengthened) < len(counted):
        yield (
            f"Runs that were lengthened ({', '.join(lengthened)}) are beside runs that were not: unless their "
            "schedules are constant, they are not runs of this length from the beginning."
        )
    if mixes_statistics(counted):
        yield (
            "The norms' statistics are running averages in some runs, recomputed in others (by default those with "
            "noise). In models with norms this alone changes accuracies and losses after few updates, and sharpness "
            "unless it was measured with --statistics recomputed or batch. Set model.norm_statistics."
        )


def _study_content(subject: Subject) -> dict[str, Any]:
    tables = _content_of_tables(subject)
    panels: Sequence[Panel] = tables["panels"]
    counted = counted_runs(panels)
    variants = [variant for panel in panels for variant in panel.variants]
    measures = measures_of([run for variant in variants for run in variant.runs])
    glance = measures[0] if tables["tables"] else None
    return {
        **tables,
        "figures": figures_of_study(panels, subject.runs, glance, tables["scatters"]),
        "styles": {f"s{variant.colour}" for variant in variants},
        # Some curve of the training split shows updates, because the split was not evaluated.
        "trained_noisily": any(run.train and not run.split("train") for run in counted),
        "sharpness_left_out": sharpness_left_out(counted),
        "measures": measures,
        "runs": [(run, variant, run_cells(run, measures)) for variant in variants for run in variant.runs],
        "problems": [(run, problem) for run in subject.runs for problem in run.analyses.problems],
        "shared": _shared_settings(subject.runs),
        "run_commands": [(run, command) for run in subject.runs if (command := _command_of(run))],
    }


def _run_content(run: StoredRun) -> dict[str, Any]:
    measures = measures_of([run])
    return {
        "run": run,
        "numbers": tuple(zip(measures, run_cells(run, measures), strict=True)),
        "sharpness_left_out": sharpness_left_out([run]),
        "sharpness_settings": sharpness_settings([run]),
        "figures": figures_of_run(run),
        "styles": {"s0"},
        "sections": _sections_of(run.settings),
        "checkpoints": [event for event in run.events if event.event == "checkpoint" and event.details.get("path")],
        "kept": {path.name for path in RunDirectory(run.directory).checkpoints.glob("*.pt")},
        "events": [wording.event(event) for event in run.events if event.event != "checkpoint"],
        "problems": run.analyses.problems,
    }


def _series_rules(content: Mapping[str, Any]) -> Iterator[str]:
    """Yield the CSS rules that style each series, and hide it while its checkbox is not ticked."""
    yield from style_rules((*sorted(content["styles"]), *ROLES))
    switched = {style for figure in content["figures"].values() for style in figure.legend}
    yield from (
        f".figure:has(input[value={style}]:not(:checked)) .series.{style}{{display:none}}" for style in sorted(switched)
    )


def _policy(style: str, script: str) -> str:
    """Return the content security policy: nothing is fetched, and only our own code runs."""
    ours = f"style-src '{_digest(style)}'; script-src '{_digest(script)}'; img-src data:"
    return f"default-src 'none'; {ours}; base-uri 'none'; form-action 'none'"


def _digest(text: str) -> str:
    return "sha256-" + base64.b64encode(hashlib.sha256(text.encode()).digest()).decode()


_NOT_RECORDED = "not recorded"
Sections = Mapping[str, Sequence[tuple[str, str, bool]]]
"""Settings by section: name, value, and whether it is the default."""


def _sections_of(settings: Mapping[str, object]) -> Sections:
    """Return `settings`, keyed by dotted path, grouped by section."""
    sections: dict[str, list[tuple[str, str, bool]]] = {}
    for path, value in settings.items():
        section, _, name = path.partition(".")
        is_default = path in DEFAULTS and DEFAULTS[path] == value
        sections.setdefault(section, []).append((name or section, "-" if value is None else shown(value), is_default))
    return sections


def _shared_settings(runs: Sequence[StoredRun]) -> Sections:
    """Return the settings that all `runs` share, by section."""
    first, *others = [run.settings for run in runs if run.settings] or [{}]
    return _sections_of(dict(item for item in first.items() if all(item in each.items() for each in others)))


def _launch_facts(runs: Sequence[StoredRun]) -> tuple[tuple[str, str], ...]:
    """Return where and when `runs` ran, as pairs of name and value."""
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
    """Return the recorded versions and devices as pairs of name and value; if runs differ, with the number of each."""
    recorded = [run.status.environment for run in runs if run.status]
    if recorded and not any(recorded):
        return (("versions", _NOT_RECORDED),)
    rows = []
    for name in dict.fromkeys(name for environment in recorded for name in environment):
        counts = Counter(environment.get(name, _NOT_RECORDED) for environment in recorded).most_common()
        differ = "runs differ: " + ", ".join(f"{value} ({count})" for value, count in counts)
        rows.append((name, differ if len(counts) > 1 else counts[0][0]))
    return tuple(rows)


def _commands(subject: Subject) -> tuple[str, ...]:
    """Return the commands that reproduce the run (if it is a single one) and this page."""
    folder = shlex.quote(str(subject.directory))
    report = f"dist-train report {folder}"
    if subject.kind != "run":
        return (report,)
    settings, config = subject.runs[0].settings, RunDirectory(subject.directory).config
    words = ["dist-train", "train", str(config), f"run.name={settings.get('run.name', 'run')}-again"]
    # One that began from the checkpoint of another run begins from that again.
    words += ["run.resume=never"] if settings.get("run.resume", "auto") == "auto" else []
    return (shlex.join(words), report)


def _command_of(run: StoredRun) -> str:
    """Return the command that reproduces a study's run; empty if the study does not record it."""
    if run.planned is None or not run.planned.overrides:
        return ""
    return shlex.join(["dist-train", "train", str(StudyDirectory(run.directory.parent).base), *run.planned.overrides])


def _listed(values: Iterable[str]) -> str:
    return ", ".join(sorted({value for value in values if value}))


def _span(moments: Sequence[str]) -> str:
    try:
        known = [f"{moment:%Y-%m-%d %H:%M} UTC" for moment in sorted(map(datetime.fromisoformat, moments))]
    except ValueError:
        return ""
    return " to ".join(dict.fromkeys((*known[:1], *known[-1:])))
