"""The settings of a landscape, and the files of its results."""

from __future__ import annotations

import csv
import hashlib
import io
import json
import math
import os
import shutil
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from itertools import groupby
from pathlib import Path
from typing import Any, Literal, NamedTuple

from pydantic import TypeAdapter

from dist_train.outcome import UsageError, writing
from dist_train.rundir import atomic
from dist_train.rundir.atomic import json_text, read_regular
from dist_train.rundir.paths import RunDirectory

Kind = Literal["interpolate", "direction", "plane"]
Statistics = Literal["recomputed", "interpolated"]

OTHER_OUTPUT = "choose a folder with --output"
FORMAT = 2  # increased whenever the same settings start to give other numbers


@dataclass(frozen=True)
class Point:
    """`alpha` along direction number `direction`, `beta` along a plane's second direction (0 on a line)."""

    direction: int
    alpha: float
    beta: float = 0.0


class Measured(NamedTuple):
    """Mean loss and accuracy over a split; NaN if they cannot be computed."""

    loss: float
    accuracy: float


@dataclass(frozen=True)
class LandscapeSettings:
    """Which points are evaluated, and how. Sample counts: None means all.

    `lines` is the number of directions of a `direction` landscape. With `trajectory` a plane's directions are the
    principal ones of the run's checkpoints and its axes cover them; `start` and `stop` are then unused.
    """

    kind: Kind
    start: float
    stop: float
    points: int
    lines: int = 1
    trajectory: bool = False
    # of random directions (`directions.random_direction`)
    normalization: str = "filter"
    exclude: Sequence[str] = ("norm", "bias")
    seed: int = 0
    # of what is measured at each point
    samples: int | None = 10_000
    test_samples: int | None = None
    statistics: Statistics = "recomputed"
    statistics_samples: int | None = None  # None: the run's `model.norm_samples`
    batch_size: int | None = None  # None: chosen for the device
    subset_seed: int = 0
    precision: Literal["float32", "run"] = "float32"

    def __post_init__(self) -> None:
        if not (math.isfinite(self.start) and math.isfinite(self.stop) and self.start < self.stop):
            raise UsageError(
                f"--range {self.start:g} {self.stop:g}: the first number must be below the second", code="option-range"
            )
        if self.points < 2:
            raise UsageError(f"--points is {self.points}: a line has 2 or more", code="option-range")
        place = -self.start * (self.points - 1) / (self.stop - self.start)  # of the checkpoint among the points
        if self.kind == "direction" and abs(place - min(max(round(place), 0), self.points - 1)) > 1e-9:
            raise UsageError(
                f"--points is {self.points}: none of them is the checkpoint, alpha 0, whose basin is measured; "
                f"choose an odd number, and a --range that is as wide on both sides",
                code="option-range",
            )
        if self.lines < 1:
            raise UsageError(f"--directions is {self.lines}: there must be 1 or more", code="option-range")
        for name in ("samples", "test_samples", "statistics_samples", "batch_size"):
            value = getattr(self, name)
            if value is not None and value < 1:
                raise UsageError(f"--{name.replace('_', '-')} is {value}: it must be 1 or more", code="option-range")
        if self.statistics_samples is not None and self.statistics == "interpolated":
            wrong = "--statistics-samples are for recomputed statistics: leave it out, or --statistics interpolated"
            raise UsageError(wrong, code="option-alone")

    def record(self) -> dict[str, Any]:
        """Return every setting that the numbers depend on; results record them and are named by their digest."""
        # The subject records the resulting precision as `compute`.
        names = ["points", "samples", "test_samples", "statistics", "statistics_samples", "batch_size", "subset_seed"]
        names += ["trajectory", "exclude"] if self.trajectory else ["start", "stop"]
        if self.kind != "interpolate" and not self.trajectory:
            names += ["normalization", "exclude", "seed"]
        fields = {"format": FORMAT, **{name: getattr(self, name) for name in names}}
        return fields | ({"directions": self.lines} if self.kind == "direction" else {})


SPLITS = ("train", "test")
_COLUMNS = ("direction", "alpha", "beta", "split", "loss", "accuracy")


@dataclass(frozen=True)
class Identity:
    """What a result was computed from: `checkpoints` and `settings` as settings.json records them."""

    kind: str
    checkpoints: Sequence[Mapping[str, Any]]
    settings: Mapping[str, Any]

    @property
    def name(self) -> str:
        """The result's folder name: a digest, and precision and layout, on which the last digits depend."""
        layout = "channels_last" if self.settings["channels_last"] else "contiguous"
        return f"{self.kind}-{self.settings['compute']}-{layout}-{self.key}"

    @property
    def key(self) -> str:
        """A digest of the checkpoints' contents (not their paths) and the settings, 16 hexadecimal digits."""
        fields = [self.kind, [checkpoint["sha256"] for checkpoint in self.checkpoints], self.settings]
        text = json.dumps(fields, sort_keys=True)
        return hashlib.sha256(text.encode()).hexdigest()[:16]


@dataclass(frozen=True)
class PointRow:
    """A line of points.csv."""

    direction: int
    alpha: float
    beta: float
    split: str
    loss: float
    accuracy: float


@dataclass(frozen=True)
class LineWidth:
    """Where the basin along a direction begins and ends."""

    direction: int
    left: float
    right: float


@dataclass(frozen=True)
class MeanWidth:
    """The mean width of a basin over `directions`; in `open` of them it extends beyond the line."""

    mean: float
    open: int
    directions: Sequence[LineWidth]


@dataclass(frozen=True)
class Landscape(Identity):
    """A finished result in `folder`; `widths` and a plane's `trajectory` as settings.json records them."""

    rows: Sequence[PointRow]
    widths: Mapping[str, Mapping[str, MeanWidth]] = field(default_factory=dict)
    trajectory: Mapping[str, Any] | None = None
    folder: Path = Path()

    @property
    def roots(self) -> tuple[Path, ...]:
        """The run directories of its checkpoints as they were then: two for an interpolation."""
        return tuple(RunDirectory.of_checkpoint(Path(checkpoint["path"])).root for checkpoint in self.checkpoints)

    @property
    def steps(self) -> tuple[int, ...]:
        """The steps of its checkpoints: two for an interpolation."""
        return tuple(checkpoint["step"] for checkpoint in self.checkpoints)

    @property
    def step(self) -> int:
        """The step of the checkpoint at its origin: an interpolation's first, otherwise the last."""
        return self.steps[0 if self.kind == "interpolate" else -1]

    @property
    def shared_settings(self) -> str:
        """The settings that comparable results share, as JSON text."""
        return shared_settings(self.settings)

    @property
    def widths_by_key(self) -> dict[tuple[str, str], MeanWidth]:
        """The mean widths by (basin, factor)."""
        return {(basin, factor): width for basin, found in self.widths.items() for factor, width in found.items()}

    def lines(self, split: str) -> tuple[tuple[PointRow, ...], ...]:
        """Return the points of `split` by direction, each ordered by alpha."""
        rows = sorted((row for row in self.rows if row.split == split), key=lambda row: (row.direction, row.alpha))
        return tuple(tuple(line) for _, line in groupby(rows, lambda row: row.direction))

    def unresolved(self, width: MeanWidth) -> int:
        """Return in how many directions the basin contains no point of the line but the minimum."""

        def points(basin: LineWidth) -> int:
            alphas = (row.alpha for row in self.rows if row.split == "train" and row.direction == basin.direction)
            return sum(basin.left <= alpha <= basin.right for alpha in alphas)

        return sum(points(basin) < 2 for basin in width.directions)


_INCIDENTAL = frozenset({"data_digest", "device", "batch_size", "statistics_batch", "threads"})


def shared_settings(settings: Mapping[str, Any]) -> str:
    """Return the settings that comparable results share: not how they were computed or which images a seed chose."""
    # Norms that use each pass's own statistics give another loss with passes of another size.
    left_out = _INCIDENTAL - {"batch_size"} if settings.get("statistics") == "batch" else _INCIDENTAL
    return json.dumps({name: value for name, value in settings.items() if name not in left_out}, sort_keys=True)


class LandscapeFolder:
    """The folder of one result, within a run's `analysis` folder."""

    def __init__(self, parent: Path, identity: Identity) -> None:
        self.identity = identity
        self.path = parent / identity.name
        self.points = self.path / "points.csv"
        self.settings = self.path / "settings.json"
        self._finished_points = self.path / "partial"

    def begin(self) -> bool:
        """Create folder and settings.json; return whether all points are finished. Raises UsageError."""
        with writing(self.path, OTHER_OUTPUT):
            if not (is_finished := self.points.is_file()):
                self._finished_points.mkdir(parents=True, exist_ok=True)
                self.save_settings({})
            return is_finished

    def save_settings(self, found: Mapping[str, Any]) -> None:
        """Write settings.json: the identity, and the results `found`. Raises UsageError."""
        text = json_text({**vars(self.identity), "widths": {}, **found}, indent=2)
        with writing(self.settings, OTHER_OUTPUT):
            atomic.write_text(self.settings, text + "\n")

    def finished(self) -> dict[int, list[Measured]]:
        """Return the points that earlier launches finished, by number; a line truncated by a kill is skipped."""
        found: dict[int, list[Measured]] = {}
        for path in sorted(self._finished_points.glob("rank-*.jsonl")):
            for line in path.read_text(encoding="utf-8", errors="replace").splitlines():
                try:
                    fields = json.loads(line)
                    found[int(fields["point"])] = [Measured(*map(_number, pair)) for pair in fields["measured"]]
                except (ValueError, KeyError, TypeError):
                    continue
        return found

    def keep(self, rank: int, number: int, measured: Sequence[Measured]) -> None:
        """Store what rank `rank` measured at point `number`, so that a killed launch can resume."""
        with (self._finished_points / f"rank-{rank}.jsonl").open("a", encoding="utf-8") as file:
            # The leading newline ends a line that a kill truncated.
            file.write("\n" + json_text({"point": number, "measured": measured}) + "\n")
            file.flush()
            os.fsync(file.fileno())

    def write_points(self, points: Sequence[Point], measured: Mapping[int, Sequence[Measured]]) -> None:
        """Write points.csv atomically and delete the ranks' files; numbers read back bit-identically."""
        text = io.StringIO()
        writer = csv.writer(text, lineterminator="\n")
        writer.writerow(_COLUMNS)
        for index, point in enumerate(points):
            for split, (loss, accuracy) in zip(SPLITS, measured[index], strict=True):
                writer.writerow([point.direction, point.alpha, point.beta, split, loss, accuracy])
        atomic.write_text(self.points, text.getvalue())
        shutil.rmtree(self._finished_points, ignore_errors=True)


def read_landscape(folder: Path) -> Landscape:
    """Return the finished result in `folder`. Raises UsageError if it is missing, unfinished or damaged."""
    try:
        fields = json.loads(read_regular(folder / "settings.json"))
        with (folder / "points.csv").open(encoding="utf-8", newline="") as file:
            landscape = _LANDSCAPE.validate_python({**fields, "rows": list(csv.DictReader(file)), "folder": folder})
        if not landscape.checkpoints or any({"path", "sha256", "step"} - each.keys() for each in landscape.checkpoints):
            raise ValueError("settings.json does not say of which checkpoints it is")
        return landscape
    except OSError as error:
        raise UsageError(
            f"{folder} holds no finished landscape ({error.strerror or error}): run dist-train landscape to its end",
            code="landscape-unfinished",
        ) from error
    except (ValueError, TypeError) as error:
        raise UsageError(
            f"{folder} holds a damaged landscape: remove it and compute it again ({error})", code="landscape-damaged"
        ) from error


_LANDSCAPE = TypeAdapter(Landscape)


def _number(value: float | None) -> float:
    return math.nan if value is None else float(value)
