"""How sharp a minimum a checkpoint lies in, by three measures, each kept as soon as it is there."""

from __future__ import annotations

import math
import time
from collections.abc import Callable, Collection, Mapping, Sequence
from pathlib import Path
from types import MappingProxyType

import scipy
import torch

from dist_train import __version__
from dist_train.analysis.directions import check_exclusions
from dist_train.analysis.landscape_subject import read_stored
from dist_train.analysis.sharpness_measures import Ascent, Probing, expected_rises, full_space, spectrum, subspace
from dist_train.analysis.sharpness_record import (
    MEASURES,
    HessianResult,
    KeskarResult,
    Measure,
    RiseResult,
    SharpnessRecord,
    SharpnessSettings,
    read_record,
    record_path,
    write_record,
)
from dist_train.analysis.subset_loss import StoredSubset, SubsetLoss, open_stored_subset
from dist_train.cluster.launch import current_launch
from dist_train.config import NoiseSettings
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
    subset = open_stored_subset(stored, settings, overrides)
    file = record_path(
        folder or RunDirectory.of_checkpoint(stored.path.resolve()).analysis, subset.checkpoint, subset.data, settings
    )
    known = read_record(file) if file.exists() else None
    if known is not None and all(map(known.has, measures)):
        report(f"measured before: delete {file} to measure again")
        return known, file
    loss = SubsetLoss(subset.model, subset.batches, threads=subset.threads)
    check_exclusions(loss.weights, settings.exclude)
    record = known or _begin(subset, loss, settings)
    for measure in MEASURES:
        if measure in measures and not record.has(measure):
            record = _take(measure, loss, record, report)
            write_record(file, record)
    return record, file


def _begin(subset: StoredSubset, loss: SubsetLoss, settings: SharpnessSettings) -> SharpnessRecord:
    value = loss.value_at_flat(loss.clean)
    if not math.isfinite(value):
        raise DivergedError(
            f"{subset.checkpoint.path}: the loss is not finite: there is nothing to measure", code="loss-not-finite"
        )
    if settings.keskar_dimensions > loss.count:
        raise UsageError(
            f"--keskar-dimensions {settings.keskar_dimensions}: there are {loss.count} weights", code="option-range"
        )
    return SharpnessRecord(
        checkpoint=subset.checkpoint,
        data=subset.data,
        settings=settings,
        weights=loss.count,
        loss=value,
        accuracy=loss.accuracy(),
        versions={"dist_train": __version__, "torch": torch.__version__, "scipy": scipy.__version__},
    )


def _take(measure: Measure, loss: SubsetLoss, record: SharpnessRecord, report: Report) -> SharpnessRecord:
    """Return `record` with `measure` added."""
    begun = time.monotonic()
    found = _TAKERS[measure](loss, record.settings)
    seconds = round(time.monotonic() - begun, 1)
    report(f"{measure}: {seconds:g} s")
    return record.model_copy(update={**found, "seconds": {**record.seconds, measure: seconds}})


def _take_keskar(loss: SubsetLoss, settings: SharpnessSettings) -> Mapping[str, object]:
    ascent = Ascent(settings.keskar_epsilon, settings.keskar_iterations, settings.keskar_starts, settings.seed)
    return {
        "keskar": KeskarResult(
            full=finite(full_space(loss, ascent)),
            subspace=finite(subspace(loss, ascent, settings.keskar_dimensions)),
        )
    }


def _take_rise(loss: SubsetLoss, settings: SharpnessSettings) -> Mapping[str, object]:
    noise = NoiseSettings(distribution="uniform", scale=settings.scale, exclude=settings.exclude)
    rises = expected_rises(loss, noise, settings.amplitudes, draws=settings.draws, seed=settings.seed)
    return {
        "expected_rise": tuple(
            RiseResult(
                amplitude=rise.amplitude,
                mean=finite(rise.mean),
                standard_error=finite(rise.standard_error),
                draws=rise.draws,
            )
            for rise in rises
        )
    }


def _take_hessian(loss: SubsetLoss, settings: SharpnessSettings) -> Mapping[str, object]:
    found = spectrum(
        loss,
        Probing(settings.hessian_eigenvalues, settings.hessian_tolerance, settings.hessian_probes, settings.seed),
    )
    return {
        "hessian": HessianResult(
            eigenvalues=tuple(map(finite, found.eigenvalues)),
            trace=finite(found.trace),
            trace_standard_error=finite(found.trace_standard_error),
        )
    }


_TAKERS: Mapping[Measure, Callable[[SubsetLoss, SharpnessSettings], Mapping[str, object]]] = MappingProxyType(
    {"keskar": _take_keskar, "rise": _take_rise, "hessian": _take_hessian}
)
