"""The figures of a report, numbered in their order on the page, for the page and for files."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field, replace

from dist_train.report.edge import sharpness_courses
from dist_train.report.figures import Scatter, Strip, run_curves, strips, study_curves
from dist_train.report.landscape_charts import LandscapeFigure, Plane, planes_of, run_landscapes
from dist_train.report.measures import Measure
from dist_train.report.stored_run import StoredRun
from dist_train.report.variants import Panel
from dist_train.watch.figure import Chart

_BATCHES = {"batch": "train, each batch", "train": "train split", "test": "test split"} | {
    "validation": "validation split",
    **{f"{split}-averaged": f"{split} split, averaged weights" for split in ("train", "validation", "test")},
}
_LINES = {"loss": "loss, left axis", "accuracy": "accuracy, right axis", "train": "train", "test": "test"}


@dataclass(frozen=True)
class NumberedFigure:
    """Rows of panels, or planes, under one title; `legend` is what readers can switch on the page, by style."""

    key: str
    title: str
    rows: tuple[tuple[Chart | Strip, ...], ...] = ()
    planes: tuple[Plane, ...] = ()
    legend: Mapping[str, str] = field(default_factory=dict)
    number: int = 0


def figures_of_run(run: StoredRun) -> dict[str, NumberedFigure]:
    """Return the figures of one run, by key; those without content are left out."""
    curves = run_curves(run)
    drawn = {series.style for chart in curves for series in chart.series}
    legend = {style: label for style, label in _BATCHES.items() if style in drawn}
    return _numbered(
        NumberedFigure("curves", "Learning curves and rates", (curves,), legend=legend),
        NumberedFigure("landscapes", "The loss around the solution", (run_landscapes(run),), legend=_LINES),
        NumberedFigure("planes", "Planes through the solution", planes=planes_of([run])),
    )


def figures_of_study(
    panels: Sequence[Panel],
    runs: Sequence[StoredRun],
    measure: Measure | None,
    landscape: LandscapeFigure,
    scatters: Sequence[Scatter],
) -> dict[str, NumberedFigure]:
    """Return the figures of several runs, by key; `measure` is the one shown at a glance."""
    legend = dict(_legend(panels))
    around = tuple(row for row in (landscape.panels, landscape.others) if row)
    return _numbered(
        NumberedFigure("glance", "At a glance", (strips(panels, measure),) if measure else ()),
        NumberedFigure("curves", "Learning curves", study_curves(panels), legend=legend),
        NumberedFigure("landscapes", "The loss around the solutions", around, legend=_LINES),
        NumberedFigure("between", "Between two solutions", (landscape.between,), legend=_LINES),
        NumberedFigure("planes", "Planes through the solutions", planes=planes_of(runs)),
        NumberedFigure(
            "sharpness",
            "Sharpness against generalization",
            (tuple(scatter.chart for scatter in scatters),),
            legend=legend,
        ),
        NumberedFigure("course", "Sharpness along training", (sharpness_courses(panels),), legend=legend),
    )


def _numbered(*figures: NumberedFigure) -> dict[str, NumberedFigure]:
    found = [figure for figure in figures if any(figure.rows) or figure.planes]
    return {figure.key: replace(figure, number=number) for number, figure in enumerate(found, start=1)}


def _legend(panels: Sequence[Panel]) -> Iterator[tuple[str, str]]:
    """Yield style and label of the variants that have begun, base lines first; base lines may differ by panel."""
    labels: dict[int, dict[str, None]] = {}
    for variant in (variant for panel in panels for variant in panel.variants if variant.counted):
        labels.setdefault(variant.colour, {})[variant.label] = None
    yield from ((f"s{colour}", " / ".join(words)) for colour, words in labels.items())
