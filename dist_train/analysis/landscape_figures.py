"""Figures of landscapes: loss in blue on the left axis, accuracy in red on the right; train solid, test dashed."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy
from matplotlib import rc_context
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.lines import Line2D
from matplotlib.ticker import FuncFormatter, LogLocator, MaxNLocator, NullFormatter, PercentFormatter
from numpy.typing import NDArray

from dist_train.analysis.directions import Trajectory
from dist_train.analysis.landscape_files import SPLITS, Landscape
from dist_train.rundir import atomic
from dist_train.rundir.paths import RunDirectory

_LOSS_COLOUR, _ACCURACY_COLOUR = "#0B4FB3", "#C8201E"
_DASHES = {"train": "-", "test": (0, (4, 2))}
_LEVELS = 12
_STYLE: dict[Any, Any] = {
    "font.family": "DejaVu Sans",
    "font.size": 10,
    "axes.spines.top": False,
    "axes.grid": False,
    "axes.edgecolor": "#606060",
    "axes.axisbelow": True,
    "legend.frameon": False,
    "svg.fonttype": "path",
    "svg.hashsalt": "dist_train",
}

Values = NDArray[numpy.float64]


def draw_landscape(
    landscape: Landscape, outputs: Sequence[Path], scale: str = "linear", trajectory: Trajectory | None = None
) -> None:
    """Draw `landscape` into `outputs`, SVG, PDF or PNG by suffix; `scale` of the loss axis is linear or log."""
    with rc_context(_STYLE):
        if landscape.kind == "plane":
            figure = _draw_plane(landscape, scale, trajectory)
        else:
            figure = _draw_lines(landscape, scale)
        for output in outputs:
            with atomic.replacing(output) as file:
                # Without a date the same result gives the same file.
                undated: dict[str, dict[str, Any]] = {".svg": {"Date": None}, ".pdf": {"CreationDate": None}}
                figure.savefig(file, format=output.suffix[1:], dpi=160, metadata=undated.get(output.suffix))


def draw_line(loss: Axes, accuracy: Axes, landscape: Landscape, scale: str) -> None:
    """Draw the lines of `landscape`, of several directions the mean and the full range. `accuracy` is `loss`'s twin."""
    for split in SPLITS:
        alphas, losses, accuracies = _lines(landscape, split)
        _plot(loss, alphas, losses, _LOSS_COLOUR, split)
        _plot(accuracy, alphas, accuracies, _ACCURACY_COLOUR, split)
    loss.set_xlabel("alpha")
    for axes, name, colour in ((loss, "loss", _LOSS_COLOUR), (accuracy, "accuracy", _ACCURACY_COLOUR)):
        axes.set_ylabel(name, color=colour)
        axes.tick_params(axis="y", colors=colour)
    accuracy.set_ylim(0, 1.02)
    accuracy.yaxis.set_major_formatter(PercentFormatter(1.0, decimals=None, symbol=" %"))
    loss.margins(x=0)
    loss.xaxis.set_major_locator(MaxNLocator(steps=[1, 2, 2.5, 5, 10]))
    positive = [value for line in loss.get_lines() for value in numpy.asarray(line.get_ydata(), float) if value > 0]
    if scale == "log" and positive:
        loss.set_yscale("log")
        loss.yaxis.set_major_locator(LogLocator(subs=(1, 2, 5) if max(positive) < 1e3 * min(positive) else (1,)))
        loss.yaxis.set_major_formatter(FuncFormatter(lambda value, _: f"{value:g}"))
        loss.yaxis.set_minor_formatter(NullFormatter())
    else:
        loss.set_ylim(bottom=0)


def _lines(landscape: Landscape, split: str) -> tuple[Values, Values, Values]:
    """Return alphas [p], losses and accuracies [directions, p]."""
    rows = [row for row in landscape.rows if row.split == split]
    directions = len({row.direction for row in rows})
    values = numpy.array([(row.alpha, row.loss, row.accuracy) for row in rows]).reshape(directions, -1, 3)
    alphas, losses, accuracies = numpy.moveaxis(values, 2, 0)
    return alphas[0], losses, accuracies


def _plot(axes: Axes, alphas: Values, values: Values, colour: str, split: str) -> None:
    values = numpy.where(numpy.isfinite(values), values, numpy.nan)
    if len(values) > 1:
        if split == "train":
            axes.fill_between(alphas, values.min(axis=0), values.max(axis=0), color=colour, alpha=0.15, linewidth=0)
        else:
            for edge in (values.min(axis=0), values.max(axis=0)):
                axes.plot(alphas, edge, color=colour, lw=0.5, ls=":")
    axes.plot(alphas, values.mean(axis=0), color=colour, ls=_DASHES[split], lw=1.5)


def _draw_lines(landscape: Landscape, scale: str) -> Figure:
    figure = Figure(figsize=(6.4, 4.2), layout="constrained")
    loss = figure.subplots()
    accuracy = loss.twinx()
    draw_line(loss, accuracy, landscape, scale)
    for marked in (0, 1) if landscape.kind == "interpolate" else (0,):
        loss.axvline(marked, color="#b0b0b0", lw=0.8, ls=":", zorder=0)
    handles = [
        Line2D([], [], color=colour, ls=_DASHES[split], label=f"{split} {name}")
        for name, colour in (("loss", _LOSS_COLOUR), ("accuracy", _ACCURACY_COLOUR))
        for split in SPLITS
    ]
    loss.legend(handles=handles, loc="lower left", bbox_to_anchor=(0, 1), ncols=4, fontsize=8.5, borderaxespad=0.2)
    figure.suptitle(_title(landscape), x=0.01, ha="left", fontsize=9)
    return figure


def _draw_plane(landscape: Landscape, scale: str, trajectory: Trajectory | None) -> Figure:
    figure = Figure(figsize=(10.4, 4.8), layout="constrained")
    loss, accuracy = figure.subplots(1, 2)
    _contours(figure, loss, landscape, "loss", "Blues", _LOSS_COLOUR, scale)
    _contours(figure, accuracy, landscape, "accuracy", "Reds", _ACCURACY_COLOUR, "linear")
    for axes in (loss, accuracy):
        axes.set_xlabel("alpha" + _explained(trajectory, 0))
        axes.set_ylabel("beta" + _explained(trajectory, 1))
        if trajectory is not None:
            alphas, betas = zip(*trajectory.coordinates, strict=True)
            axes.plot(alphas, betas, color="#202020", lw=1.2, marker="o", markersize=3)
            axes.annotate(f"step {trajectory.steps[0]}", trajectory.coordinates[0], (4, 4), textcoords="offset points")
        axes.plot([0], [0], color="#202020", marker="*", markersize=9)
    figure.suptitle(_title(landscape), x=0.01, ha="left", fontsize=9)
    return figure


def _contours(
    figure: Figure, axes: Axes, landscape: Landscape, quantity: str, shades: str, colour: str, scale: str
) -> None:
    """Draw `quantity`: train as filled contours, test as dashed lines."""
    grids = {split: _grid(landscape, split, quantity) for split in SPLITS}
    alphas, betas, train = grids["train"]
    both = numpy.concatenate([values.ravel() for _, _, values in grids.values()])
    finite = both[numpy.isfinite(both)]
    if not finite.size:
        axes.text(0.5, 0.5, f"no {quantity} is finite", ha="center", transform=axes.transAxes)
        return
    least, most = float(finite.min()), float(finite.max())
    if scale == "log" and least > 0:
        norm, levels = "log", numpy.geomspace(least, max(most, least * 1.01), _LEVELS)
    else:
        norm, levels = None, numpy.linspace(least, max(most, least + 1e-9), _LEVELS)
    masked = numpy.ma.masked_invalid(train)
    filled = axes.contourf(alphas, betas, masked, levels=levels, cmap=shades, norm=norm, extend="max")
    axes.contour(alphas, betas, masked, levels=levels, colors=colour, linewidths=0.6)
    test = numpy.ma.masked_invalid(grids["test"][2])
    if test.count() and test.max() > test.min():
        axes.contour(alphas, betas, test, levels=levels, colors=colour, linewidths=0.9, linestyles="dashed")
    bar = figure.colorbar(filled, ax=axes, ticks=levels[:: max(1, _LEVELS // 6)])
    factor, unit = (100, " %") if quantity == "accuracy" else (1, "")
    bar.ax.yaxis.set_major_formatter(FuncFormatter(lambda value, _: f"{factor * value:.3g}{unit}"))
    bar.ax.minorticks_off()
    axes.set_title(f"{quantity}: train filled, test dashed", loc="left", fontsize=10, color=colour)


def _grid(landscape: Landscape, split: str, quantity: str) -> tuple[Values, Values, Values]:
    """Return alphas [p], betas [q] and values [q, p]."""
    rows = [row for row in landscape.rows if row.split == split]
    alphas = numpy.array(sorted({row.alpha for row in rows}))
    betas = numpy.array(sorted({row.beta for row in rows}))
    values = numpy.array([getattr(row, quantity) for row in rows]).reshape(len(betas), len(alphas))
    return alphas, betas, values


def _explained(trajectory: Trajectory | None, index: int) -> str:
    return "" if trajectory is None else f" ({trajectory.explained[index] * 100:.1f} % of the squared distances)"


def _title(landscape: Landscape) -> str:
    settings = landscape.settings
    names = [
        f"{RunDirectory.of_checkpoint(Path(item['path'])).root.name} step {item['step']}"
        for item in landscape.checkpoints
    ]
    match landscape.kind:
        case "interpolate":
            what = f"from {names[0]} (0) to {names[1]} (1)"
        case "direction":
            many = settings["directions"]
            lines = "a random direction" if many == 1 else f"{many} random directions, mean and range"
            what = f"{names[0]}, {lines}, normalized by {settings['normalization']}"
        case _:
            way = "principal directions" if "trajectory" in settings else "two random directions"
            what = f"{names[-1]}, {way}"
    return f"{what}; statistics {settings['statistics']}"
