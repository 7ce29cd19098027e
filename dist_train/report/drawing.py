"""matplotlib figures as files: a report's, learning curves, Smith's learning-rate range tests (arXiv 1506.01186)."""

from __future__ import annotations

import csv
import io
import math
import shutil
import textwrap
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from statistics import fmean
from typing import TYPE_CHECKING, Any

from matplotlib import rc_context
from matplotlib.axes import Axes
from matplotlib.colors import to_rgb
from matplotlib.figure import Figure
from matplotlib.ticker import FixedLocator, FuncFormatter, NullFormatter, NullLocator

from dist_train.monitoring.wording import epochs
from dist_train.outcome import UsageError, writing
from dist_train.report.chart import LIGHT, SeriesStyle, style_of, ticks
from dist_train.rundir import atomic
from dist_train.rundir.metrics_file import read_records
from dist_train.rundir.paths import RunDirectory
from dist_train.rundir.records import TrainRecord
from dist_train.watch.figure import (
    ACCURACY,
    BATCH,
    LEARNING_RATE,
    LOSS,
    NOISE,
    Axis,
    Chart,
    Measured,
    Point,
    Quantity,
    Series,
    epochs_axis,
    learning_curve,
    loss_axis,
    measured_of,
    plain,
    rate_curve,
    three_digits,
)

if TYPE_CHECKING:
    from dist_train.report.figures import NumberedFigure, StripPlot


_WIDTH = 7.0  # inches: the text width of a two-column page
_LETTERS_PER_INCH = 17
_LETTERS_OF_LABEL = 28  # in a line beside a strip
_LETTERS_OF_TITLE = 76
_AXIS_INCHES = 0.8  # of a panel, for the labels of its vertical axis
_MARKS = {"dots": "o", "squares": "s"}
_MOST_MARKS = 30
STYLE: dict[Any, Any] = {
    "font.family": "DejaVu Sans",
    "font.size": 8,
    "axes.titlesize": 8,
    "axes.spines.top": False,
    "axes.spines.right": False,
    "axes.grid": True,
    "axes.linewidth": 0.6,
    "axes.edgecolor": "#606060",
    "axes.axisbelow": True,
    "grid.color": "#e4e4e4",
    "grid.linewidth": 0.6,
    "lines.linewidth": 1.2,
    "lines.markersize": 3,
    "legend.frameon": False,
    "text.parse_math": False,  # a name may hold two dollar signs
    "svg.fonttype": "path",
    "svg.hashsalt": "dist_train",
    "pdf.fonttype": 42,  # fonts that a publisher can embed and edit
}


def save_figures(figures: Sequence[NumberedFigure], folder: Path, form: str) -> tuple[Path, ...]:
    """Write `figures` into `folder` as `form` (svg, pdf, png); return the files. Raises UsageError if there is none."""
    if not figures:
        raise UsageError("there is nothing to draw yet: no run has done a step", code="no-measurement")
    with writing(folder, "choose another folder with --figures"):
        folder.mkdir(parents=True, exist_ok=True)
        return tuple(path for figure in figures for path in _save(figure, folder, form))


def _save(figure: NumberedFigure, folder: Path, form: str) -> Iterable[Path]:
    name = f"figure-{figure.number}-{figure.key}"
    for number, plane in enumerate(figure.planes, start=1):
        # Older results have an SVG only.
        picture = next(path for path in map(plane.picture, (form, "svg")) if path.is_file())
        path = folder / f"{name}-{number}{picture.suffix}"
        shutil.copyfile(picture, path)
        yield path
    if figure.rows:
        path = folder / f"{name}.{form}"
        with rc_context(STYLE):
            save(_draw(figure), path)
        yield path


def save(figure: Figure, path: Path) -> None:
    """Write `figure` to `path` in the format of its suffix; the same figure gives the same bytes."""
    form = path.suffix[1:].lower()
    undated: dict[str, dict[str, Any]] = {"svg": {"Date": None}, "pdf": {"CreationDate": None}}
    with rc_context(STYLE), atomic.replacing(path, is_shared=True) as file:
        figure.savefig(file, format=form, dpi=160, metadata=undated.get(form))


def _draw(numbered: NumberedFigure) -> Figure:
    most = 3 if numbered.key == "sharpness" else 2
    rows = [row[at : at + most] for row in numbered.rows for at in range(0, len(row), most)]
    columns = max(map(len, rows))
    heights = [max(map(_height, row)) for row in rows]
    figure = Figure(figsize=(_WIDTH if columns > 1 else _WIDTH / 2, 0.3 + sum(heights)), layout="constrained")
    grid = figure.subplots(len(rows), columns, squeeze=False, height_ratios=heights)
    in_title = int((figure.get_figwidth() / columns - _AXIS_INCHES) * _LETTERS_PER_INCH)
    for panels, places in zip(rows, grid, strict=True):
        for axes in places[len(panels) :]:
            axes.remove()
        for panel, axes in zip(panels, places, strict=False):
            if isinstance(panel, Chart):
                _draw_chart(axes, replace(panel, note=""))
            else:
                _draw_strip(axes, panel)
            axes.set_title(textwrap.fill(axes.get_title(loc="left"), in_title), loc="left")
    handles = {}
    for axes in figure.axes:
        handles.update({label: handle for handle, label in zip(*axes.get_legend_handles_labels(), strict=True)})
    if handles:
        letters = int(figure.get_figwidth() * _LETTERS_PER_INCH)
        labels = [textwrap.fill(label, letters - 7) for label in handles]
        across = letters // (max(len(line) for label in labels for line in label.split("\n")) + 7)
        figure.legend(handles.values(), labels, loc="outside lower center", ncols=across)
        lines = math.ceil(len(labels) / across) * max(1 + label.count("\n") for label in labels)
        figure.set_figheight(figure.get_figheight() + 0.17 * max(0, lines - 2))
    return figure


def _height(panel: Chart | StripPlot) -> float:
    """Return the height of a panel in inches."""
    lines = 0 if isinstance(panel, Chart) else sum(1 + label.count("\n") for label in _labels(panel))
    return max(2.2, 0.7 + 0.14 * lines)


def _labels(strip: StripPlot) -> list[str]:
    labels = (each.label + (" (not finished)" if each.is_provisional else "") for each in strip.variants)
    return [textwrap.fill(label, _LETTERS_OF_LABEL) for label in labels]


def stacked(charts: Sequence[Chart], heights: Sequence[float], title: str) -> Figure:
    """Return `charts` stacked on one x axis, with `heights` in inches, each with its own legend."""
    with rc_context(STYLE):
        figure = Figure(figsize=(_WIDTH, sum(heights)), layout="constrained")
        places = figure.subplots(len(charts), 1, sharex=True, height_ratios=heights, squeeze=False)
        for axes, chart in zip(places[:, 0], charts, strict=True):
            drawn = _draw_chart(axes, chart)
            axes.label_outer()
            if handles := [handle for each in drawn for handle in each.get_legend_handles_labels()[0]]:
                axes.legend(handles=handles, loc="lower left", bbox_to_anchor=(0, 1), ncols=4, borderaxespad=0.2)
        figure.suptitle(textwrap.fill(title, _LETTERS_OF_TITLE), fontweight="bold", x=0.01, ha="left")
        figure.align_ylabels()
    return figure


def _draw_chart(axes: Axes, chart: Chart) -> tuple[Axes, ...]:
    """Draw `chart` as on the page: title, axes, curves or points with bands, note; return the left and right axes."""
    axes.set_title("" if chart.title == chart.x.title else f"{chart.letter}  {chart.title}".strip(), loc="left")
    if chart.note:
        axes.set_title(chart.note, loc="right", color="#606060")
    # A logarithmic axis has uneven gaps. Only that of a range test, without dots, has the whole width of a page.
    _set_axis(axes, "x", chart.x, 3 if chart.is_scatter and chart.x.is_logarithmic else 6)
    _set_axis(axes, "y", chart.left)
    right = axes
    if chart.right:
        right = axes.twinx()
        right.grid(visible=False)
        right.spines["right"].set_visible(True)
        _set_axis(right, "y", chart.right)
    if chart.upright is not None:
        axes.axvline(chart.upright, color="#a0a0a0", linewidth=0.6, linestyle=":")
    for series in chart.series:
        axis = chart.right if series.axis == "right" and chart.right else chart.left
        _draw_series(right if axis is chart.right else axes, series, axis)
    return (axes, right) if chart.right else (axes,)


def _set_axis(axes: Axes, which: str, axis: Axis, most: int = 6) -> None:
    axes.set(**{f"{which}label": axis.title, f"{which}scale": "log" if axis.is_logarithmic else "linear"})
    axes.set(**{f"{which}lim": (axis.low, axis.high)})
    line = axes.xaxis if which == "x" else axes.yaxis
    place = axes.get_subplotspec()
    is_small = which == "x" and place is not None and place.get_gridspec().ncols > 2
    line.set_major_locator(FixedLocator(ticks(axis, min(most, 4) if is_small else most)))
    line.set_minor_locator(NullLocator())
    line.set_major_formatter(FuncFormatter(lambda value, _: axis.write(value)))
    line.set_minor_formatter(NullFormatter())


def _draw_series(axes: Axes, series: Series, axis: Axis) -> None:
    look = style_of(series.style)
    points = [point for point in series.points if math.isfinite(point.x) and math.isfinite(point.y)]
    x, y, colour = [point.x for point in points], [axis.drawn(point.y) for point in points], LIGHT[look.colour]
    fill = _fill(look)
    # matplotlib leaves what begins with an underscore out of legends.
    label = f" {series.label}" if series.label.startswith("_") else series.label
    if series.form in _MARKS:
        axes.plot(x, y, _MARKS[series.form], color=colour, markerfacecolor=fill, markersize=4, label=label)
        return
    marked = len(points) == 1 or (series.form == "line" and look.dashes) or series.style == "test"
    axes.plot(
        x,
        y,
        label=label,
        color=colour,
        alpha=0.45 if series.form == "faint" else 1.0,
        linestyle=(0, look.dashes) if look.dashes else "--" if series.form == "dashed" else "-",
        marker="o" if marked else "",
        markerfacecolor=fill,
        markevery=math.ceil(len(points) / _MOST_MARKS) or 1,
    )
    band = [(point.x, *map(axis.drawn, point.band)) for point in points if point.band]
    if len(band) > 1:
        places, low, high = zip(*band, strict=True)
        axes.fill_between(places, low, high, color=colour, alpha=0.13, linewidth=0)


def _fill(look: SeriesStyle) -> tuple[float, float, float]:
    """Return the colour within a mark's outline, on white paper."""
    red, green, blue = (1.0 - look.fill * (1.0 - part) for part in to_rgb(LIGHT[look.colour]))
    return red, green, blue


def _draw_strip(axes: Axes, strip: StripPlot) -> None:
    axes.set_title(strip.panel.title, loc="left")
    _set_axis(axes, "x", strip.axis)
    axes.set_yticks(range(len(strip.variants)), _labels(strip))
    axes.set_ylim(len(strip.variants) - 0.5, -0.5)
    for row, variant in enumerate(strip.variants):
        look, factor = style_of(f"s{variant.colour}"), strip.measure.factor
        colour = LIGHT[look.colour]
        values = [value * factor for _, value in variant.measured(strip.measure)]
        found = variant.summary(strip.measure)
        if found is not None and found.deviation is not None:
            ends = [(found.mean + sign * found.deviation) * factor for sign in (-1, 1)]
            axes.plot(ends, [row, row], color=colour, linewidth=4, alpha=0.25)
        if found is not None:
            axes.plot([found.mean * factor], [row], "|", color=colour, markersize=11)
        axes.plot(values, [row] * len(values), "o", color=colour, markerfacecolor=_fill(look))


_FORMATS = (".png", ".svg", ".pdf")
_MOST_POINTS = 1_000
_SHARE = Axis("share of peak", -0.06, 1.12, plain)
_HEIGHTS = (3.0, 3.0, 1.4)  # inches, of the charts of loss, accuracy and schedule


def draw_learning_curve(run_directories: Sequence[Path], output: Path) -> None:
    """Draw the runs' learning curves into `output`, a PNG, SVG or PDF file by suffix. Raises UsageError."""
    if output.suffix.lower() not in _FORMATS:
        raise UsageError(f"cannot draw {output}: the name must end in .png, .svg or .pdf", code="output-form")
    if not output.parent.is_dir():
        raise UsageError(f"cannot draw {output}: there is no folder {output.parent}", code="folder-missing")
    runs = [_read(RunDirectory(directory)) for directory in run_directories]
    runs = [replace(run, name=name) for run, name in zip(runs, _distinct_names(run_directories), strict=True)]
    charts = [chart for chart in (_compared(LOSS, runs), _compared(ACCURACY, runs), _schedule(runs)) if chart.series]
    figure = stacked(charts, _HEIGHTS[: len(charts)], runs[0].name if len(runs) == 1 else f"{len(runs)} runs")
    with writing(output, "choose another file with -o FILE"):
        save(figure, output)


def _distinct_names(directories: Sequence[Path]) -> list[str]:
    """Return as many last parts of the directories' paths as tell them apart."""
    parts = [directory.resolve().parts for directory in directories]
    for count in range(1, 1 + max(map(len, parts))):
        names = ["/".join(each[-count:]) for each in parts]
        if len(set(names)) == len(set(parts)):
            break
    return names


def _read(directory: RunDirectory) -> Measured:
    path = directory.metrics
    try:
        records = read_records(path)
    except FileNotFoundError:
        raise UsageError(
            f"{directory.root} has no {path.name}: name the directory of a run that has started", code="no-run-here"
        ) from None
    except OSError as error:
        raise UsageError(f"cannot read {path}: {error.strerror}", code="records-unreadable") from error
    run = measured_of(directory.root.resolve().name, records)
    if not run.train and not any(run.evaluations.values()):
        raise UsageError(f"{path} holds no measurement yet: the run has not finished a step", code="no-measurement")
    return run


def _compared(quantity: Quantity, runs: Sequence[Measured]) -> Chart:
    """Return loss or accuracy of all `runs` in one chart; of several runs only each batch and the test split."""
    charts = [chart for run in runs if (chart := learning_curve(quantity, run, _MOST_POINTS))]
    note = _best(runs[0]) if quantity is ACCURACY else ""
    series = charts[0].series
    if len(runs) > 1:
        pairs = enumerate(zip(runs, charts, strict=True), start=1)
        series = tuple(each for number, (run, chart) in pairs for each in _named(run, chart, f"s{number}"))
        note = "test; faint: train, each batch" if quantity is LOSS else ""
    axis = quantity.axis(quantity.title, [each.points for each in series])
    return replace(charts[0], title="", x=epochs_axis(series), left=axis, series=series, note=note)


def _named(run: Measured, chart: Chart, style: str) -> Iterator[Series]:
    is_tested = any(series.style == "test" for series in chart.series)
    for series in chart.series:
        if series.style == "test":
            yield replace(series, label=run.name, style=style)
        elif series.style == BATCH:
            yield replace(series, label="" if is_tested else f"{run.name} (train only)", style=style)


def _best(run: Measured) -> str:
    # as elsewhere, an evaluation whose loss is not finite is never the best
    tests = [each for each in run.evaluations["test"] if math.isfinite(each.accuracy) and math.isfinite(each.loss)]
    if not tests:
        return ""
    best = max(tests, key=ACCURACY.take)
    return f"best test accuracy {ACCURACY.text(best.accuracy)}, epoch {epochs(best.epoch)}"


def _schedule(runs: Sequence[Measured]) -> Chart:
    """Return learning rate and noise amplitude of `runs`, each as a fraction of its peak."""
    drawn: list[Series] = []
    for number, run in enumerate(runs, start=1):
        for quantity, style in ((LEARNING_RATE, "s0"), (NOISE, "s3")):
            if chart := rate_curve(quantity, run, _MOST_POINTS):
                [series] = chart.series
                peak = max(point.y for point in series.points if math.isfinite(point.y))
                points = tuple(replace(point, y=point.y / peak) for point in series.points)
                label = f"{quantity.name} (peak {peak:.3g})" if len(runs) == 1 else ""
                colour = style if len(runs) == 1 else f"s{number}"
                drawn.append(Series(label, colour, points, "line" if quantity is LEARNING_RATE else "dashed"))
    note = "solid: learning rate; dashed: noise amplitude" if len(runs) > 1 else ""
    return Chart("schedule", "", "", epochs_axis(drawn), _SHARE, tuple(drawn), note=note)


_INCHES = 3.5


@dataclass(frozen=True)
class RangeTest:
    """The loss at each rate, raw and smoothed, and the rate where the smoothed loss falls steepest (None: nowhere)."""

    rates: tuple[float, ...]
    losses: tuple[float, ...]
    smoothed: tuple[float, ...]
    suggestion: float | None


def range_test(rates: Sequence[float], losses: Sequence[float]) -> RangeTest:
    """Return the range test of `losses` at rising `rates`; it suggests the steepest descent per log rate.

    The smoothed loss is a centred mean over a tenth of the updates, which does not lag. Losses are capped at a rise by
    the size of the first one, because the height of a jump means nothing but that the rate is too high.
    """
    half = max(1, len(losses) // 20)
    capped = [min(loss, losses[0] + abs(losses[0])) for loss in losses]
    smoothed = [fmean(capped[max(0, at - half) : at + half + 1]) for at in range(len(capped))]
    least = min(range(len(smoothed)), key=smoothed.__getitem__)
    slopes = {
        at: (smoothed[at + half] - smoothed[at - half]) / math.log(rates[at + half] / rates[at - half])
        for at in range(half, min(least + 1, len(rates) - half))
    }
    steepest = min(slopes, key=slopes.__getitem__, default=None)
    suggestion = rates[steepest] if steepest is not None and slopes[steepest] < 0 else None
    return RangeTest(tuple(rates), tuple(losses), tuple(smoothed), suggestion)


def read_range_test(directory: RunDirectory) -> RangeTest:
    """Return the run's range test, up to the first loss that is not finite. Raises UsageError if it has too few."""
    found = [record for record in read_records(directory.metrics) if isinstance(record, TrainRecord)]
    end = next((at for at, record in enumerate(found) if not math.isfinite(record.loss)), len(found))
    if end < 2:
        raise UsageError(f"{directory.root} holds fewer than two updates: start at a lower rate", code="no-measurement")
    return range_test([record.learning_rate for record in found[:end]], [record.loss for record in found[:end]])


def write_range_test(test: RangeTest, directory: RunDirectory) -> tuple[Path, ...]:
    """Write `test` into `directory` as lr_range.csv, .json and .png, and return their paths."""
    table, record, picture = (directory.range_test.with_suffix(suffix) for suffix in (".csv", ".json", ".png"))
    text = io.StringIO()
    rows = csv.writer(text, lineterminator="\n")
    rows.writerow(("learning_rate", "loss", "smoothed_loss"))
    rows.writerows(zip(test.rates, test.losses, test.smoothed, strict=True))
    atomic.write_text(table, text.getvalue(), is_shared=True)
    atomic.write_text(record, atomic.json_text(asdict(test), indent=2) + "\n", is_shared=True)
    save(stacked([_chart(test)], (_INCHES,), directory.root.resolve().name), picture)
    return table, record, picture


def _chart(test: RangeTest) -> Chart:
    def points(values: Sequence[float]) -> tuple[Point, ...]:
        return tuple(map(Point, test.rates, values))

    series = (
        Series("each batch", BATCH, points(test.losses), "faint"),
        Series("smoothed", "train", points(test.smoothed)),
    )
    x = Axis("learning rate", test.rates[0], test.rates[-1], plain, is_logarithmic=True)
    y = loss_axis("loss", test.losses)
    note = "" if test.suggestion is None else f"steepest at {three_digits(test.suggestion)}"
    return Chart("lr-range", "", "Loss against learning rate.", x, y, series, note=note, upright=test.suggestion)
