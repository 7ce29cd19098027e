"""The figure of `docs/scaling.md`: how the time of an update changes if a guess is halved or doubled."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path

from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.ticker import FixedLocator, FuncFormatter, NullLocator

from benchmarks.scaling_forecast import Swing
from dist_train.report.drawing import save

_HALVED, _DOUBLED = "#0072b2", "#e69f00"
"""Blue and orange, distinguishable by colour-blind readers and in greyscale."""
_INK = "#202020"
_MIN_LABELLED_CHANGE = 0.005
"""Factors nearer to 1 than this get no number."""


def draw(panels: Mapping[str, Sequence[Swing]], output: Path) -> None:
    """Draw a panel for each title, the most important guess at the top; the same swings give the same file."""
    figure = Figure(figsize=(10.5, 4.2), layout="constrained", facecolor="white")
    places = figure.subplots(1, len(panels), squeeze=False)[0]
    for axes, (title, swings) in zip(places, panels.items(), strict=True):
        _draw_panel(axes, title, swings)
    handles, labels = figure.axes[0].get_legend_handles_labels()
    figure.legend(handles, labels, loc="outside lower center", ncols=2, frameon=False)
    save(figure, output)


def _draw_panel(axes: Axes, title: str, swings: Sequence[Swing]) -> None:
    places = range(len(swings))
    for label, colour, factors, shift in (
        ("guess halved", _HALVED, [swing.halved for swing in swings], -0.2),
        ("guess doubled", _DOUBLED, [swing.doubled for swing in swings], 0.2),
    ):
        heights = [place + shift for place in places]
        axes.barh(heights, [factor - 1 for factor in factors], 0.38, left=1, color=colour, label=label)
        for height, factor in zip(heights, factors, strict=True):
            if abs(factor - 1) >= _MIN_LABELLED_CHANGE:
                _label(axes, factor, height)
    for place, swing in zip(places, swings, strict=True):
        if max(abs(swing.halved - 1), abs(swing.doubled - 1)) < _MIN_LABELLED_CHANGE:
            _label(axes, 1.0, place)
    axes.set_yticks(list(places), [swing.guess for swing in swings])
    axes.invert_yaxis()
    axes.set_xscale("log", base=2)
    axes.set_xlim(0.42, 2.4)
    axes.xaxis.set_major_locator(FixedLocator([0.5, 0.75, 1, 1.5, 2]))
    axes.xaxis.set_minor_locator(NullLocator())
    axes.xaxis.set_major_formatter(FuncFormatter(lambda value, _: f"{value:g}"))
    axes.axvline(1, color=_INK, linewidth=0.8)
    axes.grid(visible=True, axis="x", color="#e4e4e4", linewidth=0.6)
    axes.set_axisbelow(True)
    axes.spines[["top", "right"]].set_visible(False)
    axes.set_title(title, loc="left", fontsize=10, color=_INK)
    axes.set_xlabel("time of an update, as a factor")


def _label(axes: Axes, factor: float, height: float) -> None:
    """Write `factor` at the end of its bar."""
    side, align = (3, "left") if factor >= 1 else (-3, "right")
    axes.annotate(
        f"{factor:.2f}",
        (factor, height),
        (side, 0),
        textcoords="offset points",
        ha=align,
        va="center",
        fontsize=8,
        color=_INK,
    )
