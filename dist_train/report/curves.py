"""Curves of runs as files of their own: loss and accuracy against epoch, and what a learning-rate range test found.

Both are drawn from `metrics.jsonl`; learning curves are of one run, or of several to compare. The range test is Smith's
(2015, arXiv 1506.01186): loss against rate, and a suggestion.
"""

from __future__ import annotations

import csv
import io
import math
from collections.abc import Iterator, Sequence
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from statistics import fmean

from dist_train.outcome import UsageError
from dist_train.report.drawing import save, stacked
from dist_train.rundir import atomic
from dist_train.rundir.paths import RunDirectory
from dist_train.rundir.records import TrainRecord, read_records
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


_INCHES = 3.5


@dataclass(frozen=True)
class RangeTest:
    """The loss at each rate, as it is and smoothed, and where the smoothed one falls steepest, if it falls at all."""

    rates: tuple[float, ...]
    losses: tuple[float, ...]
    smoothed: tuple[float, ...]
    suggestion: float | None


def range_test(rates: Sequence[float], losses: Sequence[float]) -> RangeTest:
    """Return what `losses` at rising `rates` say: where the smoothed loss falls steepest, per log rate.

    It is a mean over a tenth of the updates around each, which does not lag behind, of losses up to twice the first:
    a jump says only that the rate is too high.
    """
    half = max(1, len(losses) // 20)
    capped = [min(loss, 2 * losses[0]) for loss in losses]
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
    """Return the range test that the run in `directory` made; losses after the first that is not finite are left out.

    Raises:
        UsageError: it has made fewer than two updates.
    """
    found = [record for record in read_records(directory.metrics) if isinstance(record, TrainRecord)]
    end = next((at for at, record in enumerate(found) if not math.isfinite(record.loss)), len(found))
    if end < 2:
        raise UsageError(f"{directory.root} holds fewer than two updates: begin at a lower rate", code="no-measurement")
    return range_test([record.learning_rate for record in found[:end]], [record.loss for record in found[:end]])


def write_range_test(test: RangeTest, directory: RunDirectory) -> tuple[Path, ...]:
    """Write `test` into `directory` as lr_range.csv, .json and .png, and return where they are."""
    table, record, picture = (directory.root / f"lr_range.{suffix}" for suffix in ("csv", "json", "png"))
    text = io.StringIO()
    rows = csv.writer(text, lineterminator="\n")
    rows.writerow(("learning_rate", "loss", "smoothed_loss"))
    rows.writerows(zip(test.rates, test.losses, test.smoothed, strict=True))
    atomic.write_text(table, text.getvalue())
    atomic.write_text(record, atomic.json_text(asdict(test), indent=2) + "\n")
    save(stacked([_chart(test)], (_INCHES,), directory.root.resolve().name), picture)
    return table, record, picture


def _chart(test: RangeTest) -> Chart:
    def points(values: Sequence[float]) -> tuple[Point, ...]:
        return tuple(map(Point, test.rates, values))

    series = (
        Series("each batch", BATCH, points(test.losses), "faint"),
        Series("smoothed", "train", points(test.smoothed)),
    )
    across = Axis("learning rate", test.rates[0], test.rates[-1], plain, is_logarithmic=True)
    note = "" if test.suggestion is None else f"steepest at {three_digits(test.suggestion)}"
    left, words = loss_axis("loss", test.losses, plain), "Loss against learning rate."
    return Chart("lr-range", "", words, across, left, series, note=note, upright=test.suggestion)
