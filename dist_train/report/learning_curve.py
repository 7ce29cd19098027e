"""Loss and accuracy against epoch, drawn from `metrics.jsonl`; one run, or several to compare."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy
from matplotlib import rc_context
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.ticker import FuncFormatter, LogLocator, MaxNLocator, NullFormatter, PercentFormatter

from dist_train.outcome import UsageError
from dist_train.rundir import atomic
from dist_train.rundir.records import EvaluationRecord, Record, TrainRecord, read_records

_FORMATS = {".png", ".svg"}
_TRAIN_COLOUR, _TEST_COLOUR, _NOISE_COLOUR = "#0072B2", "#D55E00", "#009E73"
_RUN_COLOURS = ("#0072B2", "#D55E00", "#009E73", "#CC79A7", "#E69F00", "#56B4E9", "#000000")
"""Okabe and Ito's palette, which colour-blind people tell apart (its yellow is too faint for lines)."""
_RUN_DASHES = ("-", (0, (6, 2)), (0, (1, 1.5)))
_MOST_POINTS = 1_000
_LOG_RANGE = 15.0
_STYLE: dict[Any, Any] = {
    "font.family": "DejaVu Sans",
    "font.size": 10,
    "axes.spines.top": False,
    "axes.spines.right": False,
    "axes.grid": True,
    "grid.color": "#e4e4e4",
    "axes.edgecolor": "#606060",
    "axes.axisbelow": True,
    "legend.frameon": False,
    "svg.fonttype": "path",
    "svg.hashsalt": "dist_train",
}


def draw_learning_curve(run_directories: Sequence[Path], output: Path) -> None:
    """Draw the runs' learning curves into `output`, a PNG or SVG file by its suffix.

    Raises UsageError for another suffix, a folder that does not exist, or a run without measurements.
    """
    if output.suffix.lower() not in _FORMATS:
        raise UsageError(f"cannot draw {output}: the name must end in .png or .svg")
    if not output.parent.is_dir():
        raise UsageError(f"cannot draw {output}: there is no folder {output.parent}")
    curves = [_read(directory) for directory in run_directories]
    if not curves:
        raise UsageError("no run to draw: name at least one run directory")
    with rc_context(_STYLE):
        figure = _draw(curves)
        with atomic.replacing(output) as file:
            # no date: the same run gives the same file
            metadata = {"Date": None} if output.suffix.lower() == ".svg" else None
            figure.savefig(file, format=output.suffix[1:].lower(), dpi=160, metadata=metadata)


@dataclass(frozen=True)
class _Curve:
    """What a run measured; `steps_per_epoch` is 1 where no epoch is known, and x then counts steps."""

    name: str
    train: tuple[TrainRecord, ...]
    evaluations: tuple[EvaluationRecord, ...]
    steps_per_epoch: int

    def split(self, split: str) -> tuple[EvaluationRecord, ...]:
        return tuple(record for record in self.evaluations if record.split == split)

    def epochs(self, records: Iterable[TrainRecord | EvaluationRecord]) -> list[float]:
        return [record.step / self.steps_per_epoch for record in records]


def _read(directory: Path) -> _Curve:
    path = directory / "metrics.jsonl"
    try:
        records = read_records(path)
    except FileNotFoundError:
        raise UsageError(f"{directory} has no metrics.jsonl: name the directory of a run that has begun") from None
    except OSError as error:
        raise UsageError(f"cannot read {path}: {error.strerror}") from error
    train = tuple(record for record in records if isinstance(record, TrainRecord))
    evaluations = tuple(record for record in records if isinstance(record, EvaluationRecord))
    if not train and not evaluations:
        raise UsageError(f"{path} holds no measurement yet: the run has not done a step")
    return _Curve(directory.resolve().name, train, evaluations, _steps_per_epoch(records))


def _steps_per_epoch(records: Iterable[Record]) -> int:
    measured = [record for record in records if isinstance(record, TrainRecord | EvaluationRecord)]
    # the least of them, so that it is exact also where `epoch` counts whole epochs only
    ratios = [record.step / record.epoch for record in measured if record.step and record.epoch > 0]
    return max(1, round(min(ratios, default=1)))


def _draw(curves: Sequence[_Curve]) -> Figure:
    figure = Figure(figsize=(7.2, 7.6), layout="constrained")
    loss, accuracy, schedule = figure.subplots(3, 1, sharex=True, height_ratios=(5, 5, 1.7))
    if len(curves) == 1:
        _draw_one(curves[0], loss, accuracy, schedule)
        figure.suptitle(curves[0].name, fontweight="bold", x=0.01, ha="left")
    else:
        for index, curve in enumerate(curves):
            _draw_among_many(curve, index, loss, accuracy, schedule)
        figure.suptitle(f"{len(curves)} runs", fontweight="bold", x=0.01, ha="left")
    loss.set_ylabel("loss")
    _choose_scale(loss)
    accuracy.set_ylabel("accuracy")
    accuracy.yaxis.set_major_formatter(PercentFormatter(1.0, decimals=None, symbol=" %"))
    schedule.set_ylabel("share of peak")
    schedule.set_ylim(-0.06, 1.12)
    schedule.set_yticks([0, 0.5, 1])
    schedule.set_xlabel("epoch" if any(curve.steps_per_epoch != 1 for curve in curves) else "step")
    schedule.xaxis.set_major_locator(MaxNLocator(steps=[1, 2, 5, 10]))
    schedule.margins(x=0.01)
    schedule.set_xlim(left=0)
    figure.align_ylabels()
    return figure


def _draw_one(curve: _Curve, loss: Axes, accuracy: Axes, schedule: Axes) -> None:
    for axes, take in ((loss, _loss), (accuracy, _accuracy)):
        _plot_train(axes, curve, take, "train, each batch", _TRAIN_COLOUR, "-", 0.55)
        _plot_split(axes, curve, "train", take, "train, whole split", _TRAIN_COLOUR, "--", "s")
        _plot_split(axes, curve, "test", take, "test", _TEST_COLOUR, "-", "o")
    _annotate_best(accuracy, curve)
    _legend(loss, 3)
    rate = _peak(curve, _learning_rate)
    noise = _peak(curve, _noise_amplitude)
    if rate:
        _plot_train(
            schedule,
            curve,
            lambda it: it.learning_rate / rate,
            f"learning rate (peak {rate:.3g})",
            "#404040",
            "-",
        )
    if noise:
        label = f"noise amplitude (peak {noise:.3g})"
        _plot_train(schedule, curve, lambda it: it.noise_amplitude / noise, label, _NOISE_COLOUR, "--")
    _legend(schedule, 2)


def _draw_among_many(curve: _Curve, index: int, loss: Axes, accuracy: Axes, schedule: Axes) -> None:
    colour = _RUN_COLOURS[index % len(_RUN_COLOURS)]
    dashes = _RUN_DASHES[index // len(_RUN_COLOURS) % len(_RUN_DASHES)]
    for axes, take in ((loss, _loss), (accuracy, _accuracy)):
        _plot_train(axes, curve, take, "", colour, dashes, 0.4)
        _plot_split(axes, curve, "test", take, curve.name, colour, dashes, "o")
    if not curve.split("test"):
        loss.plot([], [], color=colour, linestyle=dashes, label=f"{curve.name} (train only)")
    loss.set_title("bold: test; faint: train, each batch", fontsize=9, loc="right", color="#606060")
    _legend(loss, 2)
    if rate := _peak(curve, _learning_rate):
        _plot_train(schedule, curve, lambda it: it.learning_rate / rate, "", colour, "-")
    if noise := _peak(curve, _noise_amplitude):
        _plot_train(schedule, curve, lambda it: it.noise_amplitude / noise, "", colour, (0, (1, 1)))
    schedule.set_title("solid: learning rate; dotted: noise amplitude", fontsize=9, loc="right", color="#606060")


def _plot_train(
    axes: Axes,
    curve: _Curve,
    take: Callable[[TrainRecord], float],
    label: str,
    colour: str,
    dashes: str | tuple[float, tuple[float, ...]],
    strength: float = 1.0,
) -> None:
    if not curve.train:
        return
    epochs, values = _thin(curve.epochs(curve.train), [take(record) for record in curve.train])
    marker = "." if len(epochs) == 1 else ""
    axes.plot(
        epochs,
        values,
        label=label or None,
        color=colour,
        linestyle=dashes,
        lw=1.2,
        alpha=strength,
        marker=marker,
    )


def _plot_split(
    axes: Axes,
    curve: _Curve,
    split: str,
    take: Callable[[EvaluationRecord], float],
    label: str,
    colour: str,
    dashes: str | tuple[float, tuple[float, ...]],
    marker: str,
) -> None:
    records = curve.split(split)
    if not records:
        return
    every = max(1, math.ceil(len(records) / 30))
    axes.plot(
        curve.epochs(records),
        [take(record) for record in records],
        label=label,
        color=colour,
        linestyle=dashes,
        lw=1.5,
        marker=marker,
        markersize=3.5,
        markevery=every,
    )


def _annotate_best(axes: Axes, curve: _Curve) -> None:
    test = [record for record in curve.split("test") if math.isfinite(record.accuracy)]
    if not test:
        return
    best = max(test, key=_accuracy)
    axes.axhline(best.accuracy, color=_TEST_COLOUR, lw=0.8, ls=":")
    text = f"best test accuracy {best.accuracy * 100:.2f} %, epoch {best.step / curve.steps_per_epoch:.4g}"
    axes.set_title(text, fontsize=9, loc="right", color=_TEST_COLOUR)


def _legend(axes: Axes, columns: int) -> None:
    if axes.get_legend_handles_labels()[0]:
        axes.legend(loc="lower left", bbox_to_anchor=(0, 1), ncols=columns, fontsize=9, borderaxespad=0.2)


def _choose_scale(axes: Axes) -> None:
    """Use a logarithmic axis where the curves span a range that a linear one would hide."""
    values = [value for line in axes.get_lines() for value in numpy.asarray(line.get_ydata(), dtype=float)]
    positive = [value for value in values if math.isfinite(value) and value > 0]
    if positive and max(positive) / min(positive) > _LOG_RANGE:
        axes.set_yscale("log")
        axes.yaxis.set_major_locator(LogLocator(subs=(1, 2, 5)))
        axes.yaxis.set_major_formatter(FuncFormatter(lambda value, _: f"{value:g}"))
        axes.yaxis.set_minor_formatter(NullFormatter())
    else:
        axes.set_ylim(bottom=0)


def _thin(epochs: list[float], values: list[float]) -> tuple[list[float], list[float]]:
    """Return means over equal chunks, so that no line has more than `_MOST_POINTS` points."""
    size = math.ceil(len(epochs) / _MOST_POINTS)
    if size <= 1:
        return epochs, values
    starts = range(0, len(epochs), size)
    return [_mean(epochs[at : at + size]) for at in starts], [_mean(values[at : at + size]) for at in starts]


def _mean(values: list[float]) -> float:
    return math.fsum(values) / len(values) if all(map(math.isfinite, values)) else math.nan


def _peak(curve: _Curve, take: Callable[[TrainRecord], float]) -> float:
    return max((value for record in curve.train if math.isfinite(value := take(record))), default=0.0)


def _loss(record: TrainRecord | EvaluationRecord) -> float:
    return record.loss


def _accuracy(record: TrainRecord | EvaluationRecord) -> float:
    return record.accuracy


def _learning_rate(record: TrainRecord) -> float:
    return record.learning_rate


def _noise_amplitude(record: TrainRecord) -> float:
    return record.noise_amplitude
