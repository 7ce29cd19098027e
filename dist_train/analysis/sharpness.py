"""How sharp a minimum a checkpoint lies in, by three measures, each kept as soon as it is there."""

from __future__ import annotations

import math
import time
from collections.abc import Callable, Collection, Sequence
from pathlib import Path

import scipy
import torch

from dist_train import __version__
from dist_train.analysis.directions import check_exclusions
from dist_train.analysis.landscape_subject import read_stored
from dist_train.analysis.sharpness_measures import (
    expected_rises,
    full_space,
    largest_eigenvalues,
    subspace,
    trace_with_error,
)
from dist_train.analysis.sharpness_record import (
    MEASURES,
    HessianResult,
    KeskarResult,
    Measure,
    MeasuredCheckpoint,
    MeasuredData,
    RiseResult,
    SharpnessRecord,
    SharpnessSettings,
    read_record,
    record_path,
    write_record,
)
from dist_train.analysis.subset_loss import SubsetLoss, open_stored_subset
from dist_train.cluster.launch import current_launch
from dist_train.outcome import DivergedError, UsageError
from dist_train.rundir.atomic import finite
from dist_train.rundir.paths import RunDirectory

Report = Callable[[str], None]
"""Takes a line for the user about what is being done."""


def measure_sharpness(
    target: Path,
    settings: SharpnessSettings,
    measures: Collection[Measure] = MEASURES,
    overrides: Sequence[str] = (),
    folder: Path | None = None,
    report: Report = lambda text: None,
) -> tuple[SharpnessRecord, Path]:
    """Return what is known of the checkpoint `target`, or of the run's last, once `measures` are taken, and where.

    The record lies in `folder`, else in the run's folder `analysis`. It is written after every measure; one that it
    holds is not taken again: its name stands for the checkpoint's bytes, the data and the settings.

    Raises:
        UsageError: what is asked for cannot be measured, or the record cannot be written.
        DivergedError: the loss or the norms' statistics are not finite: there is nothing to measure.
    """
    if current_launch().size > 1:
        raise UsageError("sharpness is measured by one process: start it without a launcher", code="one-process-only")
    stored = read_stored(target)
    loss, checkpoint, data = open_stored_subset(stored, settings, overrides)
    folder = folder or RunDirectory.of_checkpoint(stored.path.resolve()).analysis
    file = record_path(folder, checkpoint, data, settings)
    known = read_record(file) if file.exists() else None
    if known is not None and all(map(known.has, measures)):
        report(f"measured before: delete {file} to measure again")
        return known, file
    check_exclusions(loss.weights, settings.exclude)
    record = known or _begin(loss, checkpoint, data, settings)
    for measure in MEASURES:
        if measure in measures and not record.has(measure):
            record = _take(measure, loss, record, report)
            write_record(file, record)
    return record, file


def _begin(
    loss: SubsetLoss, checkpoint: MeasuredCheckpoint, data: MeasuredData, settings: SharpnessSettings
) -> SharpnessRecord:
    value = loss.value_at_flat(loss.clean)
    if not math.isfinite(value):
        raise DivergedError(
            f"{checkpoint.path}: the loss is not finite: there is nothing to measure", code="loss-not-finite"
        )
    if settings.keskar_dimensions > loss.count:
        raise UsageError(
            f"--keskar-dimensions {settings.keskar_dimensions}: there are {loss.count} weights", code="option-range"
        )
    return SharpnessRecord(
        checkpoint=checkpoint,
        data=data,
        settings=settings,
        weights=loss.count,
        loss=value,
        accuracy=loss.accuracy(),
        versions={"dist_train": __version__, "torch": torch.__version__, "scipy": scipy.__version__},
    )


def _take(measure: Measure, loss: SubsetLoss, record: SharpnessRecord, report: Report) -> SharpnessRecord:
    """Return `record` with `measure` added."""
    begun, settings = time.monotonic(), record.settings
    found: dict[str, object]
    match measure:
        case "keskar":
            full, within = full_space(loss, settings), subspace(loss, settings)
            found = {"keskar": KeskarResult(full=finite(full), subspace=finite(within))}
        case "rise":
            rises = zip(settings.amplitudes, *expected_rises(loss, settings), strict=True)
            found = {
                "expected_rise": tuple(
                    RiseResult(
                        amplitude=amplitude,
                        mean=finite(float(mean)),
                        standard_error=finite(float(error)),
                        draws=settings.draws,
                    )
                    for amplitude, mean, error in rises
                )
            }
        case "hessian":
            values, vectors = largest_eigenvalues(loss, settings)
            trace, error = trace_with_error(loss, values, vectors, settings)
            found = {
                "hessian": HessianResult(
                    eigenvalues=tuple(map(finite, values.tolist())),
                    trace=finite(trace),
                    trace_standard_error=finite(error),
                )
            }
    seconds = round(time.monotonic() - begun, 1)
    report(f"{measure}: {seconds:g} s")
    return record.model_copy(update={**found, "seconds": {**record.seconds, measure: seconds}})
