"""The settings of a sharpness measurement, and the JSON record of its results."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Mapping
from pathlib import Path
from typing import Annotated, Literal

from pydantic import BeforeValidator, Field, NonNegativeInt, PositiveFloat, PositiveInt, ValidationError

from dist_train.config.parts import AtLeastTwo, Section
from dist_train.outcome import UsageError, writing
from dist_train.rundir import atomic
from dist_train.rundir.atomic import finite, read_regular

FORMAT = 1
Measure = Literal["keskar", "rise", "hessian", "width", "noise-scale"]
USUAL: tuple[Measure, ...] = ("keskar", "rise", "hessian")
MEASURES: Mapping[Measure, str] = {
    "keskar": "keskar",
    "rise": "expected_rise",
    "hessian": "hessian",
    "width": "widths",
    "noise-scale": "noise_scale",
}
"""The measures, and the fields of a record that hold them."""


class SharpnessSettings(Section):
    """Everything that a result depends on besides checkpoint and data; see `dist-train sharpness --help`."""

    samples: AtLeastTwo = 2048
    seed: NonNegativeInt = 0
    batch_size: AtLeastTwo = 256
    statistics: Literal["checkpoint", "recomputed", "batch"] = "checkpoint"
    keskar_epsilon: PositiveFloat = 1e-3
    keskar_iterations: PositiveInt = 10
    keskar_dimensions: PositiveInt = 100
    keskar_starts: PositiveInt = 2
    amplitudes: Annotated[tuple[PositiveFloat, ...], Field(min_length=1)] = (1e-4, 1e-3, 1e-2, 1e-1)
    draws: AtLeastTwo = 8
    scale: Literal["absolute", "weight", "filter"] = "absolute"
    exclude: tuple[str, ...] = ("norm",)
    hessian_eigenvalues: PositiveInt = 5
    hessian_tolerance: PositiveFloat = 1e-3
    hessian_probes: AtLeastTwo = 16
    width_rises: Annotated[tuple[PositiveFloat, ...], Field(min_length=1)] = (0.05, 0.5, 1.0)
    width_directions: AtLeastTwo = 5
    width_reach: PositiveFloat = 2.0


class MeasuredCheckpoint(Section):
    """The file whose weights were measured."""

    path: str
    sha256: str
    step: int


class MeasuredData(Section):
    """The images, their digest as the network reads them, and the layout and arithmetic that change last digits."""

    samples: int
    sha256: str
    layout: Literal["channels_last", "contiguous"] = "channels_last"
    compute: Literal["float32"] = "float32"


Finite = Annotated[float | None, BeforeValidator(lambda value: None if value is None else finite(float(value)))]
"""None if a number overflowed."""


class KeskarResult(Section):
    """Keskar's measure in percent."""

    full: Finite
    subspace: Finite


class RiseResult(Section):
    """The expected rise of the loss at one amplitude."""

    amplitude: float
    mean: Finite
    standard_error: Finite
    draws: int


class HessianResult(Section):
    """The largest eigenvalues, largest first, and the trace."""

    eigenvalues: tuple[Finite, ...]
    trace: Finite
    trace_standard_error: Finite


class WidthResult(Section):
    """The mean width over directions at one rise; `censored` of them end beyond the reach."""

    rise: float
    mean: float
    standard_error: float
    directions: int
    censored: int


class NoiseScaleResult(Section):
    """The gradient noise scale in samples, its jackknife error over batches, and the two terms of the ratio."""

    value: Finite
    standard_error: Finite
    variance: Finite
    squared_gradient: Finite
    batches: int


class SharpnessRecord(Section):
    """The sharpness of a checkpoint with these settings; measures not taken yet are None."""

    format: Literal[1] = 1
    checkpoint: MeasuredCheckpoint
    data: MeasuredData
    settings: SharpnessSettings
    weights: int
    loss: float
    accuracy: float
    keskar: KeskarResult | None = None
    expected_rise: tuple[RiseResult, ...] | None = None
    hessian: HessianResult | None = None
    widths: tuple[WidthResult, ...] | None = None
    noise_scale: NoiseScaleResult | None = None
    seconds: dict[str, float] = Field(default_factory=dict)
    versions: dict[str, str] = Field(default_factory=dict)

    def has(self, measure: Measure) -> bool:
        """Whether `measure` has been taken."""
        return getattr(self, MEASURES[measure]) is not None


def merged(record: SharpnessRecord, stored: SharpnessRecord) -> SharpnessRecord:
    """Return `record` with the measures that only `stored`, of the same checkpoint, data and settings, has."""
    fields = {MEASURES[measure]: getattr(stored, MEASURES[measure]) for measure in MEASURES if not record.has(measure)}
    return record.model_copy(update={**fields, "seconds": {**stored.seconds, **record.seconds}})


def settings_from(values: dict[str, object]) -> SharpnessSettings:
    """Return settings with `values` and defaults for the rest. Raises UsageError, which lists every problem."""
    try:
        return SharpnessSettings.model_validate(values)
    except ValidationError as error:
        problems = [
            f"--{str(problem['loc'][0]).replace('_', '-')}: {problem['msg'][0].lower()}{problem['msg'][1:]}"
            for problem in error.errors()
        ]
        raise UsageError("; ".join(problems), code="option-range") from error


def record_path(folder: Path, checkpoint: MeasuredCheckpoint, data: MeasuredData, settings: SharpnessSettings) -> Path:
    """Return the path in `folder` of the record for this checkpoint's bytes, these data and these settings."""
    parts = [FORMAT, checkpoint.sha256, data.model_dump(mode="json"), settings.model_dump(mode="json")]
    digest = hashlib.sha256(json.dumps(parts, sort_keys=True).encode()).hexdigest()
    return folder / f"sharpness-{data.compute}-{data.layout}-{digest[:12]}.json"


def read_record(path: Path) -> SharpnessRecord:
    """Return the record at `path`. Raises UsageError if it cannot be read, or is not a record."""
    try:
        return SharpnessRecord.model_validate_json(read_regular(path))
    except OSError as error:
        raise UsageError(f"{path} cannot be read: {error.strerror or error}", code="record-unreadable") from error
    except ValidationError as error:
        raise UsageError(
            f"{path} is damaged or from another version: delete it and measure again", code="record-damaged"
        ) from error


def write_record(path: Path, record: SharpnessRecord) -> None:
    """Write `record` to `path` atomically. Raises UsageError if its folder cannot be written."""
    with writing(path, "choose a folder with --output"):
        atomic.write_text(path, record.model_dump_json(indent=2) + "\n")
