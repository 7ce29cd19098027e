"""A run and its analyses, read from its directory; and the runs that a report covers."""

from __future__ import annotations

import json
import math
import re
from collections.abc import Callable, Collection, Iterable, Iterator, Mapping, Sequence
from contextlib import suppress
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Annotated, Any, Literal

import yaml
from pydantic import Field, TypeAdapter, ValidationError

from dist_train.analysis.landscape_files import Landscape, read_landscape, shared_settings
from dist_train.analysis.sharpness_record import SharpnessRecord, WidthResult, read_record
from dist_train.config import DATA_SETS, Config, ConfigError, DataSet
from dist_train.config.loading import flat_settings, parse_yaml, with_overrides
from dist_train.config.plugins import may_name_one_plugin
from dist_train.config.problems import problems_of
from dist_train.config.resuming import LENGTHS, may_change, with_present_names
from dist_train.outcome import ExitCode, UsageError, escaped
from dist_train.rundir.atomic import read_regular
from dist_train.rundir.paths import RANGE_TEST, BrokenFileError, RunDirectory, StudyDirectory
from dist_train.rundir.records import EvaluationRecord, EventRecord, Record, TrainRecord
from dist_train.rundir.status import Status, read_settings, read_status, runs_with_result
from dist_train.sweep.study_file import Contrast, Study, Title
from dist_train.watch.run_state import read_measurements, read_state, walk_runs

_LOGGERS = "metrics.loggers"
PLUGIN = "plug-in "
"""Begins the names of plug-ins among the versions in `status.json`."""
_OPTION = re.compile(r"[._]options\.")
"""In the path of an option of a plug-in."""
EIGENVALUE = "largest Hessian eigenvalue"  # a measure of `Sharpness`


@dataclass(frozen=True)
class Planned:
    """A study's plan for a run; `title` is the variant's; `resolved` maps dotted paths to the settings planned for it.

    Older folders do not record the `family`, the variant as the study names it, whether the variant `has_title`, nor
    the number of a search's `trial`.
    """

    name: str
    variant: str = ""
    family: str = ""
    title: Title = ""
    has_title: bool | None = None
    trial: int | None = None
    seed: int | None = None
    overrides: tuple[Annotated[str, Field(pattern="=")], ...] = ()
    resolved: Mapping[str, object] = field(default_factory=dict)

    @property
    def is_titled(self) -> bool:
        """Whether the study gives the variant its own title, not just its name and the grid's values."""
        guess = re.sub(r"[^A-Za-z0-9._-]+", "-", self.title) != self.variant
        return guess if self.has_title is None else self.has_title


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


@dataclass(frozen=True)
class StoredRun:
    """A run. `state` is status.json's, or `lost`, `broken` or `missing`; `note` gives the reason.

    `has_other_settings` than its study has now: it is `broken`, whatever its status.
    `is_range_test`: a learning-rate range test has written it.
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
    has_other_settings: bool = False
    is_range_test: bool = False

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
        known = DATA_SETS.get(str(name), DataSet()).image_format
        configured = self.settings.get("data.synthetic_classes" if name == "synthetic" else "data.classes")
        classes = known.classes if known else configured
        return 1 / classes if isinstance(classes, int) and classes > 0 else None

    @property
    def seed(self) -> int | None:
        """Return the seed from the settings, or else from the study's plan."""
        seed = self.settings.get("run.seed", self.planned.seed if self.planned else None)
        return seed if isinstance(seed, int) else None

    @property
    def data_root(self) -> str | None:
        """Return the name of the folder of the user's own data; None if it is not known or does not matter.

        The same files may lie elsewhere on another machine. A study decides itself: its jobs may copy them anywhere.
        """
        name = str(self.settings.get("data.name"))
        # Published and generated images are the same in every folder.
        if name == "synthetic" or DATA_SETS.get(name, DataSet()).image_format:
            return None
        root = (self.planned.resolved if self.planned else self.settings).get("data.root")
        return None if root is None else Path(str(root)).name or str(root)

    @property
    def data(self) -> str:
        """Return the data set: its name, and the folder's if it is the user's own; empty if unknown."""
        name = self.settings.get("data.name")
        words = (name, self.data_root)
        return "" if name is None else " in ".join(str(word) for word in words if word is not None)

    @property
    def plugins(self) -> Mapping[str, str]:
        """Return the digests of the plug-ins' code by their names in `status.json`, without that of loggers alone."""
        recorded = self.status.environment if self.status else {}
        others = [value for path, value in self.settings.items() if path != _LOGGERS]
        idle = _plugin_files(self.settings.get(_LOGGERS)) - _plugin_files(others)
        return {name: digest for name, digest in recorded.items() if name.startswith(PLUGIN) and name not in idle}

    @property
    def batch(self) -> int | None:
        """Return the global batch size from the settings, or else from the study's plan."""
        size = self.settings.get("batch.global_size", self.planned and self.planned.resolved.get("batch.global_size"))
        return size if isinstance(size, int) else None

    @property
    def judged(self) -> Literal["-averaged", ""]:
        """Return the end of the names of the splits that judge it: of averaged weights where it evaluates them."""
        return "-averaged" if any(record.split == "test-averaged" for record in self.evaluations) else ""

    def last(self, split: str) -> EvaluationRecord | None:
        """Return the run's last evaluation, of `split`; None if it left that split out or is not finite."""
        final = max((record.step for record in self.evaluations), default=None)
        last = next((record for record in reversed(self.evaluations) if record.split == split), None)
        return last if last and last.step == final and _is_finite(last) else None

    def split(self, split: str) -> tuple[EvaluationRecord, ...]:
        """Return the finite evaluations of `split`, in order."""
        return tuple(record for record in self.evaluations if record.split == split and _is_finite(record))


def _plugin_files(value: object) -> set[str]:
    """Return the names in `status.json` of the files of plug-ins that `value`, of settings, names anywhere in it."""
    if isinstance(value, str):
        place = value if value.endswith(".py") else value.rpartition(":")[0]
        if place.endswith(".py"):
            return {PLUGIN + "/".join(Path(place).parts[-2:])}
        module = place.replace(".", "/")
        return {f"{PLUGIN}{module}.py", f"{PLUGIN}{module}/__init__.py"} if module else set()
    inner = value.values() if isinstance(value, Mapping) else value if isinstance(value, list | tuple) else ()
    return set[str]().union(*map(_plugin_files, inner))


def _is_finite(record: EvaluationRecord) -> bool:
    return math.isfinite(record.accuracy) and math.isfinite(record.loss)


def read_run(root: Path, name: str, planned: Planned | None = None) -> StoredRun:
    """Return the run in `root`. Problems never raise: they are given by its state and note."""
    try:
        return _read_run(root, name, planned)
    except OSError as error:
        return _unreadable(root, name, error, planned)


def _unreadable(root: Path, name: str, error: OSError, planned: Planned | None = None) -> StoredRun:
    return StoredRun(root, name, "broken", f"cannot be read: {error.strerror or error}", planned)


def _read_run(root: Path, name: str, planned: Planned | None) -> StoredRun:
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
    # The file is only there once the test has ended, and the tests of older versions have no name of their own.
    is_range_test = str(settings.get("run.name")).endswith(RANGE_TEST) or directory.range_test.is_file()
    return StoredRun(
        root,
        name,
        state,
        note,
        planned,
        settings,
        read_status(directory.status),
        train=tuple(record for record in records if isinstance(record, TrainRecord)),
        evaluations=tuple(record for record in records if isinstance(record, EvaluationRecord)),
        events=tuple(record for record in records if isinstance(record, EventRecord)),
        analyses=read_analyses(directory),
        is_range_test=is_range_test,
    )


def read_analyses(directory: RunDirectory) -> Analyses:
    """Return the results of a run; results of checkpoints that it does not have are problems."""
    digests: set[str] = set()
    for path in directory.checkpoint_records():
        with suppress(OSError, ValueError, KeyError, TypeError):  # the checkpoint's own reader reports it
            digests.add(json.loads(read_regular(path))["sha256"])
    landscapes, records, problems, paths = [], [], [], list[Path]()
    try:
        paths = sorted(directory.analysis.iterdir()) if directory.analysis.is_dir() else []
    except OSError as error:
        problems.append(f"{directory.analysis.name} cannot be read: {error.strerror}")
    for path in paths:
        try:
            if (path / "settings.json").is_file():
                landscapes.append(_landscape(path, digests))
            elif path.match("sharpness-*.json"):
                records.append(_record(path, digests))
        except BrokenFileError as error:
            problems.append(f"{path.name}: {error}")
        except OSError as error:
            problems.append(f"{path.name} cannot be read: {error.strerror}")
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
    """Return the measures of each step and comparable settings: those by the smallest passes, even if they are None."""
    found: dict[tuple[int, str], Sharpness] = {}
    for record in sorted(records, key=lambda record: -record.settings.batch_size):
        key = (record.checkpoint.step, shared_settings(record.settings.model_dump(mode="json")))
        measured = dict(_measures(record))
        censored = {_width_title(width) for width in record.widths or () if width.censored}
        before = found.get(key, Sharpness(*key, {}))
        known = {name: value for name, value in {**before.measures, **measured}.items() if value is not None}
        found[key] = Sharpness(*key, known, (before.bounds - measured.keys()) | censored)
    return tuple(found.values())


def _measures(record: SharpnessRecord) -> Iterator[tuple[str, float | None]]:
    """Yield the measures by name; None if one is not finite."""
    if record.hessian is not None:
        known = [each for each in record.hessian.eigenvalues if each is not None]
        yield EIGENVALUE, max(known, default=None)
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


@dataclass(frozen=True)
class _Study:
    """What the report shows of study.yaml."""

    name: str = ""
    title: Title = ""
    variants: Mapping[str, Any] = field(default_factory=dict)
    contrasts: tuple[Contrast, ...] = ()


_STUDY, _PLAN = TypeAdapter(_Study), TypeAdapter(tuple[Planned, ...])


@dataclass(frozen=True)
class Subject:
    """The subject of a report; its runs have different names. `range_tests` names those in a folder of runs.

    `fault` says why the study's title and contrasts are missing; it is empty if they are not.
    """

    directory: Path
    kind: Literal["run", "study", "folder"]
    runs: tuple[StoredRun, ...]
    range_tests: tuple[str, ...] = ()
    study: _Study = _Study()
    fault: str = ""

    @property
    def title(self) -> str:
        """Return the study's title or name, or else the folder's name."""
        return self.study.title or self.study.name or self.directory.resolve().name

    @property
    def others(self) -> tuple[str, ...]:
        """Return the names of the runs with a result in a study's folder that the study does not have (any more)."""
        ended = runs_with_result(self.directory) if self.kind == "study" else ()
        return tuple(name for name in ended if name not in {run.name for run in self.runs})

    @property
    def contrasts(self) -> tuple[Contrast, ...]:
        """Return the study's named contrasts, as far as their variants exist; a grid is resolved to its variants."""
        recorded = {run.planned.variant: run.planned.family for run in self.runs if run.planned}
        families = sorted(self.study.variants, key=len, reverse=True)
        members: dict[str, list[str]] = {}
        for name, family in recorded.items():
            guess = next((each for each in families if name == each or name.startswith(f"{each}-")), name)
            members.setdefault(family or guess, []).append(name)
        found = []
        for contrast in self.study.contrasts:
            if len(members.get(contrast.against, ())) == 1:
                chosen = (name for variant in dict.fromkeys(contrast.variants) for name in members.get(variant, ()))
                resolved = {"variants": tuple(chosen), "against": members[contrast.against][0]}
                found.append(contrast.model_copy(update=resolved))
        return tuple(found)


def _read_study(path: Path) -> tuple[_Study, str]:
    """Return the content of the study file at `path`, empty if there is none, and why it cannot be used."""
    try:
        return _STUDY.validate_python(parse_yaml(read_regular(path)) if path.exists() else {}), ""
    except ValidationError as error:
        wrong = "; ".join(f"{each.path}: {each.wrong}" for each in problems_of(error, Study))
    except (OSError, ValueError, yaml.YAMLError) as error:
        wrong = " ".join(str(error).split())
    return _Study(), f"{path} is invalid ({wrong}): the study's title and contrasts are missing. Sweep it again."


def read_subject(directory: Path) -> Subject:
    """Return the runs of `directory`. Raises UsageError if it is not a folder or contains no run."""
    fix = "name a run, a study, or a folder of runs"
    if not directory.is_dir():
        raise UsageError(f"there is no folder {directory}: {fix}", code="folder-missing")
    if StudyDirectory(directory).has_plan:
        study, fault = _read_study(StudyDirectory(directory).study)
        return Subject(directory, "study", tuple(_study_runs(directory, "")), study=study, fault=fault)
    if RunDirectory(directory).has_begun:
        return Subject(directory, "run", (read_run(directory, directory.resolve().name),))
    faults: list[OSError] = []
    found = tuple(_runs_below(directory, faults.append))
    runs = tuple(run for run in found if not run.is_range_test)
    tests = tuple(run.name for run in found if run.is_range_test)
    # Folders that cannot be listed may be runs.
    closed = tuple(
        _unreadable(path := Path(fault.filename), escaped(str(path.relative_to(directory))), fault) for fault in faults
    )
    if not runs:
        only = f" but learning-rate range tests ({', '.join(tests)})" if tests else ""
        rest = f" ({', '.join(run.name for run in closed)} cannot be read)" if closed else ""
        raise UsageError(f"there is no run at or below {directory}{only}{rest}: {fix}", code="no-run-here")
    return Subject(directory, "folder", runs + closed, tests)


def _runs_below(directory: Path, onerror: Callable[[OSError], object]) -> Iterator[StoredRun]:
    """Yield the runs at or below `directory`; `onerror` gets the errors of folders that cannot be listed."""
    for path, children in walk_runs(directory, onerror):
        name = escaped(str(path.relative_to(directory)))
        try:
            is_study = StudyDirectory(path).has_plan
            is_run = not is_study and RunDirectory(path).has_begun
        except OSError:
            is_study, is_run = False, True  # `read_run` says why it cannot be read
        if is_study:
            children.clear()
            try:
                yield from _study_runs(path, f"{name}/")
            except UsageError as error:
                yield StoredRun(path, name, "broken", str(error))
        elif is_run:
            children.clear()
            yield read_run(path, name)


def _study_runs(directory: Path, prefix: str) -> Iterator[StoredRun]:
    path = StudyDirectory(directory).runs
    base: Mapping[str, Any] = {}
    with suppress(BrokenFileError, ConfigError):
        base = with_overrides({}, read_settings(StudyDirectory(directory).base))
    try:
        plan = _PLAN.validate_json(read_regular(path))
    except OSError as error:
        raise UsageError(f"{path} cannot be read: {error.strerror or error}", code="plan-damaged") from error
    except ValueError as error:
        raise UsageError(f"{path} is not a list of runs: start the study's sweep again", code="plan-damaged") from error
    for each in plan:
        planned = replace(each, title=each.title or each.variant, resolved=_planned_settings(base, each.overrides))
        run = read_run(directory / planned.name, prefix + planned.name, planned)
        # Its numbers would stand under the title of settings that it did not have.
        changed = "; ".join(_changes(run.settings, planned.resolved))
        note = f"it was started with other settings than the study has now ({changed})"
        other = StoredRun(run.directory, run.name, "broken", note, planned, has_other_settings=True)
        yield other if changed else run


def _planned_settings(base: Mapping[str, Any], overrides: Sequence[str]) -> Mapping[str, object]:
    """Return the settings of nested `base` with `overrides`, by dotted path."""
    for override in overrides:
        with suppress(ConfigError):
            base = with_overrides(base, [override])
    return dict(flat_settings(with_present_names(base, lambda text: None)))


def _changes(settings: Mapping[str, object], planned: Mapping[str, object]) -> Iterator[str]:
    """Yield how `settings` differ from those `planned`, as far as that can change a result.

    What the run itself has decided does not count.
    """
    for path in sorted(settings.keys() | planned.keys()):
        had, has = settings.get(path), planned.get(path)
        # Runs of older versions lack settings, and base.yaml may be missing; but options are the user's own.
        is_known = (path in settings and path in planned) or bool(settings and planned and _OPTION.search(path))
        if is_known and had != has and not _may_be_same(path, had, has) and (path in LENGTHS or not may_change(path)):
            yield f"{path}: {had}, not {has}"


def _may_be_same(path: str, had: object, has: object) -> bool:
    """Whether two values of the setting at `path` are one decided by the run, or forms of one name or file."""
    if "auto" in (had, has):
        return True
    if not isinstance(had, str) or not isinstance(has, str):
        return False
    homes = [each.partition("/")[2] for each in (had, has) if each.startswith("~")]
    if homes:
        return all(each.endswith(f"/{homes[0]}") for each in (had, has))
    # A path is spelled in the plan as in the study, such as ./runs/first/, and in the run as runs/first.
    return Path(had) == Path(has) or may_name_one_plugin(path, had, has, Config)
