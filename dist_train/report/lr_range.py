"""What a learning-rate range test found (Smith 2015, arXiv 1506.01186): loss against rate, and a suggestion."""

from __future__ import annotations

import csv
import io
import math
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from statistics import fmean

from dist_train.outcome import UsageError
from dist_train.report.drawing import save, stacked
from dist_train.rundir import atomic
from dist_train.rundir.paths import RunDirectory
from dist_train.rundir.records import TrainRecord, read_records
from dist_train.watch.figure import BATCH, Axis, Chart, Point, Series, loss_axis, plain, three_digits

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
