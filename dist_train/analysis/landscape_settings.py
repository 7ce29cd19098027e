"""What a landscape is asked to show: its settings, checked, and as its results record them."""

from __future__ import annotations

import math
from dataclasses import asdict, dataclass
from typing import Any, Literal

from dist_train.outcome import UsageError

Kind = Literal["interpolate", "direction", "plane"]
Statistics = Literal["recomputed", "interpolated"]

FORMAT = 1
"""Counts the changes after which the same settings give other numbers."""


@dataclass(frozen=True)
class DirectionSettings:
    """How directions are drawn: see `directions.py`."""

    normalization: str = "filter"
    exclude: tuple[str, ...] = ("norm", "bias")
    seed: int = 0


@dataclass(frozen=True)
class MeasureSettings:
    """What is measured at each point. Numbers of samples: None is all."""

    samples: int | None = 10_000
    test_samples: int | None = None
    statistics: Statistics = "recomputed"
    statistics_samples: int | None = None
    """None: as many as the run's `model.norm_samples`."""
    batch_size: int | None = None
    """None: what suits the device."""
    precision: Literal["float32", "run"] = "float32"
    subset_seed: int = 0

    def __post_init__(self) -> None:
        for name in ("samples", "test_samples", "statistics_samples", "batch_size"):
            value = getattr(self, name)
            if value is not None and value < 1:
                raise UsageError(f"--{name.replace('_', '-')} is {value}: it must be 1 or more")


@dataclass(frozen=True)
class LandscapeSettings:
    """Which points, and how they are measured.

    `lines` is the number of directions that are walked alone. With `trajectory` a plane's directions are the
    principal ones of the run's checkpoints, and its axes reach as far as these lie; `start` and `stop` are not used.
    """

    kind: Kind
    start: float
    stop: float
    points: int
    measure: MeasureSettings = MeasureSettings()
    directions: DirectionSettings = DirectionSettings()
    lines: int = 1
    trajectory: bool = False

    def __post_init__(self) -> None:
        if not (math.isfinite(self.start) and math.isfinite(self.stop) and self.start < self.stop):
            raise UsageError(f"--range {self.start:g} {self.stop:g}: the first number must be below the second")
        if self.points < 2:
            raise UsageError(f"--points is {self.points}: a line has 2 or more")
        if self.lines < 1:
            raise UsageError(f"--directions is {self.lines}: there must be 1 or more")

    def record(self) -> dict[str, Any]:
        """Return what its results record, and are named by: all that the numbers depend on."""
        fields: dict[str, Any] = {"format": FORMAT, "points": self.points, **asdict(self.measure)}
        # What it comes to is recorded by the subject, as `compute`.
        del fields["precision"]
        if self.trajectory:
            fields |= {"trajectory": True, "exclude": list(self.directions.exclude)}
        else:
            fields |= {"start": self.start, "stop": self.stop}
        if self.kind == "direction":
            fields["directions"] = self.lines
        if self.kind != "interpolate" and not self.trajectory:
            fields |= asdict(self.directions) | {"exclude": list(self.directions.exclude)}
        return fields
