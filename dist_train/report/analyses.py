"""The landscapes and sharpness of a run, read from the files that `dist-train landscape` and `sharpness` wrote."""

from __future__ import annotations

import csv
import json
import math
from collections.abc import Collection, Iterator, Mapping, Sequence
from contextlib import suppress
from dataclasses import dataclass
from itertools import groupby
from pathlib import Path
from typing import Any, TypeVar

from dist_train.rundir.atomic import read_regular
from dist_train.rundir.paths import BrokenFileError, RunDirectory

_INCIDENTAL = frozenset({"data_digest", "device", "batch_size", "statistics_batch", "threads"})


@dataclass(frozen=True)
class LandscapePoint:
    """Loss and accuracy (in [0, 1]) of a split at `alpha` along a direction."""

    direction: int
    alpha: float
    split: str
    loss: float
    accuracy: float


@dataclass(frozen=True)
class BasinWidth:
    """Mean over directions of the interval where the training loss stays under `factor` times its minimum.

    In `open_ends` directions the basin ends beyond the line, so the width is a lower bound. In `unresolved` directions
    the basin contains no point of the line but the minimum, so both ends are interpolated from points outside.
    """

    basin: str
    factor: str
    mean: float
    open_ends: int
    unresolved: int = 0

    @property
    def key(self) -> str:
        """Return what identifies it among the widths of its result."""
        return f"{self.basin}.{self.factor}"


@dataclass(frozen=True)
class Landscape:
    """One result: `kind` is interpolate, direction or plane. Results with equal `settings`, JSON text, are comparable.

    `runs` names the runs of its checkpoints: two for an interpolation.
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
        points = [point for point in self.points if point.split == split]
        points.sort(key=lambda point: (point.direction, point.alpha))
        return tuple(tuple(line) for _, line in groupby(points, lambda point: point.direction))


@dataclass(frozen=True)
class Sharpness:
    """The measures of one checkpoint by name, in the order of the file; `bounds` names those that are lower bounds."""

    step: int | None
    settings: str
    measures: Mapping[str, float]
    bounds: frozenset[str] = frozenset()


_Result = TypeVar("_Result", Landscape, Sharpness)


@dataclass(frozen=True)
class Analyses:
    """All results of a run; `problems` names unusable files and the reasons, `last_step` is its last checkpoint's."""

    landscapes: tuple[Landscape, ...] = ()
    sharpness: tuple[Sharpness, ...] = ()
    problems: tuple[str, ...] = ()
    last_step: int | None = None

    def of_kind(self, kind: str) -> tuple[Landscape, ...]:
        """Return the landscapes of one kind."""
        return tuple(item for item in self.landscapes if item.kind == kind)

    def at_the_end(self, results: Sequence[_Result]) -> tuple[_Result, ...]:
        """Return those of `results` that belong to the last checkpoint, as far as is known."""
        return tuple(item for item in results if None in (item.step, self.last_step) or item.step == self.last_step)


def read_analyses(directory: RunDirectory) -> Analyses:
    """Return the results of a run; results of checkpoints that it does not have are problems."""
    digests: set[str] = set()
    for path in directory.checkpoint_records():
        with suppress(BrokenFileError):  # the checkpoint's own reader reports it
            digests.add(_Source.of(_json(path)).digest)
    landscapes, sharpness, problems = [], [], []
    for path in sorted(directory.analysis.iterdir()) if directory.analysis.is_dir() else ():
        try:
            if (path / "settings.json").is_file():
                landscapes.append(_landscape(path, digests - {""}))
            elif path.match("sharpness-*.json"):
                sharpness.append(_sharpness(path, digests - {""}))
        except BrokenFileError as error:
            problems.append(f"{path.name}: {error}")
    last_step = max(directory.checkpoint_steps(), default=None)
    return Analyses(tuple(landscapes), tuple(sharpness), tuple(problems), last_step)


@dataclass(frozen=True)
class _Source:
    """The checkpoint that a result was computed from."""

    run: str
    step: int | None
    digest: str

    @classmethod
    def of(cls, fields: object) -> _Source:
        known = fields if isinstance(fields, Mapping) else {}
        folder, step = Path(str(known.get("path") or "")).parent, known.get("step")
        run = folder.parent.name if folder.name == RunDirectory(Path()).checkpoints.name else folder.name
        return cls(run, step if isinstance(step, int) else None, str(known.get("sha256") or ""))


def _landscape(folder: Path, digests: Collection[str]) -> Landscape:
    fields = _json(folder / "settings.json")
    kind, checkpoints = fields.get("kind"), fields.get("checkpoints")
    if not isinstance(checkpoints, list) or not checkpoints or not isinstance(kind, str):
        raise BrokenFileError("settings.json names no kind or no checkpoint")
    sources = [_Source.of(checkpoint) for checkpoint in checkpoints]
    # The other checkpoint of an interpolation may belong to another run.
    if digests and not any(source.digest in digests for source in sources):
        raise BrokenFileError("it was computed from checkpoints that this run does not have")
    try:
        with (folder / "points.csv").open(newline="", encoding="utf-8") as file:
            points = tuple(_point(row) for row in csv.DictReader(file))
    except (OSError, KeyError, TypeError, ValueError) as error:
        raise BrokenFileError(f"points.csv is damaged: {error!r}") from error
    if not points:
        raise BrokenFileError("points.csv holds no point")
    widths = tuple(_widths(fields.get("widths"), points))
    runs = tuple(source.run for source in sources)
    return Landscape(folder, kind, runs, sources[0].step, _comparable(fields.get("settings")), widths, points)


def _comparable(settings: object) -> str:
    """Return the settings that comparable results share: not how they were computed or which images a seed chose."""
    if isinstance(settings, Mapping):
        # Norms that use each pass's own statistics give another loss with passes of another size.
        left_out = _INCIDENTAL - {"batch_size"} if settings.get("statistics") == "batch" else _INCIDENTAL
        settings = {name: value for name, value in settings.items() if name not in left_out}
    return json.dumps(settings, sort_keys=True)


def _widths(fields: object, points: Sequence[LandscapePoint]) -> Iterator[BasinWidth]:
    for basin, by_factor in _items(fields):
        for factor, width in _items(by_factor):
            match width:
                case {"mean": int() | float() as mean}:
                    unresolved = sum(_is_unresolved(line, points) for line in width.get("directions") or ())
                    yield BasinWidth(basin, factor, float(mean), int(width.get("open") or 0), unresolved)


def _is_unresolved(line: object, points: Sequence[LandscapePoint]) -> bool:
    """Whether the basin contains at most one point of the line, the minimum."""
    match line:
        case {"direction": number, "left": int() | float() as left, "right": int() | float() as right}:
            mine = (point.alpha for point in points if point.split == "train" and point.direction == number)
            return sum(left <= alpha <= right for alpha in mine) < 2
    return False


def _point(row: Mapping[str, str]) -> LandscapePoint:
    loss, accuracy = float(row["loss"] or "nan"), float(row["accuracy"] or "nan")
    return LandscapePoint(int(row["direction"] or 0), float(row["alpha"]), row["split"], loss, accuracy)


def _sharpness(path: Path, digests: Collection[str]) -> Sharpness:
    fields = _json(path)
    source = _Source.of(fields.get("checkpoint"))
    if digests and source.digest not in digests:
        raise BrokenFileError("it was computed from a checkpoint that this run does not have")
    censored = {_width_title(width) for width in fields.get("widths") or () if dict(_items(width)).get("censored")}
    return Sharpness(source.step, _comparable(fields.get("settings")), dict(_measures(fields)), frozenset(censored))


def _width_title(width: Mapping[str, Any]) -> str:
    return f"basin width at a rise of {width.get('rise')}"


def _measures(fields: Mapping[str, Any]) -> Iterator[tuple[str, float]]:
    """Yield the measures under the names that the report shows."""
    hessian = dict(_items(fields.get("hessian")))
    known = [float(value) for value in hessian.get("eigenvalues") or () if value is not None]
    if known:
        yield "largest Hessian eigenvalue", max(known)
    yield from _flat_numbers(hessian.get("trace"), "Hessian trace")
    for name, value in _flat_numbers(fields.get("keskar"), ""):
        yield f"Keskar, {name.replace('full', 'full space')}", value
    for rise in fields.get("expected_rise") or ():
        match rise:
            case {"amplitude": int() | float() as amplitude, "mean": int() | float() as mean}:
                yield f"expected rise at {amplitude:g}", float(mean)
    for width in fields.get("widths") or ():
        match width:
            case {"mean": int() | float() as mean}:
                yield _width_title(width), float(mean)
    yield from _flat_numbers(dict(_items(fields.get("noise_scale"))).get("value"), "gradient noise scale")


def _flat_numbers(fields: object, name: str) -> Iterator[tuple[str, float]]:
    """Yield the finite numbers in nested JSON objects under dotted names."""
    for inner, value in _items(fields):
        yield from _flat_numbers(value, f"{name}.{inner}" if name else inner)
    if isinstance(fields, int | float) and not isinstance(fields, bool) and math.isfinite(fields):
        yield name, float(fields)


def _items(fields: object) -> Iterator[tuple[str, Any]]:
    """Yield the fields of a JSON object; nothing for any other value."""
    yield from fields.items() if isinstance(fields, dict) else ()


def _json(path: Path) -> dict[str, Any]:
    try:
        fields = json.loads(read_regular(path))
    except (OSError, ValueError) as error:
        raise BrokenFileError(f"{path.name} cannot be read or is not JSON: {error}") from error
    if not isinstance(fields, dict):
        raise BrokenFileError(f"{path.name} holds no result")
    return fields
