"""A run and its analyses, read from its directory; and the runs that a report covers."""

from __future__ import annotations

import csv
import json
import math
import os
import re
from collections.abc import Collection, Iterator, Mapping, Sequence
from contextlib import suppress
from dataclasses import dataclass, field
from itertools import groupby
from pathlib import Path
from typing import Any, Literal

import yaml

from dist_train.config import DATA_SETS
from dist_train.config.loading import parse_yaml
from dist_train.outcome import ExitCode, UsageError
from dist_train.rundir.atomic import read_regular
from dist_train.rundir.paths import BrokenFileError, RunDirectory, StudyDirectory
from dist_train.rundir.records import EvaluationRecord, EventRecord, Record, TrainRecord
from dist_train.rundir.status import Status, read_status
from dist_train.watch.run_table import read_measurements, read_settings, read_state

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


@dataclass(frozen=True)
class Analyses:
    """All results of a run; `problems` names unusable files and the reasons."""

    landscapes: tuple[Landscape, ...] = ()
    sharpness: tuple[Sharpness, ...] = ()
    problems: tuple[str, ...] = ()

    def of_kind(self, kind: str) -> tuple[Landscape, ...]:
        """Return the landscapes of one kind."""
        return tuple(item for item in self.landscapes if item.kind == kind)


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
    return Analyses(tuple(landscapes), tuple(sharpness), tuple(problems))


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
        settings = {name: value for name, value in settings.items() if name not in _INCIDENTAL}
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


_BATCH = "batch.global_size"


@dataclass(frozen=True)
class Planned:
    """A study's plan for a run; `title` is the variant's, `batch` None if neither run nor base sets it."""

    name: str
    variant: str
    title: str
    seed: int | None
    overrides: tuple[str, ...]
    batch: int | None = None

    @property
    def is_titled(self) -> bool:
        """Whether the study gives the variant its own title, not just its name and the grid's values."""
        return re.sub(r"[^A-Za-z0-9._-]+", "-", self.title) != self.variant


@dataclass(frozen=True)
class StoredRun:
    """A run. `state` is status.json's, or `lost`, `broken` or `missing`; `note` gives the reason.

    `settings` maps dotted paths to values; it is empty if config.yaml is missing or broken.
    """

    directory: Path
    name: str
    state: str
    note: str
    planned: Planned | None = None
    settings: Mapping[str, object] = field(default_factory=dict)
    status: Status | None = None
    train: tuple[TrainRecord, ...] = ()
    evaluations: tuple[EvaluationRecord, ...] = ()
    events: tuple[EventRecord, ...] = ()
    analyses: Analyses = field(default_factory=Analyses)

    @property
    def is_finished(self) -> bool:
        """Whether it has finished, so that its last measurement is its result."""
        return self.state == "finished"

    @property
    def is_diverged(self) -> bool:
        """Whether it ended because its loss or gradient was not finite."""
        return self.state == "failed" and self.status is not None and self.status.exit_code == ExitCode.DIVERGED

    @property
    def guessing(self) -> float | None:
        """Return the accuracy of guessing, 1 / classes; None if the number of classes is unknown."""
        name = self.settings.get("data.name")
        known = DATA_SETS.get(name) if isinstance(name, str) else None
        configured = self.settings.get("data.synthetic_classes" if name == "synthetic" else "data.classes")
        classes = known.classes if known else configured
        return 1 / classes if isinstance(classes, int) and classes > 0 else None

    @property
    def seed(self) -> int | None:
        """Return the seed from the settings, or else from the study's plan."""
        seed = self.settings.get("run.seed", self.planned.seed if self.planned else None)
        return seed if isinstance(seed, int) else None

    @property
    def batch(self) -> int | None:
        """Return the global batch size."""
        size = self.settings.get(_BATCH)
        return size if isinstance(size, int) else None

    def last(self, split: str) -> EvaluationRecord | None:
        """Return the last evaluation of `split`; None if there is none or it is not finite."""
        last = next((record for record in reversed(self.evaluations) if record.split == split), None)
        return last if last and _is_finite(last) else None

    def split(self, split: str) -> tuple[EvaluationRecord, ...]:
        """Return the finite evaluations of `split`, in order."""
        return tuple(record for record in self.evaluations if record.split == split and _is_finite(record))


def _is_finite(record: EvaluationRecord) -> bool:
    return math.isfinite(record.accuracy) and math.isfinite(record.loss)


def read_run(root: Path, name: str, planned: Planned | None = None) -> StoredRun:
    """Return the run in `root`. Problems never raise: they are given by its state and note."""
    directory = RunDirectory(root)
    if not directory.has_begun:
        what = "empty" if root.is_dir() else "missing"
        return StoredRun(root, name, "missing", f"it has not started: its folder is {what}", planned)
    state, note = read_state(directory)
    records: tuple[Record, ...] = ()
    settings: Mapping[str, object] = {}
    try:
        settings = read_settings(directory.config)
        records = read_measurements(directory.metrics)
        if not directory.metrics.exists():
            raise BrokenFileError(f"it has no {directory.metrics.name}")
        if state == "finished" and not any(isinstance(record, EvaluationRecord) for record in records):
            raise BrokenFileError(f"it has finished, but {directory.metrics.name} holds no evaluation")
    except BrokenFileError as error:
        state, note = "broken", str(error)
    train = tuple(record for record in records if isinstance(record, TrainRecord))
    evaluations = tuple(record for record in records if isinstance(record, EvaluationRecord))
    events = tuple(record for record in records if isinstance(record, EventRecord))
    status, analyses = read_status(directory.status), read_analyses(directory)
    return StoredRun(root, name, state, note, planned, settings, status, train, evaluations, events, analyses)


@dataclass(frozen=True)
class NamedContrast:
    """Names of the `variants` that a study compares with `against`; a grid is resolved to its variants."""

    title: str
    variants: tuple[str, ...]
    against: str


@dataclass(frozen=True)
class Subject:
    """The subject of a report; its runs have different names."""

    directory: Path
    kind: Literal["run", "study", "folder"]
    runs: tuple[StoredRun, ...]

    @property
    def title(self) -> str:
        """Return the study's title or name, or else the folder's name."""
        fields = self._study()
        return str(fields.get("title") or fields.get("name") or self.directory.resolve().name)

    @property
    def contrasts(self) -> tuple[NamedContrast, ...]:
        """Return the study's named contrasts, as far as their variants exist."""
        fields = self._study()
        names = dict.fromkeys(run.planned.variant for run in self.runs if run.planned)
        listed = fields.get("variants")
        families = sorted(listed, key=len, reverse=True) if isinstance(listed, Mapping) else []
        members: dict[str, list[str]] = {}
        for name in names:
            family = next((each for each in families if name == each or name.startswith(f"{each}-")), name)
            members.setdefault(family, []).append(name)
        found = []
        for entry in fields.get("contrasts") or ():
            match entry:
                case {"variants": [*variants], "against": str() as against} if len(members.get(against, ())) == 1:
                    chosen = tuple(name for variant in variants for name in members.get(str(variant), ()))
                    found.append(NamedContrast(str(entry.get("title") or ""), chosen, members[against][0]))
        return tuple(found)

    def _study(self) -> Mapping[str, Any]:
        """Return the content of study.yaml; empty if there is none."""
        fields = None
        with suppress(OSError, yaml.YAMLError):
            fields = parse_yaml(read_regular(StudyDirectory(self.directory).study)) if self.kind == "study" else None
        return fields if isinstance(fields, Mapping) else {}


def read_subject(directory: Path) -> Subject:
    """Return the runs of `directory`. Raises UsageError if it is not a folder or contains no run."""
    fix = "name a run, a study, or a folder of runs"
    if not directory.is_dir():
        raise UsageError(f"there is no folder {directory}: {fix}", code="folder-missing")
    if StudyDirectory(directory).runs.is_file():
        return Subject(directory, "study", tuple(_study_runs(directory, "")))
    if RunDirectory(directory).has_begun:
        return Subject(directory, "run", (read_run(directory, directory.resolve().name),))
    runs = tuple(_runs_below(directory))
    if not runs:
        raise UsageError(f"there is no run at or below {directory}: {fix}", code="no-run-here")
    return Subject(directory, "folder", runs)


def _runs_below(directory: Path) -> Iterator[StoredRun]:
    for folder, children, files in os.walk(directory):
        path = Path(folder)
        name = str(path.relative_to(directory))
        if StudyDirectory(Path()).runs.name in files:
            children.clear()
            yield from _study_runs(path, f"{name}/")
        elif RunDirectory(path).has_begun:
            children.clear()
            yield read_run(path, name)
        children.sort()


def _study_runs(directory: Path, prefix: str) -> Iterator[StoredRun]:
    path = StudyDirectory(directory).runs
    base: object = None
    with suppress(BrokenFileError):
        base = read_settings(StudyDirectory(directory).base).get(_BATCH)
    try:
        plan = [_planned(entry, base) for entry in json.loads(read_regular(path))]
    except (OSError, ValueError, KeyError, TypeError, AttributeError) as error:
        raise UsageError(
            f"{path} is not a list of runs ({error!r}): start the study's sweep again", code="plan-damaged"
        ) from error
    yield from (read_run(directory / planned.name, prefix + planned.name, planned) for planned in plan)


def _planned(entry: Mapping[str, Any], base_batch: object) -> Planned:
    overrides = tuple(map(str, entry.get("overrides") or ()))
    batch = str(dict(override.split("=", 1) for override in overrides).get(_BATCH, base_batch))
    variant, seed = str(entry.get("variant") or ""), entry.get("seed")
    return Planned(
        name=str(entry["name"]),
        variant=variant,
        title=str(entry.get("title") or variant),
        seed=seed if isinstance(seed, int) else None,
        overrides=overrides,
        batch=int(batch) if batch.isdecimal() else None,
    )
