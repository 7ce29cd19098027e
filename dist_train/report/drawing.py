"""Charts as matplotlib draws them: figures of a report, for a paper, and learning curves; SVG, PDF or PNG."""

from __future__ import annotations

import math
import shutil
from collections.abc import Iterable, Sequence
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

from matplotlib import rc_context
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.ticker import FixedLocator, FuncFormatter, NullFormatter, NullLocator

from dist_train.outcome import UsageError
from dist_train.report.chart import LIGHT, look_of, ticks
from dist_train.rundir import atomic
from dist_train.watch.figure import Axis, Chart, Series

if TYPE_CHECKING:
    from dist_train.report.figures import NumberedFigure, Strip

_WIDTH = 7.0
"""Inches: the text of a page of two columns."""
_LETTERS_PER_INCH = 17
_MARKS = {"dots": "o", "squares": "s"}
_MOST_MARKS = 30
_STYLE: dict[Any, Any] = {
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
    "svg.fonttype": "path",
    "svg.hashsalt": "dist_train",
    "pdf.fonttype": 42,  # fonts that a publisher can embed and edit
}


def save_figures(figures: Sequence[NumberedFigure], folder: Path, form: str) -> tuple[Path, ...]:
    """Write `figures` into `folder` as `form`, svg, pdf or png, and return the files.

    Raises:
        UsageError: there is no figure, or the folder cannot be written.
    """
    if not figures:
        raise UsageError("there is nothing to draw yet: no run has done a step", code="no-measurement")
    try:
        folder.mkdir(parents=True, exist_ok=True)
        return tuple(path for figure in figures for path in _save(figure, folder, form))
    except OSError as error:
        raise UsageError(
            f"cannot write into {folder} ({error.strerror or error}): choose another by --figures",
            code="output-unwritable",
        ) from error


def _save(figure: NumberedFigure, folder: Path, form: str) -> Iterable[Path]:
    name = f"figure-{figure.number}-{figure.key}"
    for number, plane in enumerate(figure.planes, start=1):
        # an older one has been drawn as SVG alone
        picture = next(path for path in map(plane.picture, (form, "svg")) if path.is_file())
        path = folder / f"{name}-{number}{picture.suffix}"
        shutil.copyfile(picture, path)
        yield path
    if figure.rows:
        path = folder / f"{name}.{form}"
        with rc_context(_STYLE):
            save(_draw(figure), path)
        yield path


def save(figure: Figure, path: Path) -> None:
    """Write `figure` to `path`, in the form that its suffix says; the same figure gives the same file."""
    form = path.suffix[1:].lower()
    undated: dict[str, dict[str, Any]] = {"svg": {"Date": None}, "pdf": {"CreationDate": None}}
    with rc_context(_STYLE), atomic.replacing(path) as file:
        figure.savefig(file, format=form, dpi=160, metadata=undated.get(form))


def _draw(numbered: NumberedFigure) -> Figure:
    most = 3 if numbered.key == "sharpness" else 2
    rows = [row[at : at + most] for row in numbered.rows for at in range(0, len(row), most)]
    columns = max(map(len, rows))
    figure = Figure(figsize=(_WIDTH if columns > 1 else _WIDTH / 2, 0.3 + 2.2 * len(rows)), layout="constrained")
    grid = figure.subplots(len(rows), columns, squeeze=False)
    for panels, places in zip(rows, grid, strict=True):
        for axes in places[len(panels) :]:
            axes.remove()
        for panel, axes in zip(panels, places, strict=False):
            if isinstance(panel, Chart):
                _draw_chart(axes, replace(panel, note=""))
            else:
                _draw_strip(axes, panel)
    handles = {}
    for axes in figure.axes:
        handles.update({label: handle for handle, label in zip(*axes.get_legend_handles_labels(), strict=True)})
    if handles:
        across = int(figure.get_figwidth() * _LETTERS_PER_INCH) // (max(map(len, handles)) + 7)
        figure.legend(handles.values(), handles.keys(), loc="outside lower center", ncols=max(1, across))
    return figure


def stacked(charts: Sequence[Chart], heights: Sequence[float], title: str) -> Figure:
    """Return `charts` below each other on one x axis, `heights` in inches, each with its own legend."""
    with rc_context(_STYLE):
        figure = Figure(figsize=(_WIDTH, sum(heights)), layout="constrained")
        places = figure.subplots(len(charts), 1, sharex=True, height_ratios=heights, squeeze=False)
        for axes, chart in zip(places[:, 0], charts, strict=True):
            _draw_chart(axes, chart)
            axes.label_outer()
            if axes.get_legend_handles_labels()[0]:
                axes.legend(loc="lower left", bbox_to_anchor=(0, 1), ncols=4, borderaxespad=0.2)
        figure.suptitle(title, fontweight="bold", x=0.01, ha="left")
        figure.align_ylabels()
    return figure


def _draw_chart(axes: Axes, chart: Chart) -> None:
    """Draw `chart`, as on the page: title, axes, curves or points with their bands, and its note at the right."""
    axes.set_title("" if chart.title == chart.x.title else f"{chart.letter}  {chart.title}".strip(), loc="left")
    if chart.note:
        axes.set_title(chart.note, loc="right", color="#606060")
    _set_axis(axes, "x", chart.x)
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
        _draw_series(right if series.axis == "right" else axes, series)


def _set_axis(axes: Axes, which: str, axis: Axis) -> None:
    axes.set(**{f"{which}label": axis.title, f"{which}scale": "log" if axis.is_logarithmic else "linear"})
    axes.set(**{f"{which}lim": (axis.low, axis.high)})
    line = axes.xaxis if which == "x" else axes.yaxis
    place = axes.get_subplotspec()
    is_small = which == "x" and place is not None and place.get_gridspec().ncols > 2
    line.set_major_locator(FixedLocator(ticks(axis, 4 if is_small else 6)))
    line.set_minor_locator(NullLocator())
    line.set_major_formatter(FuncFormatter(lambda value, _: axis.write(value)))
    line.set_minor_formatter(NullFormatter())


def _draw_series(axes: Axes, series: Series) -> None:
    look = look_of(series.style)
    points = [point for point in series.points if math.isfinite(point.x) and math.isfinite(point.y)]
    x, y, colour = [point.x for point in points], [point.y for point in points], LIGHT[look.colour]
    fill = "white" if look.is_hollow else colour
    if series.form in _MARKS:
        axes.plot(x, y, _MARKS[series.form], color=colour, markerfacecolor=fill, markersize=4, label=series.label)
        return
    marked = len(points) == 1 or (series.form == "line" and look.dashes) or series.style == "test"
    axes.plot(
        x,
        y,
        label=series.label,
        color=colour,
        alpha=0.45 if series.form == "faint" else 1.0,
        linestyle=(0, look.dashes) if look.dashes else "--" if series.form == "dashed" else "-",
        marker="o" if marked else "",
        markerfacecolor=fill,
        markevery=math.ceil(len(points) / _MOST_MARKS) or 1,
    )
    band = [(point.x, point.low, point.high) for point in points if point.low is not None and point.high is not None]
    if len(band) > 1:
        places, low, high = zip(*band, strict=True)
        axes.fill_between(places, low, high, color=colour, alpha=0.13, linewidth=0)


def _draw_strip(axes: Axes, strip: Strip) -> None:
    axes.set_title(strip.panel.title, loc="left")
    _set_axis(axes, "x", strip.axis)
    axes.set_yticks(range(len(strip.variants)), [variant.label for variant in strip.variants])
    axes.set_ylim(len(strip.variants) - 0.5, -0.5)
    for row, variant in enumerate(strip.variants):
        look, factor = look_of(f"s{variant.colour}"), strip.measure.factor
        colour = LIGHT[look.colour]
        values = [value * factor for _, value in variant.measured(strip.measure)]
        found = variant.summary(strip.measure)
        if found is not None and found.deviation is not None:
            ends = [(found.mean + sign * found.deviation) * factor for sign in (-1, 1)]
            axes.plot(ends, [row, row], color=colour, linewidth=4, alpha=0.25)
        if found is not None:
            axes.plot([found.mean * factor], [row], "|", color=colour, markersize=11)
        fill = "white" if look.is_hollow else colour
        axes.plot(values, [row] * len(values), "o", color=colour, markerfacecolor=fill)
