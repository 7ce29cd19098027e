"""The ordered runs of a study, with name, overrides and validated configuration, and the analyses that follow them."""

from __future__ import annotations

import functools
import itertools
import json
import operator
import os
import re
from collections.abc import Iterator, Mapping, Sequence
from contextlib import suppress
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

import yaml

from dist_train.config import Config, ConfigError, dump_config, parse_config
from dist_train.config.combinations import NOT_MEASURED
from dist_train.config.loading import based_on, located, read_settings, with_overrides, write_override
from dist_train.config.plugins import from_folder, is_plugin
from dist_train.config.problems import Problem
from dist_train.outcome import UsageError
from dist_train.rundir import atomic
from dist_train.rundir.paths import RunDirectory, StudyDirectory
from dist_train.sweep.study_file import (
    Analysis,
    Interpolation,
    OptunaTrials,
    Settings,
    Study,
    drawn_settings,
    load_study,
    overlaid,
    problems_of_overrides,
)


@dataclass(frozen=True, kw_only=True)
class _Variant:
    """A variant, one combination of its grid, or, of the searched variant `searched`, the trial number `trial`.

    `variant` is its name. The variants of a grid share a `family`; without a grid it is the variant itself. It
    `has_title` if the study gives it one, or it is a trial, whose title names what was searched. `settings` are the
    study's, keyed by dotted path; `origins` maps them to their place in the study file. As long as Optuna has not
    suggested a trial (`is_asked` is False), its settings are those with a random `sample`, so that they can be
    validated.
    """

    variant: str
    family: str
    title: str
    has_title: bool
    settings: Settings
    origins: Mapping[str, str]
    searched: str = ""
    trial: int | None = None
    is_asked: bool = True
    sample: Settings | None = None


@dataclass(frozen=True, kw_only=True)
class PlannedRun(_Variant):
    """One run; `number` counts from 1; `overrides` are the arguments of `train` after the base configuration.

    Runs that differ only in their seed share a `variant`.
    """

    number: int
    name: str
    seed: int
    overrides: tuple[str, ...]
    config: Config

    @property
    def directory(self) -> Path:
        """The run's directory."""
        return self.config.run_directory

    @property
    def files(self) -> RunDirectory:
        """The paths of its files."""
        return RunDirectory(self.directory)


_LONGEST_NAME = 255  # of a file on Linux

_RECORDED = ("number", "name", "variant", "family", "title", "has_title", "trial", "seed", "settings", "overrides")


@dataclass(frozen=True)
class Plan:
    """A study and its runs. `directory` is the study's folder, `base_file` the configuration that it varies."""

    study: Study
    file: Path
    base_file: Path
    base: Config
    directory: Path
    runs: tuple[PlannedRun, ...]
    overrides: tuple[str, ...] = ()
    unasked: Mapping[int, str] = field(default_factory=dict)
    """In an Optuna search: maps the numbers of runs whose trials Optuna has not suggested yet to their variants."""
    left_out: Mapping[int, str] = field(default_factory=dict)
    """Likewise, to their names: the runs for which Optuna has suggested settings that are invalid together."""

    @property
    def total(self) -> int:
        """Number of runs, including those not known yet and those left out."""
        return len(self.runs) + len(self.unasked) + len(self.left_out)

    def run(self, number: int) -> PlannedRun | None:
        """Return the run of this number; None if there is none, or it is left out or not known yet."""
        return next((run for run in self.runs if run.number == number), None)

    def train_arguments(self, run: PlannedRun) -> tuple[str, ...]:
        """Return the `dist-train` arguments that train `run`."""
        return ("train", str(self.base_file), *run.overrides)


def plan_study(
    path: Path, directory: Path | None = None, overrides: Sequence[str] = (), before: Plan | None = None
) -> Plan:
    """Return the study at `path` with its runs, seed by seed, each fully validated.

    The runs' folder is `directory` (default: the base's run.directory) / the study's name. `overrides` apply to every
    run. Runs of `before`, an earlier plan of the same study, are not validated again.

    Raises ConfigError if the study, its base or one of its runs is invalid; every problem is listed once. Raises
    UsageError if its folder is that of a run, or has files that the plan would replace.
    """
    study = load_study(path)
    base_file = based_on(path, study.base)
    plain = Path(os.path.normpath(base_file))
    if os.path.realpath(plain) == os.path.realpath(base_file):  # they differ where the folder before a `..` is a link
        base_file = plain
    base_settings = read_settings(base_file, (os.path.realpath(path),))
    base = parse_config(base_settings, source=str(base_file))
    with_overrides(base_settings, overrides)  # raises if an override is invalid
    if refused := list(problems_of_overrides(study, overrides)):
        raise ConfigError("command line", refused)
    if base.run.resume == "never":
        wrong = "the runs of a study resume: leave it out"
        raise ConfigError.of(str(base_file), "run.resume", wrong, code="set-by-study", value="never")
    folder = (directory or base.run.directory) / study.name
    trials = optuna_trials(study, folder)
    planned: list[PlannedRun] = []
    configs: list[Config] = []
    found: list[Problem] = []
    unasked: dict[int, str] = {}
    left_out: dict[int, str] = {}
    checked = {run.overrides: run for run in before.runs} if before else {}

    def arguments_of(settings: Settings, name: str, seed: int) -> tuple[str, ...]:
        own = dict(settings_from(located(path).parent, settings))
        own |= {"run.name": name, "run.directory": str(folder), "run.seed": seed}
        return (*(write_override(place, value) for place, value in own.items()), *overrides)

    for number, seed, variant in _points(study, trials):
        name = f"{variant.variant}-seed-{seed}"
        arguments = arguments_of(variant.settings, name, seed)
        if not variant.is_asked:
            unasked[number] = variant.searched
            if before:
                continue
        elif arguments in checked:
            planned.append(checked[arguments])
            continue
        try:
            config = parse_config(with_overrides(base_settings, arguments), source=name)
        except ConfigError as error:
            sampled = () if variant.sample is None else arguments_of(variant.sample, name, seed)
            if variant.is_asked and sampled and _is_valid(with_overrides(base_settings, sampled)):
                left_out[number] = name  # not the study's fault, but that of what Optuna put together
            else:
                found += (_located(fault, variant, overrides) for fault in error.problems)
            continue
        configs.append(config)
        if variant.is_asked:
            planned.append(
                PlannedRun(**vars(variant), number=number, name=name, seed=seed, overrides=arguments, config=config)
            )
    found += _duplicates(planned)
    if before and before.study.search:
        study = _with_objective(study, before.study.search.objective, configs)
    else:
        study = _with_objective(study, trials.objective if trials else None, configs)
    objective = study.search.objective if study.search else "test.accuracy"
    if not all(config.measures(objective) for config in configs):
        found.append(Problem("search.objective", NOT_MEASURED, code="metric-not-measured", value=objective))
    if found:
        # A problem of a variant recurs with every seed: list it once.
        raise ConfigError(str(path), list({str(fault): fault for fault in found}.values()))
    _check_folder(folder, {path: _dumped(study), base_file: dump_config(base)})
    return Plan(study, path, base_file, base, folder, tuple(planned), tuple(overrides), unasked, left_out)


def _with_objective(study: Study, known: str | None, configs: Sequence[Config]) -> Study:
    """Return `study` with the objective of its search where it names none: that of its trials, if it is `known`.

    Otherwise it is accuracy on the validation split if all `configs` have one, else on the test split.
    """
    search = study.search
    if search is None or "objective" in search.model_fields_set:
        return study
    judged = "validation.accuracy"
    chosen = known or (judged if all(config.measures(judged) for config in configs) else search.objective)
    if chosen == search.objective:
        return study
    return study.model_copy(update={"search": search.model_copy(update={"objective": chosen})})


def _is_valid(settings: Mapping[str, Any]) -> bool:
    with suppress(ConfigError):
        parse_config(settings, source="sample")
        return True
    return False


def settings_from(folder: Path, settings: Settings) -> Iterator[tuple[str, Any]]:
    """Yield `settings` by dotted path, with absolute paths of plug-in files, which are relative to `folder`."""
    for path, value in settings.items():
        section: Any = from_folder(with_overrides({}, {path: value}), folder)
        yield path, functools.reduce(operator.getitem, path.split("."), section)


def _check_folder(folder: Path, texts: Mapping[Path, str]) -> None:
    """Raise UsageError if the plan must not be written into `folder`.

    `texts`: what is written there, by the files that it comes from: the study and its base.
    """
    files = StudyDirectory(folder)
    has_plan = files.runs.exists()
    fix = "give the study another name, or choose another folder with --directory"
    if RunDirectory(folder).has_begun and not has_plan:
        raise UsageError(f"{folder} is the folder of a run: {fix}", code="folder-is-run")
    for file, (source, text) in zip((files.study, files.base), texts.items(), strict=True):
        if has_plan or not file.is_file() or file.read_bytes() == text.encode():
            continue
        if file.samefile(located(source)):
            raise UsageError(f"{file} is the study's own, and would be replaced: {fix}", code="folder-is-source")
        raise UsageError(f"{file} is not that of a sweep, and would be replaced: {fix}", code="folder-foreign-file")


def _points(study: Study, trials: OptunaTrials | None) -> Iterator[tuple[int, int, _Variant]]:
    """Yield number, seed and variant of all runs: trial by trial, and for each trial seed by seed."""
    variants = list(variants_of(study))
    every = (
        (trial, seed, variant)
        for trial in range(study.search.trials if study.search else 1)
        for seed in study.seeds
        for variant in variants
        if seed in study.seeds_of(variant.family)
    )
    asked = {variant.variant: trials.settings(variant.variant) for variant in variants} if trials else {}
    for number, (trial, seed, variant) in enumerate(every, start=1):
        if study.search is None:
            yield number, seed, variant
            continue
        known, drawn = asked.get(variant.variant, ()), drawn_settings(study.search, variant.variant, trial)
        chosen = known[trial] if trial < len(known) else drawn
        trial_variant = replace(
            variant,
            variant=f"{variant.variant}-trial-{trial}",
            title=", ".join([variant.title, f"trial {trial}", *_labels_of(chosen)]),
            has_title=True,
            settings=overlaid(variant.settings, chosen),
            origins=overlaid(variant.origins, dict.fromkeys(chosen, "search.space")),
            searched=variant.variant,
            trial=trial,
            is_asked=trials is None or trial < len(known),
            sample=overlaid(variant.settings, drawn) if trials else None,
        )
        yield number, seed, trial_variant


def optuna_trials(study: Study, folder: Path) -> OptunaTrials | None:
    """Return the trials in the study's `folder`, None if it has no Optuna search. Raises UsageError without Optuna."""
    if study.search is None or study.search.method != "optuna":
        return None
    return OptunaTrials(study.search, StudyDirectory(folder).trials)


def write_plan(plan: Plan) -> None:
    """Write the study, its base configuration and its runs into the study's folder."""
    plan.directory.mkdir(mode=0o700, parents=True, exist_ok=True)
    files = StudyDirectory(plan.directory)
    atomic.write_text(files.study, _dumped(plan.study))
    atomic.write_text(files.base, dump_config(plan.base))
    runs = [{name: getattr(run, name) for name in _RECORDED} | {"overrides": list(_recorded(run))} for run in plan.runs]
    atomic.write_text(files.runs, json.dumps(runs, indent=2) + "\n")


def _recorded(run: PlannedRun) -> Iterator[str]:
    """Yield the overrides of `run` with the long names of plug-ins: base.yaml does not list what registers them."""
    for override in run.overrides:
        path = override.partition("=")[0]
        value = run.config.value(path) if path.count(".") == 1 else None
        yield write_override(path, value) if isinstance(value, str) and is_plugin(value) else override


def is_written(plan: Plan) -> bool:
    """Whether the study's folder holds this study, and not another that a later sweep has written."""
    with suppress(OSError, UnicodeDecodeError):
        return StudyDirectory(plan.directory).study.read_text(encoding="utf-8") == _dumped(plan.study)
    return False


def _dumped(study: Study) -> str:
    text: str = yaml.safe_dump(study.model_dump(mode="json"), sort_keys=False)
    return text


def variants_of(study: Study) -> Iterator[_Variant]:
    """Yield the variants of `study`, of a grid each combination by itself, without the settings of a search."""
    for variant, described in study.variants.items():
        settings, origins = study.settings_of(variant), _origins(study, variant)
        grid = {**described.grid, **study.grid}
        grid_origins = dict.fromkeys(described.grid, f"variants.{variant}.grid") | dict.fromkeys(study.grid, "grid")
        for values in itertools.product(*grid.values()):
            chosen = dict(zip(grid, values, strict=True))
            labels = _labels_of(chosen)
            yield _Variant(
                variant="-".join([variant, *(re.sub(r"[^A-Za-z0-9._-]+", "-", label).strip("-") for label in labels)]),
                family=variant,
                title=", ".join([described.title or variant, *labels]),
                has_title=bool(described.title),
                settings=overlaid(settings, chosen),
                origins=overlaid(origins, grid_origins),
            )


def _origins(study: Study, variant: str) -> dict[str, str]:
    """Return the place in the study file of each of `study.settings_of(variant)`."""
    described = study.variants[variant]
    inherited = _origins(study, described.like) if described.like else dict.fromkeys(study.settings, "settings")
    return overlaid(inherited, dict.fromkeys(described.settings, f"variants.{variant}.settings"))


def _labels_of(settings: Settings) -> list[str]:
    """Return the values of `settings`, each after its path's last part, or after all of it if that is ambiguous."""
    lasts = [path.rpartition(".")[2] for path in settings]
    return [
        f"{last if lasts.count(last) == 1 else path.replace('.', '_')} {_label(value)}"
        for (path, value), last in zip(settings.items(), lasts, strict=True)
    ]


def _label(value: Any) -> str:
    if isinstance(value, dict) and "kind" in value:
        rest = [f"{name} {_label(inner)}" for name, inner in value.items() if name != "kind"]
        return " ".join([str(value["kind"]), *rest])
    return value if isinstance(value, str) else json.dumps(value)


def _located(fault: Problem, variant: _Variant, overrides: Sequence[str]) -> Problem:
    """Return `fault` with its path in the study file; unchanged if it comes from an override."""

    def is_of(setting: str) -> bool:
        return fault.path == setting or fault.path.startswith(f"{setting}.")

    if any(is_of(override.partition("=")[0]) for override in overrides):
        return fault
    origins = [f"{origin}.{fault.path}" for setting, origin in variant.origins.items() if is_of(setting)]
    place = origins[-1] if origins else f"{fault.path} (variant {variant.variant})"
    return replace(fault, path=place)


def _duplicates(runs: Sequence[PlannedRun]) -> Iterator[Problem]:
    names: dict[str, PlannedRun] = {}
    settings: dict[str, PlannedRun] = {}
    for run in runs:
        if len(run.name) > _LONGEST_NAME:
            wrong = f"the name of a run's folder would be longer than {_LONGEST_NAME} characters"
            yield Problem(f"variants.{run.family}", wrong, code="out-of-range", value=run.name)
        if run.name in names:
            yield Problem("variants", "two runs would have the same name", code="name-twice", value=run.name)
            continue
        names[run.name] = run
        plain = run.config.model_copy(update={"run": run.config.run.model_copy(update={"name": ""})})
        if run.trial is not None:  # two trials may have the same settings
            continue
        twin = settings.setdefault(plain.model_dump_json(), run)
        if twin is not run:
            yield Problem(
                f"variants.{run.variant}", f"has the same settings as the variant {twin.variant}", code="same-settings"
            )


def analysis_commands(study: Study, runs: Sequence[PlannedRun]) -> Iterator[tuple[str, ...]]:
    """Yield the `dist-train` arguments of each analysis of `runs`, finished ones; `interpolate` pairs them by seed."""
    for analysis in study.analyse:
        for subjects in _subjects(study, analysis, runs):
            yield analysis_command(analysis, [str(run.directory) for run in subjects])


def analysis_command(analysis: Analysis, targets: Sequence[str]) -> tuple[str, ...]:
    """Return the `dist-train` arguments of `analysis` of `targets`, run directories or checkpoints."""
    command = ("sharpness",) if analysis.kind == "sharpness" else ("landscape", analysis.kind)
    return (*command, *targets, *_options(analysis))


def _subjects(study: Study, analysis: Analysis, runs: Sequence[PlannedRun]) -> Iterator[tuple[PlannedRun, ...]]:
    chosen = [run for run in runs if not analysis.seeds or run.seed in analysis.seeds]
    if isinstance(analysis, Interpolation):
        first, second = ([run for run in chosen if run.family == variant] for variant in analysis.between)
        # of one variant, the members of its grid or its trials, each pair once
        pairs = itertools.combinations(first, 2) if first == second else itertools.product(first, second)
        yield from ((one, other) for one, other in pairs if one.seed == other.seed)
    else:
        yield from ((run,) for run in chosen if run.family in (analysis.variants or study.variants))


def _options(analysis: Analysis) -> Iterator[str]:
    for name, value in analysis.options.items():
        if value is False:
            continue
        yield f"--{name}"
        if isinstance(value, list):
            each = list(map(str, value))
            yield from [",".join(each)] if analysis.kind == "sharpness" else each  # as each command takes a list
        elif value is not True:
            yield str(value)
