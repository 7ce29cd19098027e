"""Figures of landscapes: lines as charts of the report's style, planes as contours."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path

import numpy
from matplotlib import rc_context
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.ticker import FuncFormatter
from numpy.typing import NDArray

from dist_train.analysis.landscape_files import SPLITS, Landscape
from dist_train.report.drawing import STYLE, save, stacked
from dist_train.report.figures import landscape_axes, landscape_chart

_LOSS_COLOUR, _ACCURACY_COLOUR = "#0B4FB3", "#C8201E"
_LEVELS = 12

Values = NDArray[numpy.float64]


def draw_landscape(landscape: Landscape, outputs: Sequence[Path], scale: str = "linear") -> None:
    """Draw `landscape` into `outputs`, SVG, PDF or PNG by suffix; `scale` of the loss axis is linear or log."""
    if landscape.kind == "plane":
        with rc_context({**STYLE, "axes.grid": False}):
            figure = _draw_plane(landscape, scale)
    else:
        chart = landscape_chart("line", "", "", [landscape], axes=landscape_axes([landscape], scale))
        figure = stacked([replace(chart, note="")], (4.2,), _title(landscape))  # a note has no room beside the legend
    for output in outputs:
        save(figure, output)


def _draw_plane(landscape: Landscape, scale: str) -> Figure:
    figure = Figure(figsize=(10.4, 4.8), layout="constrained")
    loss, accuracy = figure.subplots(1, 2)
    _contours(figure, loss, landscape, "loss", "Blues", _LOSS_COLOUR, scale)
    _contours(figure, accuracy, landscape, "accuracy", "Reds", _ACCURACY_COLOUR, "linear")
    labels = ["alpha", "beta"]
    path = []
    if landscape.trajectory is not None:
        shares, path = landscape.trajectory["explained"], landscape.trajectory["path"]
        labels = [
            f"{each} ({share * 100:.1f} % of the squared distances)" for each, share in zip(labels, shares, strict=True)
        ]
    for axes in (loss, accuracy):
        axes.set(xlabel=labels[0], ylabel=labels[1])
        if path:
            alphas, betas = ([place[name] for place in path] for name in ("alpha", "beta"))
            axes.plot(alphas, betas, color="#202020", lw=1.2, marker="o", markersize=3)
            axes.annotate(f"step {path[0]['step']}", (alphas[0], betas[0]), (4, 4), textcoords="offset points")
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


def _title(landscape: Landscape) -> str:
    settings = landscape.settings
    names = [f"{root.name} step {step}" for root, step in zip(landscape.roots, landscape.steps, strict=True)]
    match landscape.kind:
        case "interpolate":
            what = f"from {names[0]} (0) to {names[1]} (1)"
        case "direction":
            many = settings["directions"]
            lines = "a random direction" if many == 1 else f"{many} random directions, mean and standard deviation"
            what = f"{names[0]}, {lines}, normalized by {settings['normalization']}"
        case _:
            way = "principal directions" if "trajectory" in settings else "two random directions"
            what = f"{names[-1]}, {way}"
    return f"{what}; statistics {settings['statistics']}"
