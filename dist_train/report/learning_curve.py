"""Loss and accuracy against epoch as a picture file, drawn from `metrics.jsonl`: one run, or several to compare."""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence
from dataclasses import replace
from pathlib import Path

from dist_train.outcome import UsageError
from dist_train.report.drawing import save, stacked
from dist_train.rundir.paths import RunDirectory
from dist_train.rundir.records import read_records
from dist_train.watch.figure import (
    ACCURACY,
    BATCH,
    LEARNING_RATE,
    LOSS,
    NOISE,
    Axis,
    Chart,
    Measured,
    Quantity,
    Series,
    epochs_axis,
    learning_curve,
    measured_of,
    plain,
    rate_curve,
)

_FORMATS = (".png", ".svg", ".pdf")
_MOST_POINTS = 1_000
_SHARE = Axis("share of peak", -0.06, 1.12, plain)
_HEIGHTS = (3.0, 3.0, 1.4)
"""Inches of loss, accuracy, schedule."""


def draw_learning_curve(run_directories: Sequence[Path], output: Path) -> None:
    """Draw the runs' learning curves into `output`, a PNG, SVG or PDF file by its suffix.

    Raises UsageError for another suffix, a folder that does not exist, or a run without measurements.
    """
    if output.suffix.lower() not in _FORMATS:
        raise UsageError(f"cannot draw {output}: the name must end in .png, .svg or .pdf", code="output-form")
    if not output.parent.is_dir():
        raise UsageError(f"cannot draw {output}: there is no folder {output.parent}", code="folder-missing")
    runs = [_read(RunDirectory(directory)) for directory in run_directories]
    if not runs:
        raise UsageError("no run to draw: name at least one run directory", code="no-run-named")
    charts = [chart for chart in (*map(_compared, (LOSS, ACCURACY), (runs, runs)), _schedule(runs)) if chart.series]
    save(stacked(charts, _HEIGHTS[: len(charts)], runs[0].name if len(runs) == 1 else f"{len(runs)} runs"), output)


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


def _compared(quantity: Quantity, runs: Sequence[Measured]) -> Chart:
    """Return loss or accuracy of all `runs` in one chart; of several, each batch and the test split alone."""
    charts = [chart for run in runs if (chart := learning_curve(quantity, run, _MOST_POINTS))]
    note = _best(runs[0]) if quantity is ACCURACY else ""
    series = charts[0].series
    if len(runs) > 1:
        pairs = enumerate(zip(runs, charts, strict=True), start=1)
        series = tuple(each for number, (run, chart) in pairs for each in _named(run, chart, f"s{number}"))
        note = "test; faint: train, each batch" if quantity is LOSS else ""
    axis = quantity.axis(quantity.title, [each.points for each in series])
    return replace(charts[0], title="", x=epochs_axis(series, charts[0].x.title), left=axis, series=series, note=note)


def _named(run: Measured, chart: Chart, style: str) -> Iterator[Series]:
    is_tested = any(series.style == "test" for series in chart.series)
    for series in chart.series:
        if series.style == "test":
            yield replace(series, label=run.name, style=style)
        elif series.style == BATCH:
            yield replace(series, label="" if is_tested else f"{run.name} (train only)", style=style)


def _best(run: Measured) -> str:
    tests = [record for record in run.evaluations["test"] if math.isfinite(record.accuracy)]
    if not tests:
        return ""
    best = max(tests, key=ACCURACY.take)
    where = f"epoch {run.place(best):.4g}" if run.steps_per_epoch else f"step {best.step}"
    return f"best test accuracy {ACCURACY.text(best.accuracy)}, {where}"


def _schedule(runs: Sequence[Measured]) -> Chart:
    """Return learning rate and noise amplitude of `runs`, each as a share of its peak."""
    drawn: list[Series] = []
    for number, run in enumerate(runs, start=1):
        for quantity, style in ((LEARNING_RATE, "s0"), (NOISE, "s3")):
            if chart := rate_curve(quantity, run, _MOST_POINTS):
                [series] = chart.series
                peak = max(point.y for point in series.points if math.isfinite(point.y))
                points = tuple(replace(point, y=point.y / peak) for point in series.points)
                label = f"{quantity.name} (peak {peak:.3g})" if len(runs) == 1 else ""
                own = style if len(runs) == 1 else f"s{number}"
                drawn.append(Series(label, own, points, "line" if quantity is LEARNING_RATE else "dashed"))
    across, share = Axis("epoch" if runs[0].steps_per_epoch else "step", 0.0, 1.0, plain), _SHARE
    note = "solid: learning rate; dashed: noise amplitude" if len(runs) > 1 else ""
    return Chart(
        "schedule", "", "", epochs_axis(drawn, across.title) if drawn else across, share, tuple(drawn), note=note
    )
