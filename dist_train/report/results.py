"""What analyses of a run's checkpoints have left in its directory."""

from __future__ import annotations

import csv
import json
import math
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from dist_train.rundir.paths import RunDirectory

_INCIDENTAL = frozenset({"data_digest", "device", "batch_size", "statistics_batch", "threads"})


@dataclass(frozen=True)
class LandscapePoint:
    """Loss and accuracy (in [0, 1]) of a split at one place; `beta` is 0 on a line."""

    direction: int
    alpha: float
    beta: float
    split: str
    loss: float
    accuracy: float


@dataclass(frozen=True)
class BasinWidth:
    """Mean over directions of the interval where the training loss stays under `factor` times its minimum.

    In `open_ends` directions the basin ends beyond the line: the width is at least so much. In `unresolved` directions
    none of the line's points but the minimum lies in the basin: there both ends are guessed from points outside.
    """

    basin: str
    factor: str
    mean: float
    open_ends: int
    unresolved: int = 0

    @property
    def key(self) -> str:
        """Return what tells it from the others of its result."""
        return f"{self.basin}.{self.factor}"


@dataclass(frozen=True)
class Landscape:
    """One result: `kind` is interpolate, direction or plane; `settings` is JSON text, equal where results compare.

    `runs` names the runs of its checkpoints, two for a line between them.
    """

    folder: Path
    kind: str
    runs: tuple[str, ...]
    step: int | None
    settings: str
    widths: tuple[BasinWidth, ...]
    points: tuple[LandscapePoint, ...]

    def lines(self, split: str) -> tuple[tuple[LandscapePoint, ...], ...]:
        """Return the points of `split` by direction, each ordered by alpha."""
        lines: dict[int, list[LandscapePoint]] = {}
        for point in sorted(self.points, key=lambda point: (point.direction, point.alpha)):
            if point.split == split:
                lines.setdefault(point.direction, []).append(point)
        return tuple(map(tuple, lines.values()))


@dataclass(frozen=True)
class Sharpness:
    """Measures of one checkpoint by name, in the order of the file."""

    path: Path
    step: int | None
    settings: str
    measures: Mapping[str, float]


@dataclass(frozen=True)
class Analyses:
    """All results of a run; `problems` names the files that are of no use, and why."""

    landscapes: tuple[Landscape, ...] = ()
    sharpness: tuple[Sharpness, ...] = ()
    problems: tuple[str, ...] = ()

    def of_kind(self, kind: str) -> tuple[Landscape, ...]:
        """Return the landscapes of one kind."""
        return tuple(item for item in self.landscapes if item.kind == kind)


class _UnusableError(Exception):
    """A result that cannot be shown; its text says why."""


def read_analyses(directory: RunDirectory) -> Analyses:
    """Return the results of a run; those of other checkpoints than its own count as problems."""
    digests = frozenset(filter(None, map(_digest_of, directory.checkpoint_records())))
    landscapes: list[Landscape] = []
    sharpness: list[Sharpness] = []
    problems: list[str] = []
    for path in sorted(directory.analysis.iterdir()) if directory.analysis.is_dir() else ():
        try:
            if (path / "settings.json").is_file():
                landscapes.append(_landscape(path, digests))
            elif path.match("sharpness-*.json"):
                sharpness.append(_sharpness(path, digests))
        except _UnusableError as error:
            problems.append(f"{path.name}: {error}")
    return Analyses(tuple(landscapes), tuple(sharpness), tuple(problems))


def _digest_of(path: Path) -> str:
    try:
        return _digest(_json(path))
    except _UnusableError:
        return ""  # the checkpoint's own reader reports it


def _flat_numbers(fields: object, name: str) -> Iterator[tuple[str, float]]:
    """Yield the finite numbers within nested JSON objects under dotted names."""
    if isinstance(fields, Mapping):
        for inner, value in fields.items():
            yield from _flat_numbers(value, f"{name}.{inner}" if name else str(inner))
    elif isinstance(fields, int | float) and not isinstance(fields, bool) and math.isfinite(fields):
        yield name, float(fields)


def _landscape(folder: Path, digests: frozenset[str]) -> Landscape:
    fields = _json(folder / "settings.json")
    checkpoints = fields.get("checkpoints")
    if not isinstance(checkpoints, list) or not checkpoints or not isinstance(fields.get("kind"), str):
        raise _UnusableError("settings.json names no kind or no checkpoint")
    # where two checkpoints are joined, the other may be another run's
    if digests and not any(_digest(checkpoint) in digests for checkpoint in checkpoints):
        raise _UnusableError("it is of checkpoints that this run does not have")
    try:
        with (folder / "points.csv").open(newline="", encoding="utf-8") as file:
            points = tuple(_point(row) for row in csv.DictReader(file))
    except OSError as error:
        raise _UnusableError(f"points.csv cannot be read: {error.strerror}") from error
    except (KeyError, TypeError, ValueError) as error:
        raise _UnusableError(f"points.csv is not as it should be: {error!r}") from error
    if not points:
        raise _UnusableError("points.csv holds no point")
    return Landscape(
        folder,
        fields["kind"],
        tuple(_run_of(checkpoint) for checkpoint in checkpoints),
        _step(checkpoints[0]),
        _comparable(fields.get("settings")),
        tuple(_widths(fields.get("widths"), points)),
        points,
    )


def _comparable(settings: object) -> str:
    """Return what results must share to be compared; not how they were computed, nor which images a seed chose."""
    if isinstance(settings, Mapping):
        settings = {name: value for name, value in settings.items() if name not in _INCIDENTAL}
    return json.dumps(settings, sort_keys=True)


def _run_of(checkpoint: object) -> str:
    path = Path(str(checkpoint.get("path") or "")) if isinstance(checkpoint, Mapping) else Path()
    return path.parent.parent.name if path.parent.name == "checkpoints" else path.parent.name


def _widths(fields: object, points: Sequence[LandscapePoint]) -> Iterator[BasinWidth]:
    for basin, by_factor in fields.items() if isinstance(fields, Mapping) else ():
        for factor, width in by_factor.items() if isinstance(by_factor, Mapping) else ():
            if isinstance(width, Mapping) and isinstance(width.get("mean"), int | float):
                unresolved = sum(_is_unresolved(line, points) for line in width.get("directions") or ())
                yield BasinWidth(str(basin), str(factor), float(width["mean"]), int(width.get("open") or 0), unresolved)


def _is_unresolved(line: object, points: Sequence[LandscapePoint]) -> bool:
    """Whether one point of the line, the minimum, lies in the basin at the most."""
    match line:
        case {"direction": number, "left": int() | float() as left, "right": int() | float() as right}:
            mine = (point.alpha for point in points if point.split == "train" and point.direction == number)
            return sum(left <= alpha <= right for alpha in mine) < 2
        case _:
            return False


def _point(row: Mapping[str, str]) -> LandscapePoint:
    return LandscapePoint(
        direction=int(row["direction"] or 0),
        alpha=float(row["alpha"]),
        beta=float(row["beta"] or 0),
        split=row["split"],
        loss=float(row["loss"] or "nan"),
        accuracy=float(row["accuracy"] or "nan"),
    )


def _sharpness(path: Path, digests: frozenset[str]) -> Sharpness:
    fields = _json(path)
    checkpoint = fields.get("checkpoint")
    if digests and _digest(checkpoint) not in digests:
        raise _UnusableError("it is of a checkpoint that this run does not have")
    return Sharpness(path, _step(checkpoint), _comparable(fields.get("settings")), dict(_measures(fields)))


def _measures(fields: Mapping[str, Any]) -> Iterator[tuple[str, float]]:
    """Yield the measures under the names that readers see."""
    hessian = fields.get("hessian")
    if isinstance(hessian, Mapping):
        eigenvalues = hessian.get("eigenvalues")
        known = [float(value) for value in eigenvalues if value is not None] if isinstance(eigenvalues, list) else []
        if known:
            yield "largest Hessian eigenvalue", max(known)
        yield from _flat_numbers(hessian.get("trace"), "Hessian trace")
    for name, value in _flat_numbers(fields.get("keskar"), ""):
        yield f"Keskar, {name.replace('full', 'full space')}", value
    rises = fields.get("expected_rise")
    for rise in rises if isinstance(rises, list) else ():
        if isinstance(rise, Mapping) and isinstance(rise.get("mean"), int | float):
            yield f"expected rise at {rise.get('amplitude'):g}", float(rise["mean"])


def _json(path: Path) -> dict[str, Any]:
    try:
        fields = json.loads(path.read_bytes())
    except OSError as error:
        raise _UnusableError(f"{path.name} cannot be read: {error.strerror}") from error
    except ValueError as error:
        raise _UnusableError(f"{path.name} is not JSON: {error}") from error
    if not isinstance(fields, dict):
        raise _UnusableError(f"{path.name} holds no result")
    return fields


def _digest(checkpoint: object) -> str:
    return str(checkpoint.get("sha256") or "") if isinstance(checkpoint, Mapping) else ""


def _step(checkpoint: object) -> int | None:
    step = checkpoint.get("step") if isinstance(checkpoint, Mapping) else None
    return step if isinstance(step, int) else None
