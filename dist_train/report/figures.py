"""The figures of a report, numbered in page order: seeds at a glance, learning curves, landscapes, sharpness."""

from __future__ import annotations

import json
import math
import os
from collections import Counter
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field, replace
from itertools import chain
from pathlib import Path
from string import ascii_lowercase

from dist_train.analysis.landscape_files import Landscape
from dist_train.monitoring import wording
from dist_train.report.chart import WIDTH
from dist_train.report.measures import (
    FINAL_ACCURACY,
    Measure,
    commonest_settings,
    directions_of,
    mean_points,
    spread,
    summary,
)
from dist_train.report.sharpness_charts import Scatter, sharpness_courses
from dist_train.report.stored_run import StoredRun
from dist_train.report.tables import limits, variant_cell
from dist_train.report.variants import ABSENT, Panel, Variant, counted_runs, shown
from dist_train.rundir.records import EvaluationRecord, TrainRecord
from dist_train.watch.figure import (
    ACCURACY,
    LOSS,
    RATES,
    Axis,
    Chart,
    Quantity,
    Series,
    epochs_axis,
    learning_curve,
    linear_axis,
    loss_axis,
    measured_of,
    percent_tick,
    plain,
    rate_curve,
    three_digits,
)

_MOST_LINEAR = 12.0
LandscapeAxes = tuple[Axis, Axis, Axis]  # along the line; of the loss; of the accuracy
_LINES = {"loss": "loss, left axis", "accuracy": "accuracy, right axis", "train": "train", "test": "test"}


@dataclass(frozen=True)
class NumberedFigure:
    """Rows of panels, or planes, under one title, with a note below.

    `legend` maps the styles that readers can switch to their labels.
    """

    key: str
    title: str
    rows: tuple[tuple[Chart | StripPlot, ...], ...] = ()
    planes: tuple[Plane, ...] = ()
    legend: Mapping[str, str] = field(default_factory=dict)
    note: str = ""
    number: int = 0


@dataclass(frozen=True)
class _Drawn:
    """A variant with its landscapes."""

    variant: Variant
    panel: Panel
    landscapes: tuple[Landscape, ...]


def landscape_figure(panels: Sequence[Panel]) -> NumberedFigure:
    """Return the charts around solutions: baseline and one noise variant of each panel, then the other variants."""
    runs = counted_runs(panels)
    chosen = directions_of(runs)
    drawn = [
        _Drawn(variant, panel, found)
        for panel in panels
        for variant in panel.variants
        if (found := tuple(chosen[run.name] for run in variant.counted if run.name in chosen))
    ]
    first = _paper_variants(drawn)
    rest = [item for item in drawn if item not in first]
    # The same axes for all, so that widths can be compared.
    axes = landscape_axes([item for group in drawn for item in group.landscapes])
    # Letters as in the paper: a and b for SB without and with noise, c and d for LB.
    places = [2 * panels.index(item.panel) + (not item.variant.is_base) for item in first]
    as_in_the_paper = tuple(
        _around(f"landscape-{at}", item, ascii_lowercase[place % 26], axes)
        for at, (item, place) in enumerate(zip(first, places, strict=True))
    )
    others = tuple(_around(f"landscape-other-{index}", item, "", axes) for index, item in enumerate(rest))
    settings = json.loads(next(iter(chosen.values())).shared_settings) if chosen else {}
    values = {name.replace("_", " "): json.dumps(value).strip('"') for name, value in settings.items()}
    note = f"{'; '.join(f'{name}: {value}' for name, value in values.items())}."
    if left_out := sum(len(run.analyses.of_kind("direction")) for run in runs) - len(chosen):
        note += f" {left_out} results made with other settings or at earlier steps are not drawn."
    rows = tuple(filter(None, (as_in_the_paper, others)))
    return NumberedFigure("landscapes", "The loss around the solutions", rows, legend=_LINES, note=note)


def run_landscapes(run: StoredRun) -> tuple[Chart, ...]:
    """Return a chart of every landscape along lines from a checkpoint of `run`."""
    found = _told_apart((_line_title(item), item) for item in run.analyses.landscapes if item.kind != "plane")
    return tuple(
        landscape_chart(f"run-landscape-{number}", title, f". {title}", [item], _statistics_of(item))
        for number, (title, item) in enumerate(found)
    )


def _statistics_of(item: Landscape) -> str:
    found = item.settings.get("statistics", "none")
    return "" if found == "none" else f"norm statistics {found}"


def _line_title(item: Landscape) -> str:
    if item.kind != "interpolate":
        return f"Along random directions{_step(item)}"
    first, last = (f"{root.name} step {step:,}" for root, step in zip(item.roots, item.steps, strict=True))
    return f"From {first} (0) to {last} (1)"


def _told_apart(titled: Iterable[tuple[str, Landscape]]) -> Iterator[tuple[str, Landscape]]:
    """Yield titles and landscapes; equal titles with the settings that differ between their landscapes."""
    found = [(title, item, json.loads(item.shared_settings)) for title, item in titled]
    for title, item, own in found:
        alike = [settings for other, _, settings in found if other == title]
        names = dict.fromkeys(name for each in alike for name in each)
        differing = [name for name in names if any(each.get(name) != own.get(name) for each in alike)]
        words = [f"{name.replace('_', ' ')} {shown(own.get(name, ABSENT))}" for name in differing]
        yield ", ".join([title, *words]), item


@dataclass(frozen=True)
class Plane:
    """A plane through a solution, as `dist-train landscape plane` has drawn it."""

    title: str
    folder: Path

    def picture(self, form: str) -> Path:
        """Return the path of its figure; `form` is svg, pdf or png."""
        return self.folder / f"figure.{form}"


def planes_of(runs: Sequence[StoredRun]) -> tuple[Plane, ...]:
    """Return the planes of `runs` whose figure exists."""
    found = _told_apart((f"{run.name}{_step(item)}", item) for run in runs for item in run.analyses.of_kind("plane"))
    every = (Plane(title, item.folder) for title, item in found)
    return tuple(plane for plane in every if plane.picture("svg").is_file())


def _step(landscape: Landscape) -> str:
    return f", step {landscape.step:,}"


def _paper_variants(drawn: Sequence[_Drawn]) -> list[_Drawn]:
    """Return the baselines and one noise variant: of those in every panel, the most accurate at the largest batch."""
    noisy = [item for item in drawn if item.variant.has_noise and not item.variant.is_base]
    labels: dict[str, set[str]] = {}
    for item in noisy:
        labels.setdefault(item.panel.title, set()).add(item.variant.label)
    common = set.intersection(*labels.values()) if labels else set()
    candidates = [item for item in noisy if item.variant.label in common or not common]

    def rank(item: _Drawn) -> tuple[int, float]:
        accuracy = item.variant.summary(FINAL_ACCURACY)
        return item.panel.batch or 0, accuracy.mean if accuracy else 0.0

    label = max(candidates, key=rank).variant.label if candidates else None
    return [item for item in drawn if item.variant.is_base or item.variant.label == label]


def landscape_axes(landscapes: Sequence[Landscape], scale: str = "auto") -> LandscapeAxes:
    """Return axes for all of `landscapes`; `scale`: that of the loss, linear, log, or auto (linear unless very large).

    A linear axis of the loss starts at 0, as in the paper.
    """
    points = [point for landscape in landscapes for point in landscape.rows]
    losses = [point.loss for point in points if math.isfinite(point.loss)]
    positive = [loss for loss in losses if loss > 0]
    most = max(losses, default=0.0)
    if scale == "log" and positive:
        height = Axis("loss", min(positive) / 1.1, most * 1.1, plain, is_logarithmic=True)
    elif scale == "auto" and most > _MOST_LINEAR:
        height = loss_axis("loss", losses)
    else:
        height = Axis("loss", 0.0, most * 1.03 or 1.0, plain)
    least = min((point.accuracy for point in points if math.isfinite(point.accuracy)), default=0.0)
    return (
        linear_axis("distance along the direction, \u03b1", [point.alpha for point in points], plain, margin=0.0),
        height,
        Axis("accuracy, %", 0.0 if least < 0.5 else 0.5, 1.02, percent_tick),
    )


def _around(key: str, drawn: _Drawn, letter: str, axes: LandscapeAxes) -> Chart:
    lines = sum(len(item.lines("train")) for item in drawn.landscapes)
    note = f"{wording.plural(lines, 'line')}, {wording.plural(len(drawn.landscapes), 'run')}"
    title = drawn.variant.title
    described = f", around the solution of {title}; {note}"
    return replace(landscape_chart(key, title, described, drawn.landscapes, note, axes), letter=letter)


def landscape_chart(
    key: str,
    title: str,
    described: str,
    landscapes: Sequence[Landscape],
    note: str = "",
    axes: LandscapeAxes | None = None,
) -> Chart:
    """Return the mean lines of `landscapes`, and their widths after `note`; `axes`: by default their own."""
    x, left, right = axes or landscape_axes(landscapes)
    if landscapes[0].kind == "interpolate":
        x = replace(x, title="\u03b1")
    series = tuple(
        drawn
        for split in ("train", "test")
        for quantity in (LOSS, ACCURACY)
        if (drawn := _mean_line(landscapes, split, quantity)).points
    )
    note = "; ".join(filter(None, (note, _widths(landscapes))))
    description = f"Loss (left) and accuracy (right), train and test{described}."
    return Chart(key, title, description, x, left, series, right, note=note, upright=0.0)


def lines_between(panels: Sequence[Panel]) -> tuple[Chart, ...]:
    """Return a chart for every pair of variants with lines between their runs: the mean over these lines.

    Only lines between last checkpoints are drawn, and of those between two runs of one variant one direction.
    """
    variants = [variant for panel in panels for variant in panel.variants]
    known = {os.path.abspath(run.directory): (each.title, run) for each in variants for run in each.runs}
    pairs = Counter[str]()
    drawn: dict[str, dict[tuple[frozenset[str], str], Landscape]] = {}
    for variant in variants:
        for run in variant.counted:
            for item in run.analyses.of_kind("interpolate"):
                # Both runs may have been moved since, together.
                there = os.path.abspath(run.directory / os.path.relpath(item.roots[-1], item.roots[0]))
                other, end = known.get(there, (f"{item.roots[-1].name} step {item.steps[-1]:,}", None))
                pair = f"{variant.title} (0) to {other} (1)"
                pairs[pair] += 1
                lasts = run.analyses.last_step, end.analyses.last_step if end else None
                ends = frozenset((os.path.abspath(run.directory), there))
                if len(ends) > 1 and all(last in (None, step) for last, step in zip(lasts, item.steps, strict=True)):
                    drawn.setdefault(pair, {}).setdefault((ends, item.shared_settings), item)
    charts: list[Chart] = []
    for title, by_ends in drawn.items():
        settings = commonest_settings(list(by_ends.values()))
        comparable = [item for item in by_ends.values() if item.shared_settings == settings]
        left_out = pairs[title] - len(comparable)
        words = [f"{len(comparable)} lines"] if len(comparable) > 1 else []
        words += [f"{left_out} left out (earlier checkpoints, other settings or the way back)"] if left_out else []
        note = ", ".join(filter(None, [*words, _statistics_of(comparable[0])]))
        charts.append(landscape_chart(f"between-{len(charts)}", title, f". {title}", comparable, note))
    return tuple(charts)


def _mean_line(landscapes: Sequence[Landscape], split: str, quantity: Quantity) -> Series:
    values: dict[float, list[float]] = {}
    for point in chain.from_iterable(line for item in landscapes for line in item.lines(split)):
        values.setdefault(point.alpha, []).append(quantity.take(point))
    # Where one is not finite, the mean of the others would be too low.
    complete = (each for each in sorted(values.items()) if all(map(math.isfinite, each[1])))
    write = three_digits if quantity is LOSS else quantity.text
    return Series(
        f"{split} {quantity.name}",
        f"{quantity.name} {split}",
        mean_points(complete, lambda found: write(found.mean)),
        "dashed" if split == "test" else "line",
        "left" if quantity is LOSS else "right",
    )


def _widths(landscapes: Sequence[Landscape]) -> str:
    keys = dict.fromkeys(key for item in landscapes for key in item.widths_by_key)
    found = []
    for basin, factor in keys:
        chosen = [(item, width) for item in landscapes if (width := item.widths_by_key.get((basin, factor)))]
        mean = summary([width.mean for _, width in chosen], sum(width.open > 0 for _, width in chosen))
        if mean:
            deviation = "" if mean.deviation is None else f" ± {spread(three_digits, mean.mean, mean.deviation)}"
            least = "\u2265 " if mean.censored else ""
            where = f" of {basin}" if chosen[0][0].kind == "interpolate" else ""
            note = limits(mean.count, mean.censored, sum(item.unresolved(width) > 0 for item, width in chosen))
            found.append(f"{least}{three_digits(mean.mean)}{deviation}{where} (loss under {factor} x; {note})")
    return "width " + "; ".join(found) if found else ""


_MOST_POINTS = 400
_ROWS = (("test", ACCURACY), ("train", ACCURACY), ("test", LOSS), ("train", LOSS))


def study_curves(panels: Sequence[Panel]) -> tuple[tuple[Chart, ...], ...]:
    """Return rows of charts (test and train accuracy, test and train loss) with one chart per panel."""
    rows: list[tuple[Chart, ...]] = []
    for split, quantity in _ROWS:
        found = [(panel, [_mean_curve(variant, split, quantity) for variant in panel.variants]) for panel in panels]
        drawn = [(panel, curves) for panel, each in found if (curves := tuple(it for it in each if it.points))]
        if drawn:
            axis = quantity.axis(f"{split} {quantity.title}", [it.points for _, curves in drawn for it in curves])
            charts = (
                _curve_chart(f"curve-{len(rows)}-{panels.index(panel)}", panel, axis, curves) for panel, curves in drawn
            )
            rows.append(tuple(charts))
    return tuple(rows)


def _mean_curve(variant: Variant, split: str, quantity: Quantity) -> Series:
    values: dict[int, list[tuple[float, float]]] = {}
    for run in variant.counted:
        # A training split that was not evaluated is drawn by its updates.
        records: Sequence[TrainRecord | EvaluationRecord] = run.split(split) or (run.train if split == "train" else ())
        for record in records:
            if math.isfinite(quantity.take(record)):
                values.setdefault(record.step, []).append((record.epoch, quantity.take(record)))
    every = max(1, math.ceil(len(values) / _MOST_POINTS))
    # Thinned from the end: the last point is the result.
    points = mean_points(
        ((values[step][0][0], [value for _, value in values[step]]) for step in sorted(values)[::-every][::-1]),
        lambda found: f"{quantity.text(found.mean, found.deviation)} (n = {found.count})",
    )
    return Series(variant.label, f"s{variant.colour}", points)


def _curve_chart(key: str, panel: Panel, axis: Axis, series: tuple[Series, ...]) -> Chart:
    ends = "; ".join(f"{item.label} {item.points[-1].text}" for item in series)
    description = f"{axis.title} against epochs, {panel.title}. At the end: {ends}."
    return Chart(key, panel.title, description, epochs_axis(series), axis, series)


_STRIP_LETTERS = 54  # of label and mean together, in the width of a strip
_LEAST_LABEL = 8


@dataclass(frozen=True)
class StripPlot:
    """The variants of a panel that have `measure`, one row each, along one axis in the measure's unit."""

    width, rim = WIDTH, 10
    panel: Panel
    measure: Measure
    variants: tuple[Variant, ...]
    axis: Axis

    def x(self, value: float) -> float:
        """Return the horizontal SVG coordinate of a value of the measure."""
        share = self.axis.share(value * self.measure.factor)
        return self.rim + min(1.0, max(0.0, share)) * (self.width - 2 * self.rim)

    def label(self, variant: Variant) -> str:
        """Return the label of a variant, cut in its middle to what its `words` leave of the line."""
        label, room = variant.label, max(_LEAST_LABEL, _STRIP_LETTERS - len(self.words(variant)))
        half = room // 2
        return label if len(label) <= room else f"{label[:half].rstrip()}…{label[half + 1 - room :].lstrip()}"

    def words(self, variant: Variant) -> str:
        """Return the mean of a variant as text, and whether it is of unfinished runs."""
        cell = variant_cell(variant, self.measure)
        return ", ".join([cell.as_text, cell.note, *(["not finished"] if variant.is_provisional else [])])


def strip_plots(panels: Sequence[Panel], measure: Measure) -> tuple[StripPlot, ...]:
    """Return a strip of `measure` for each panel, on a common axis."""
    shown = [(panel, tuple(each for each in panel.variants if each.measured(measure))) for panel in panels]
    drawn = [each for _, variants in shown for each in variants]
    values = [value for each in drawn for _, value in each.measured(measure)]
    # the ends of the lines, too, of one standard deviation on both sides
    spreads = [(found.mean, found.deviation or 0.0) for each in drawn if (found := each.summary(measure))]
    values += [mean + sign * deviation for mean, deviation in spreads for sign in (-1, 1)]
    axis = linear_axis(measure.heading, [value * measure.factor for value in values], plain)
    return tuple(StripPlot(panel, measure, variants, axis) for panel, variants in shown if variants)


_SERIES_NAMES = {
    "batch": "train, each batch",
    **{split: f"{split} split" for split in ("train", "test", "validation")},
    **{f"{split}-averaged": f"{split} split, averaged weights" for split in ("train", "validation", "test")},
}


def figures_of_run(run: StoredRun) -> dict[str, NumberedFigure]:
    """Return the non-empty figures of one run, by key."""
    measured = measured_of(run.name, (*run.train, *run.evaluations))
    charts = [learning_curve(quantity, measured, _MOST_POINTS) for quantity in (ACCURACY, LOSS)]
    curves = tuple(filter(None, [*charts, *(rate_curve(quantity, measured, _MOST_POINTS) for quantity in RATES)]))
    drawn = {series.style for chart in curves for series in chart.series}
    legend = {style: label for style, label in _SERIES_NAMES.items() if style in drawn}
    return _numbered(
        NumberedFigure("curves", "Learning curves and rates", (curves,), legend=legend),
        NumberedFigure("landscapes", "The loss around the solution", (run_landscapes(run),), legend=_LINES),
        NumberedFigure("planes", "Planes through the solution", planes=planes_of([run])),
    )


def figures_of_study(
    panels: Sequence[Panel], runs: Sequence[StoredRun], measure: Measure | None, scatters: Sequence[Scatter]
) -> dict[str, NumberedFigure]:
    """Return the non-empty figures of several runs, by key; `measure` is the one shown "at a glance"."""
    labels: dict[str, dict[str, None]] = {}  # baselines may differ by panel
    for variant in (variant for panel in panels for variant in panel.variants if variant.counted):
        labels.setdefault(f"s{variant.colour}", {})[variant.label] = None
    legend = {style: " / ".join(words) for style, words in labels.items()}
    against = tuple(scatter.chart for scatter in scatters)
    return _numbered(
        NumberedFigure("glance", "At a glance", (strip_plots(panels, measure),) if measure else ()),
        NumberedFigure("curves", "Learning curves", study_curves(panels), legend=legend),
        landscape_figure(panels),
        NumberedFigure("between", "Between two solutions", (lines_between(panels),), legend=_LINES),
        NumberedFigure("planes", "Planes through the solutions", planes=planes_of(runs)),
        NumberedFigure("sharpness", "Sharpness against generalization", (against,), legend=legend),
        NumberedFigure("course", "Sharpness along training", (sharpness_courses(panels),), legend=legend),
    )


def _numbered(*figures: NumberedFigure) -> dict[str, NumberedFigure]:
    found = [figure for figure in figures if any(figure.rows) or figure.planes]
    return {figure.key: replace(figure, number=number) for number, figure in enumerate(found, start=1)}
