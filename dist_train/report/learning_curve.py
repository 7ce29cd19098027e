"""Loss and accuracy against epoch as a picture file, drawn from `metrics.jsonl`: one run, or several to compare."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from matplotlib import rc_context
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.ticker import FuncFormatter, LogLocator, MaxNLocator, NullFormatter

from dist_train.outcome import UsageError
from dist_train.rundir import atomic
from dist_train.rundir.paths import RunDirectory
from dist_train.rundir.records import read_records
from dist_train.watch.figure import (
    ACCURACY,
    BATCH,
    LEARNING_RATE,
    LOSS,
    NOISE,
    Chart,
    Measured,
    Quantity,
    learning_curve,
    measured_of,
    rate_curve,
)

_FORMATS = {".png", ".svg"}
_BLUE, _RED, _GREEN = "#0072B2", "#D55E00", "#009E73"
_RUN_COLOURS = (_BLUE, _RED, _GREEN, "#CC79A7", "#E69F00", "#56B4E9", "#000000")
"""Okabe and Ito's palette, which colour-blind people tell apart (its yellow is too faint for lines)."""
_RUN_DASHES = ("-", (0, (6, 2)), (0, (1, 1.5)))
_LOOKS: Mapping[str, Mapping[str, Any]] = {
    BATCH: {"color": _BLUE, "lw": 1.2, "alpha": 0.55},
    "train": {"color": _BLUE, "lw": 1.5, "linestyle": "--", "marker": "s"},
    "test": {"color": _RED, "lw": 1.5, "marker": "o"},
}
_MOST_POINTS = 1_000
_STYLE: dict[Any, Any] = {
    "font.family": "DejaVu Sans",
    "font.size": 10,
    "axes.spines.top": False,
    "axes.spines.right": False,
    "axes.grid": True,
    "grid.color": "#e4e4e4",
    "axes.edgecolor": "#606060",
    "axes.axisbelow": True,
    "lines.markersize": 3.5,
    "legend.frameon": False,
    "svg.fonttype": "path",
    "svg.hashsalt": "dist_train",
}


def draw_learning_curve(run_directories: Sequence[Path], output: Path) -> None:
    """Draw the runs' learning curves into `output`, a PNG or SVG file by its suffix.

    Raises UsageError for another suffix, a folder that does not exist, or a run without measurements.
    """
    if output.suffix.lower() not in _FORMATS:
        raise UsageError(f"cannot draw {output}: the name must end in .png or .svg", code="output-form")
    if not output.parent.is_dir():
        raise UsageError(f"cannot draw {output}: there is no folder {output.parent}", code="folder-missing")
    runs = [_read(RunDirectory(directory)) for directory in run_directories]
    if not runs:
        raise UsageError("no run to draw: name at least one run directory", code="no-run-named")
    with rc_context(_STYLE), atomic.replacing(output) as file:
        # no date: the same run gives the same file
        metadata = {"Date": None} if output.suffix.lower() == ".svg" else None
        _draw(runs).savefig(file, format=output.suffix[1:].lower(), dpi=160, metadata=metadata)


def _read(directory: RunDirectory) -> Measured:
    path = directory.metrics
    try:
        records = read_records(path)
    except FileNotFoundError:
        raise UsageError(
            f"{directory.root} has no {path.name}: name the directory of a run that has begun", code="no-run-here"
        ) from None
    except OSError as error:
        raise UsageError(f"cannot read {path}: {error.strerror}", code="records-unreadable") from error
    run = measured_of(directory.root.resolve().name, records)
    if not run.train and not any(run.evaluations.values()):
        raise UsageError(f"{path} holds no measurement yet: the run has not done a step", code="no-measurement")
    return run


def _draw(runs: Sequence[Measured]) -> Figure:
    figure = Figure(figsize=(7.2, 7.6), layout="constrained")
    loss, accuracy, schedule = figure.subplots(3, 1, sharex=True, height_ratios=(5, 5, 1.7))
    is_one = len(runs) == 1
    for axes, quantity in ((loss, LOSS), (accuracy, ACCURACY)):
        charts = [chart for run in runs if (chart := learning_curve(quantity, run, _MOST_POINTS))]
        for index, (run, chart) in enumerate(zip(runs, charts, strict=True)):
            labels = {series.style: series.label for series in chart.series}
            if not is_one:
                labels = {"test": run.name} if "test" in labels else {BATCH: f"{run.name} (train only)"}
            _plot(axes, chart, _LOOKS if is_one else _looks_among_many(index), labels)
        _scale(axes, quantity, charts)
        schedule.set_xlabel(charts[0].x.title)
    _legend(loss, 3 if is_one else 2)
    for index, run in enumerate(runs):
        colours = ("#404040", _GREEN) if is_one else (_RUN_COLOURS[index % len(_RUN_COLOURS)],) * 2
        _plot_schedule(schedule, run, colours)
    if is_one:
        _annotate_best(accuracy, runs[0])
        _legend(schedule, 2)
    else:
        _note(loss, "bold: test; faint: train, each batch")
        _note(schedule, "solid: learning rate; dashed: noise amplitude")
    figure.suptitle(runs[0].name if is_one else f"{len(runs)} runs", fontweight="bold", x=0.01, ha="left")
    schedule.set(ylabel="share of peak", ylim=(-0.06, 1.12), yticks=[0, 0.5, 1])
    schedule.xaxis.set_major_locator(MaxNLocator(steps=[1, 2, 5, 10]))
    schedule.margins(x=0.01)
    schedule.set_xlim(left=0)
    figure.align_ylabels()
    return figure


def _looks_among_many(index: int) -> Mapping[str, Mapping[str, Any]]:
    turn, number = divmod(index, len(_RUN_COLOURS))
    look = {"color": _RUN_COLOURS[number], "linestyle": _RUN_DASHES[turn % len(_RUN_DASHES)]}
    return {BATCH: {**look, "lw": 1.2, "alpha": 0.4}, "test": {**look, "lw": 1.5, "marker": "o"}}


def _plot(axes: Axes, chart: Chart, looks: Mapping[str, Mapping[str, Any]], labels: Mapping[str, str]) -> None:
    for series in chart.series:
        if series.style in looks:
            look = {"marker": "." if len(series.points) == 1 else "", **looks[series.style]}
            every = math.ceil(len(series.points) / 30) if "marker" in looks[series.style] else 1
            x, y = [point.x for point in series.points], [point.y for point in series.points]
            axes.plot(x, y, label=labels.get(series.style), markevery=every, **look)


def _plot_schedule(axes: Axes, run: Measured, colours: Sequence[str]) -> None:
    for quantity, colour, dashes in zip((LEARNING_RATE, NOISE), colours, ("-", "--"), strict=True):
        if chart := rate_curve(quantity, run, _MOST_POINTS):
            points = chart.series[0].points
            peak = max(point.y for point in points if math.isfinite(point.y))
            x, shares = [point.x for point in points], [point.y / peak for point in points]
            look: dict[str, Any] = {"color": colour, "lw": 1.2, "marker": "." if len(points) == 1 else ""}
            axes.plot(x, shares, dashes, label=f"{quantity.name} (peak {peak:.3g})", **look)


def _scale(axes: Axes, quantity: Quantity, charts: Sequence[Chart]) -> None:
    axis = quantity.axis(quantity.title, [series.points for chart in charts for series in chart.series])
    axes.set_ylabel(axis.title)
    if axis.is_logarithmic:
        axes.set_yscale("log")
        axes.yaxis.set_major_locator(LogLocator(subs=(1, 2, 5)))
        axes.yaxis.set_minor_formatter(NullFormatter())
    elif axis.low == 0:
        axes.set_ylim(bottom=0)
    axes.yaxis.set_major_formatter(FuncFormatter(lambda value, _: axis.write(value)))


def _annotate_best(axes: Axes, run: Measured) -> None:
    test = [record for record in run.evaluations["test"] if math.isfinite(record.accuracy)]
    if test:
        best = max(test, key=ACCURACY.take)
        axes.axhline(best.accuracy, color=_RED, lw=0.8, ls=":")
        where = f"epoch {best.step / run.steps_per_epoch:.4g}" if run.steps_per_epoch else f"step {best.step}"
        _note(axes, f"best test accuracy {ACCURACY.text(best.accuracy)}, {where}", _RED)


def _note(axes: Axes, text: str, colour: str = "#606060") -> None:
    axes.set_title(text, fontsize=9, loc="right", color=colour)


def _legend(axes: Axes, columns: int) -> None:
    if axes.get_legend_handles_labels()[0]:
        axes.legend(loc="lower left", bbox_to_anchor=(0, 1), ncols=columns, fontsize=9, borderaxespad=0.2)
