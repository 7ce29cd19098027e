"""The study file (variants, grids, seeds in YAML), and the trials of its search, random or suggested by Optuna."""

from __future__ import annotations

import hashlib
import itertools
import json
import math
import os
import random
import re
import warnings
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager, suppress
from functools import cached_property
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, Literal, TypeVar

from pydantic import AfterValidator, Field, NonNegativeInt, PositiveInt, ValidationError

from dist_train.config import Config
from dist_train.config.loading import read_mapping
from dist_train.config.parts import Metric, Section
from dist_train.config.problems import ConfigError, Problem, problems_of, settings_called
from dist_train.outcome import UsageError, did_you_mean
from dist_train.rundir.atomic import exclusive

if TYPE_CHECKING:
    import optuna


NAME = r"^[A-Za-z0-9][A-Za-z0-9._-]*$"
_SETTING = re.compile(r"[A-Za-z_]\w*(\.\w+)+")
_SET_BY_STUDY = ("run", "run.name", "run.directory", "run.seed", "run.resume")

Settings = dict[str, Any]  # values by dotted path: `noise.amplitude: 0.01`
_Value = TypeVar("_Value")

Title = Annotated[str, AfterValidator(lambda title: " ".join(title.split()))]
"""A title in one line: it becomes a cell or a heading in Markdown."""


def overlaid(before: Mapping[str, _Value], own: Mapping[str, _Value]) -> dict[str, _Value]:
    """Return `before` with the values of `own`, by dotted path, which replace all values at and below their paths."""
    kept = {path: value for path, value in before.items() if not any(f"{path}.".startswith(f"{it}.") for it in own)}
    return {**kept, **own}


_Option = str | int | float | bool | list[str | int | float]


class Variant(Section):
    """One variant: its changes to the base configuration or to another variant's settings."""

    title: Title = Field("", description="Title in figures and tables; empty: its name.")
    like: str | None = Field(None, description="The variant whose settings this one starts from.")
    seeds: tuple[NonNegativeInt, ...] = Field((), description="It is run with these seeds only; none: with all.")
    settings: Settings = Field({}, description="Settings that differ, by dotted path.")
    grid: dict[str, list[Any]] = Field({}, description="Lists of values by dotted path: one variant per combination.")


class _Measurement(Section):
    seeds: tuple[NonNegativeInt, ...] = Field((), description="Only runs of these seeds; none: all.")
    options: dict[Annotated[str, Field(pattern=r"^[a-z][a-z-]*$")], _Option] = Field(
        {}, description="Options of the command by name, without --; true for options without a value."
    )


class Interpolation(_Measurement):
    """`landscape interpolate` between the runs of two variants, seed by seed."""

    kind: Literal["interpolate"]
    between: tuple[str, str] = Field(description="The two variants.")


class OfVariants(_Measurement):
    """`landscape direction`, `landscape plane` or `sharpness` of each run."""

    kind: Literal["direction", "plane", "sharpness"]
    variants: tuple[str, ...] = Field((), description="The variants; none: all.")


Analysis = Annotated[Interpolation | OfVariants, Field(discriminator="kind")]


class Contrast(Section):
    """Variants that the report compares with a reference variant, paired by seed."""

    title: Title = Field("", description="Title in the report; empty: the variants' names.")
    variants: tuple[str, ...] = Field(
        min_length=1, description="The variants; the intervals are corrected for their number."
    )
    against: str = Field(description="The reference variant, which must not have a grid.")


class Uniform(Section):
    """A number, or its logarithm, uniformly distributed between two bounds."""

    kind: Literal["uniform", "log_uniform"]
    low: float = Field(description="The smallest value.")
    high: float = Field(description="The largest value.")


class Integers(Section):
    """An integer between two bounds, both included."""

    kind: Literal["integer"]
    low: int = Field(description="The smallest value.")
    high: int = Field(description="The largest value.")


class Choice(Section):
    """One of several values."""

    kind: Literal["choice"]
    values: list[Any] = Field(min_length=1, description="The values to choose from.")


Distribution = Annotated[Uniform | Integers | Choice, Field(discriminator="kind")]


class Search(Section):
    """Trials instead of a grid: each sets every setting of `space`."""

    method: Literal["random", "optuna"] = Field(
        description="random: all trials are drawn beforehand. optuna: each is chosen from earlier results (TPE)."
    )
    trials: PositiveInt = Field(description="Trials of each variant.")
    seed: NonNegativeInt = Field(0, description="Seed of the trials.")
    objective: Metric = Field("test.accuracy", description="A trial's metric; a plan chooses it if it is not given.")
    space: dict[str, Distribution] = Field(min_length=1, description="A distribution by dotted path.")


class Study(Section):
    """The content of a study file."""

    name: str = Field(pattern=NAME, description="Name of the study's folder.")
    title: Title = Field("", description="Title of the report; empty: its name.")
    base: str = Field(min_length=1, description="The configuration that every run starts from; relative to this file.")
    seeds: tuple[NonNegativeInt, ...] = Field((0,), min_length=1, description="Each variant is run with each seed.")
    settings: Settings = Field({}, description="Every run's changes to the base configuration, by dotted path.")
    grid: dict[str, list[Any]] = Field({}, description="As in a variant; applies to all variants.")
    search: Search | None = Field(None, description="Trials of every variant and of every combination of its grid.")
    variants: dict[Annotated[str, Field(pattern=NAME)], Variant] = Field(
        min_length=1, description="The variants, by name."
    )
    analyse: tuple[Analysis, ...] = Field((), description="Measurements after the runs have finished.")
    contrasts: tuple[Contrast, ...] = Field((), description="Comparisons in the report, paired by seed.")

    def settings_of(self, variant: str) -> Settings:
        """Return the settings of `variant`, including those inherited by `like`."""
        described = self.variants[variant]
        inherited = self.settings_of(described.like) if described.like else self.settings
        return overlaid(inherited, described.settings)

    def seeds_of(self, variant: str) -> tuple[int, ...]:
        """Return the seeds of `variant`."""
        return self.variants[variant].seeds or self.seeds


def load_study(path: Path) -> Study:
    """Return the study in the YAML file at `path`, its runs' configurations unchecked. Raises ConfigError."""
    written = read_mapping(path)
    if "variants" not in written and written.keys() & Config.model_fields:
        wrong = "this is the configuration of a run, not a study: train it by dist-train train"
        raise ConfigError.of(str(path), "variants", wrong, code="missing")
    try:
        study = Study.model_validate_json(json.dumps(written), strict=True)
    except ValidationError as error:
        raise ConfigError(str(path), problems_of(error, Study)) from None
    except (TypeError, ValueError, RecursionError) as error:
        raise ConfigError.of(str(path), "(file)", str(error), code="wrong-type") from None
    found = [*_problems_of_settings(study), *_problems_of_variants(study)] or list(_without_runs(study))
    if found:
        raise ConfigError(str(path), found)
    return study


def problems_of_overrides(study: Study, overrides: Sequence[str]) -> Iterator[Problem]:
    """Yield a problem for each override of a setting that the study itself, or its search, sets."""
    searched = [f"{path}." for path in (study.search.space if study.search else ())]
    for override in overrides:
        path, _, value = override.partition("=")
        below = f"{path}."
        if path in _SET_BY_STUDY or any(below.startswith(each) or each.startswith(below) for each in searched):
            yield _set_by_study(path, value)


def _set_by_study(path: str, value: object) -> Problem:
    return Problem(path, "the study itself sets this for each run", code="set-by-study", value=value)


def _problems_of_settings(study: Study) -> Iterator[Problem]:
    space: dict[str, Any] = dict(study.search.space) if study.search else {}
    places = {"settings": study.settings, "search.space": space}
    grids = {"grid": study.grid}
    for name, variant in study.variants.items():
        places[f"variants.{name}.settings"] = variant.settings
        grids[f"variants.{name}.grid"] = variant.grid
    for place, settings in (places | grids).items():
        for path, value in settings.items():
            if path in _SET_BY_STUDY:
                yield _set_by_study(f"{place}.{path}", value)
            elif not _SETTING.fullmatch(path):
                meant = [each for each in settings_called(path, Config) if "." in each] or ["noise.amplitude"]
                allowed = f"the dotted path of a setting, such as {' or '.join(meant)}"
                yield Problem(f"{place}.{path}", "not a setting", code="wrong-form", value=value, allowed=allowed)
    for path, distribution in space.items():
        if isinstance(distribution, Choice):
            continue
        least = 0.0 if distribution.kind == "log_uniform" else float("-inf")
        if not least < distribution.low < distribution.high:
            wrong = f"low must be below high{', and above 0' if least == 0 else ''}"
            yield Problem(f"search.space.{path}", wrong, code="out-of-range", value=distribution.model_dump())
    for place, grid in grids.items():
        for path, values in grid.items():
            if path in space:
                yield Problem(f"{place}.{path}", "the search has this setting already", code="grid-twice", value=values)
            if not values:
                yield Problem(f"{place}.{path}", "an empty list would leave no run", code="empty-grid", value=values)


def _problems_of_variants(study: Study) -> Iterator[Problem]:
    named: dict[str, Sequence[str]] = {}
    seeds = {"seeds": study.seeds}
    for name, variant in study.variants.items():
        seeds[f"variants.{name}.seeds"] = variant.seeds
        if variant.like is not None:
            named[f"variants.{name}.like"] = [variant.like]
            if _inherits_from_itself(study, name):
                wrong = "the variant inherits from itself, through others"
                yield Problem(f"variants.{name}.like", wrong, code="like-itself", value=variant.like)
        for path in sorted(set(variant.grid) & set(study.grid)):
            wrong, place = "the study's grid has this setting already", f"variants.{name}.grid.{path}"
            yield Problem(place, wrong, code="grid-twice", value=variant.grid[path])
    for number, analysis in enumerate(study.analyse):
        seeds[f"analyse.{number}.seeds"] = analysis.seeds
        if isinstance(analysis, OfVariants):
            named[f"analyse.{number}.variants"] = analysis.variants
            continue
        place, (first, second) = f"analyse.{number}.between", analysis.between
        named[place] = analysis.between
        if first == second and not study.search and not _has_grid(study, first):
            wrong = "there is no line from a run to itself: name two variants"
            yield Problem(place, wrong, code="same-checkpoint", value=[first, second])
    for number, contrast in enumerate(study.contrasts):
        place = f"contrasts.{number}.against"
        named |= {f"contrasts.{number}.variants": contrast.variants, place: [contrast.against]}
        if _has_grid(study, contrast.against):
            wrong = "a variant with a grid is several variants"
            yield Problem(place, wrong, code="several-variants", value=contrast.against)
    for path, names in named.items():
        for name in names:
            if name not in study.variants:
                wrong, known = f"not a variant{did_you_mean(name, study.variants)}", ", ".join(study.variants)
                yield Problem(path, wrong, code="unknown-variant", value=name, allowed=known)
    for path, own in seeds.items():
        if unknown := sorted(set(own) - set(study.seeds)):
            known = ", ".join(map(str, study.seeds))
            yield Problem(path, "not a seed of the study", code="unknown-seed", value=unknown[0], allowed=known)
        if len(set(own)) < len(own):
            yield Problem(path, "a seed is listed twice", code="seed-twice", value=list(own))


def _without_runs(study: Study) -> Iterator[Problem]:
    """Yield a problem for each analysis and contrast without a run, or pair of runs; the study is valid otherwise."""
    wrong = "the study has no run, or no pair of runs with one seed, of these variants and seeds"
    for number, analysis in enumerate(study.analyse):
        seeds = set(analysis.seeds or study.seeds)
        if isinstance(analysis, Interpolation):
            seeds = seeds.intersection(*map(study.seeds_of, analysis.between))
        else:
            seeds &= {seed for name in analysis.variants or study.variants for seed in study.seeds_of(name)}
        if not seeds:
            chosen = analysis.model_dump(exclude={"options"})
            yield Problem(f"analyse.{number}", wrong, code="no-such-runs", value=chosen)
    for number, contrast in enumerate(study.contrasts):
        is_with_itself = set(contrast.variants) == {contrast.against}
        for name in contrast.variants:
            if is_with_itself or not set(study.seeds_of(name)) & set(study.seeds_of(contrast.against)):
                pair = [name, contrast.against]
                yield Problem(f"contrasts.{number}.variants", wrong, code="no-such-runs", value=pair)


def _has_grid(study: Study, variant: str) -> bool:
    return bool(study.grid or (variant in study.variants and study.variants[variant].grid))


def _inherits_from_itself(study: Study, name: str) -> bool:
    seen = {name}
    following = study.variants[name].like
    while following in study.variants and following not in seen:
        seen.add(following)
        following = study.variants[following].like
    return following == name


def drawn_settings(search: Search, variant: str, trial: int) -> Settings:
    """Return the settings of a random trial, each a pure function of (seed, variant, trial, path)."""
    # nosec: bandit assumes that every generator makes secrets.
    return {
        path: _draw(distribution, random.Random(f"{search.seed} {variant} {trial} {path}"))  # nosec B311
        for path, distribution in search.space.items()
    }


def _draw(distribution: Distribution, source: random.Random) -> Any:
    match distribution:
        case Choice(values=values):
            return values[source.randrange(len(values))]
        case Integers(low=low, high=high):
            return source.randint(low, high)
        case Uniform(kind="log_uniform", low=low, high=high):
            return _six_digits(math.exp(source.uniform(math.log(low), math.log(high))), distribution)
    return _six_digits(source.uniform(distribution.low, distribution.high), distribution)


def _six_digits(value: float, distribution: Uniform) -> float:
    """Return `value` rounded to six digits, so that the recorded value is exact and can be copied."""
    return min(distribution.high, max(distribution.low, float(f"{value:.6g}")))


class OptunaTrials:
    """The Optuna trials of a study, in one journal that several sweeps on several nodes may use at once.

    Each variant is one Optuna study. The sampler of a trial is seeded by the trial's number, so that its suggestion is
    a function of the results so far, even across kills and resumes.
    """

    def __init__(self, search: Search, journal: Path) -> None:
        """Use the file `journal`, which the first trial creates. Raises UsageError if Optuna is not installed.

        So do the methods, except `locked`, if the journal cannot be read or holds trials of another objective or space.
        """
        try:
            import optuna
        except ImportError as error:
            wrong = "search.method is optuna, but Optuna is not installed: pip install 'dist_train[search]'"
            raise UsageError(wrong, code="optuna-missing") from error
        self._optuna = optuna
        self._search = search
        self._journal = journal
        optuna.logging.set_verbosity(optuna.logging.WARNING)

    @contextmanager
    def locked(self) -> Iterator[None]:
        """Within the block, keep other sweeps from asking for trials."""
        self._journal.parent.mkdir(mode=0o700, parents=True, exist_ok=True)
        with exclusive(self._journal.with_suffix(".lock")):
            link = self._journal.with_name(f"{self._journal.name}.lock")
            # Optuna's lock, which a kill leaves behind: Optuna breaks it after 30 seconds, during which one of Optuna's
            # own tools may hold it rightly. But it waits for ever for a link that leads nowhere, as after a move.
            with suppress(OSError):  # there is none; it is read, not followed: another holder may make it meanwhile
                if not (self._journal.parent / os.readlink(link)).exists():
                    link.unlink()
            if self._broken_end() is not None:
                storages = self._optuna.storages
                lock = storages.journal.JournalFileSymlinkLock(str(self._journal.absolute()))
                lock.acquire()
                try:
                    if (length := self._broken_end()) is not None:  # and it was no line that was being written
                        os.truncate(self._journal, length)
                finally:
                    lock.release()
            yield

    def _broken_end(self) -> int | None:
        """Return where part of a line begins, which a kill or a full disk has left at the journal's end; else None."""
        content = self._journal.read_bytes() if self._journal.exists() else b""
        return content.rfind(b"\n") + 1 if content and not content.endswith(b"\n") else None

    @property
    def objective(self) -> str | None:
        """The objective of the trials in the journal; None if there are none."""
        studies = self._storage.get_all_studies() if self._journal.exists() else []
        return next((each.user_attrs["search"]["objective"] for each in studies if "search" in each.user_attrs), None)

    def settings(self, variant: str) -> Sequence[Settings]:
        """Return the settings of the trials asked so far, by number, up to the first that lacks some."""
        return [self._settings(trial.params) for trial in itertools.takewhile(self._is_asked, self._trials(variant))]

    def ask(self, variant: str) -> None:
        """Add a trial, or complete the first that lacks settings: queued with Optuna's tools, or left by a kill.

        Raises UsageError if that one has ended.
        """
        trials, number = self._trials(variant), len(self.settings(variant))
        begun = trials[number] if number < len(trials) else None
        if begun is not None and begun.state.is_finished():
            held = f"trial {number} of {variant}, which has ended without some of the search's settings"
            raise self._refused(held, code="search-changed")
        digest = hashlib.sha256(f"{self._search.seed} {variant} {number}".encode()).digest()
        with warnings.catch_warnings():
            # Optuna 4 warns about `constant_liar`, which concurrent jobs need.
            warnings.simplefilter("ignore", self._optuna.exceptions.ExperimentalWarning)
            sampler = self._optuna.samplers.TPESampler(seed=int.from_bytes(digest[:4], "little"), constant_liar=True)
        directions = self._optuna.study.StudyDirection
        direction = directions.MINIMIZE if self._search.objective.endswith(".loss") else directions.MAXIMIZE
        study = self._optuna.create_study(
            storage=self._storage, study_name=variant, direction=direction, load_if_exists=True
        )
        if number == 0:
            study.set_user_attr("search", self._described)
        # Drawn in memory: the journal gets a trial in one write, so that no reader, and no kill, finds a part of it.
        memory = self._optuna.create_study(direction=direction, sampler=sampler)
        memory.add_trials(trials[:number])
        if begun is not None:
            memory.enqueue_trial({**begun.system_attrs.get("fixed_params", {}), **begun.params})
        distributions = dict(self._distributions)
        drawn = memory.ask(distributions).params
        running = self._optuna.trial.TrialState.RUNNING
        if begun is None:
            study.add_trial(self._optuna.trial.create_trial(state=running, params=drawn, distributions=distributions))
            return
        known = self._storage.get_study_id_from_name(variant)
        identity = self._storage.get_trial_id_from_study_id_trial_number(known, number)
        self._storage.set_trial_state_values(identity, running)
        for path in distributions.keys() - begun.params.keys():
            value = distributions[path].to_internal_repr(drawn[path])
            self._storage.set_trial_param(identity, path, value, distributions[path])

    def without_result(self, variant: str) -> Sequence[int]:
        """Return the trials without a result."""
        return [trial.number for trial in self._trials(variant) if not trial.state.is_finished()]

    def tell(self, variant: str, trial: int, value: float | None) -> None:
        """Report the result of a trial to Optuna; None: it failed for good, which is worse than any result."""
        study = self._study(variant)
        if value is None:
            # Not FAIL: the sampler ignores such trials, and would suggest the settings that diverge again and again.
            study.tell(trial, state=self._optuna.trial.TrialState.PRUNED)
        else:
            study.tell(trial, value)

    def _trials(self, variant: str) -> Sequence[optuna.trial.FrozenTrial]:
        try:
            return self._study(variant).get_trials(deepcopy=False) if self._journal.exists() else []
        except KeyError:  # no trial of this variant
            return []

    def _study(self, variant: str) -> optuna.Study:
        """Return the Optuna study of `variant`, without writing to the journal. Raises KeyError if there is none."""
        study = self._optuna.load_study(study_name=variant, storage=self._storage)
        of_journal = study.user_attrs.get("search", self._described)
        # A study that names no objective keeps that of its trials.
        is_named = "objective" in self._search.model_fields_set
        if of_journal != (self._described if is_named else {**self._described, "objective": of_journal["objective"]}):
            held = "trials of another search (its objective or space has changed)"
            raise self._refused(held, code="search-changed")
        return study

    def _refused(self, held: str, code: str) -> UsageError:
        fix = f"move {self._journal.parent} away, or give the study another name"
        return UsageError(f"{self._journal} holds {held}: {fix}", code=code)

    def _is_asked(self, trial: optuna.trial.FrozenTrial) -> bool:
        """Whether it has all settings of the search, and does not wait in Optuna's queue."""
        return trial.params.keys() >= self._search.space.keys() and trial.state != self._optuna.trial.TrialState.WAITING

    @cached_property
    def _described(self) -> dict[str, Any]:
        """What the trials in a journal must share."""
        return self._search.model_dump(mode="json", include={"objective", "space"})

    @cached_property
    def _storage(self) -> optuna.storages.BaseStorage:
        storages = self._optuna.storages
        # absolute: it becomes the target of the lock's link
        backend = storages.journal.JournalFileBackend(str(self._journal.absolute()))
        try:
            journal: optuna.storages.BaseStorage = storages.JournalStorage(backend)
        except ValueError as error:
            raise self._refused(f"a line that is no record of Optuna ({error})", code="journal-broken") from error
        return journal

    @cached_property
    def _distributions(self) -> Mapping[str, optuna.distributions.BaseDistribution]:
        found: dict[str, optuna.distributions.BaseDistribution] = {}
        kinds = self._optuna.distributions
        for path, each in self._search.space.items():
            match each:
                case Choice(values=values):
                    # Optuna accepts few types, so a choice is stored by its index.
                    found[path] = kinds.CategoricalDistribution(range(len(values)))
                case Integers(low=low, high=high):
                    found[path] = kinds.IntDistribution(low, high)
                case Uniform(kind=kind, low=low, high=high):
                    found[path] = kinds.FloatDistribution(low, high, log=kind == "log_uniform")
        return found

    def _settings(self, parameters: Mapping[str, Any]) -> Settings:
        settings: Settings = {}
        for path, each in self._search.space.items():
            value = parameters[path]
            if isinstance(each, Choice):
                value = each.values[value]
            elif isinstance(each, Uniform):
                value = _six_digits(value, each)
            settings[path] = value
        return settings
