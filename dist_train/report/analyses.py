"""The landscapes and sharpness of a run, as `dist-train landscape` and `sharpness` wrote them, to be compared."""

from __future__ import annotations

import json
from collections.abc import Collection, Iterable, Iterator, Mapping
from contextlib import suppress
from dataclasses import dataclass, replace
from pathlib import Path

from dist_train.analysis.landscape_files import Landscape, read_landscape, shared_settings
from dist_train.analysis.sharpness_record import SharpnessRecord, WidthResult, read_record
from dist_train.outcome import UsageError
from dist_train.rundir.atomic import read_regular
from dist_train.rundir.paths import BrokenFileError, RunDirectory


@dataclass(frozen=True)
class Sharpness:
    """The measures of one checkpoint by the names that the report shows; `bounds` names those that are lower bounds."""

    step: int
    shared_settings: str
    measures: Mapping[str, float]
    bounds: frozenset[str] = frozenset()


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


def read_analyses(directory: RunDirectory) -> Analyses:
    """Return the results of a run; results of checkpoints that it does not have are problems."""
    digests: set[str] = set()
    for path in directory.checkpoint_records():
        with suppress(OSError, ValueError, KeyError, TypeError):  # the checkpoint's own reader reports it
            digests.add(json.loads(read_regular(path))["sha256"])
    landscapes, records, problems = [], [], []
    for path in sorted(directory.analysis.iterdir()) if directory.analysis.is_dir() else ():
        try:
            if (path / "settings.json").is_file():
                landscapes.append(_landscape(path, digests))
            elif path.match("sharpness-*.json"):
                records.append(_record(path, digests))
        except BrokenFileError as error:
            problems.append(f"{path.name}: {error}")
        except UsageError as error:
            problems.append(str(error))
    last_step = max(directory.checkpoint_steps(), default=None)
    return Analyses(tuple(landscapes), _sharpness(records), tuple(problems), last_step)


def _landscape(folder: Path, digests: Collection[str]) -> Landscape:
    found = read_landscape(folder)
    # The other checkpoint of an interpolation may belong to another run.
    if digests and not any(checkpoint["sha256"] in digests for checkpoint in found.checkpoints):
        raise BrokenFileError("it was computed from checkpoints that this run does not have")
    if found.kind == "interpolate" and len(found.checkpoints) != 2:
        raise BrokenFileError(f"a line between two checkpoints, but it names {len(found.checkpoints)}")
    return found


def _record(path: Path, digests: Collection[str]) -> SharpnessRecord:
    record = read_record(path)
    if digests and record.checkpoint.sha256 not in digests:
        raise BrokenFileError("it was computed from a checkpoint that this run does not have")
    return record


def _sharpness(records: Iterable[SharpnessRecord]) -> tuple[Sharpness, ...]:
    """Return the measures of each step with comparable settings; the record of the smallest passes has precedence."""
    found: dict[tuple[int, str], Sharpness] = {}
    for record in sorted(records, key=lambda record: -record.settings.batch_size):
        key = (record.checkpoint.step, shared_settings(record.settings.model_dump(mode="json")))
        measures = {name: value for name, value in _measures(record) if value is not None}
        censored = {_width_title(width) for width in record.widths or () if width.censored}
        before = found.get(key, Sharpness(*key, {}))
        bounds = (before.bounds - measures.keys()) | censored
        found[key] = replace(before, measures={**before.measures, **measures}, bounds=bounds)
    return tuple(found.values())


def _measures(record: SharpnessRecord) -> Iterator[tuple[str, float | None]]:
    """Yield the measures by name; None if one is not finite."""
    if record.hessian is not None:
        known = [each for each in record.hessian.eigenvalues if each is not None]
        yield "largest Hessian eigenvalue", max(known, default=None)
        yield "Hessian trace", record.hessian.trace
    if record.keskar is not None:
        yield "Keskar, full space", record.keskar.full
        yield "Keskar, subspace", record.keskar.subspace
    for rise in record.expected_rise or ():
        yield f"expected rise at {rise.amplitude:g}", rise.mean
    for width in record.widths or ():
        yield _width_title(width), width.mean
    if record.noise_scale is not None:
        yield "gradient noise scale", record.noise_scale.value


def _width_title(width: WidthResult) -> str:
    return f"basin width at a rise of {width.rise}"
