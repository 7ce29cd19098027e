"""Where a search's trials come from: drawn at random, all known beforehand, or asked of Optuna, one after another."""

from __future__ import annotations

import fcntl
import hashlib
import math
import os
import random
import warnings
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from functools import cached_property
from pathlib import Path
from types import MappingProxyType
from typing import TYPE_CHECKING, Any

from dist_train.outcome import UsageError
from dist_train.sweep.study_file import Choice, Distribution, Integers, Search, Settings, Uniform

if TYPE_CHECKING:
    import optuna


def drawn_settings(search: Search, variant: str, trial: int) -> Settings:
    """Return the settings of a random trial: each a function of (seed, variant, trial, path) alone."""
    # bandit takes every generator for one of secrets
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
            return _short(math.exp(source.uniform(math.log(low), math.log(high))), distribution)
    return _short(source.uniform(distribution.low, distribution.high), distribution)


def _short(value: float, distribution: Uniform) -> float:
    """Return `value` with six digits: the run is what it says, and people can copy it."""
    return min(distribution.high, max(distribution.low, float(f"{value:.6g}")))


class OptunaTrials:
    """The trials of a study by Optuna, in one journal that several sweeps, on several nodes, may use at once.

    Each variant has an Optuna study of its own. A trial is asked with a sampler seeded by its number, so that what
    it suggests is a function of the results so far, through kills and resumes.
    """

    def __init__(self, search: Search, journal: Path) -> None:
        """Use the file `journal`, which the first trial makes. Raises UsageError without Optuna."""
        try:
            import optuna
        except ImportError as error:
            raise UsageError(
                "search.method is optuna, but Optuna is not installed: pip install 'dist_train[search]'",
                code="optuna-missing",
            ) from error
        self._optuna = optuna
        self._search = search
        self._journal = journal
        optuna.logging.set_verbosity(optuna.logging.WARNING)

    @contextmanager
    def locked(self) -> Iterator[None]:
        """Keep other sweeps from asking, within the block."""
        self._journal.parent.mkdir(mode=0o700, parents=True, exist_ok=True)
        descriptor = os.open(self._journal.with_suffix(".lock"), os.O_RDWR | os.O_CREAT | os.O_CLOEXEC, 0o600)
        try:
            fcntl.flock(descriptor, fcntl.LOCK_EX)
            yield
        finally:
            os.close(descriptor)

    def settings(self, variant: str) -> Sequence[Settings]:
        """Return the settings of the trials asked so far, by number."""
        return [self._settings(trial.params) for trial in self._trials(variant)]

    def ask(self, variant: str) -> None:
        """Add a trial."""
        number = len(self._trials(variant))
        digest = hashlib.sha256(f"{self._search.seed} {variant} {number}".encode()).digest()
        with warnings.catch_warnings():
            # of Optuna 4, for `constant_liar`, which jobs that run side by side need
            warnings.simplefilter("ignore", self._optuna.exceptions.ExperimentalWarning)
            sampler = self._optuna.samplers.TPESampler(seed=int.from_bytes(digest[:4], "little"), constant_liar=True)
        self._study(variant, sampler).ask(dict(self._distributions))

    def untold(self, variant: str) -> Sequence[int]:
        """Return the trials whose result Optuna does not know."""
        return [trial.number for trial in self._trials(variant) if not trial.state.is_finished()]

    def tell(self, variant: str, trial: int, value: float | None) -> None:
        """Give Optuna the result of a trial; None: it has failed for good."""
        study = self._study(variant)
        if value is None:
            study.tell(trial, state=self._optuna.trial.TrialState.FAIL)
        else:
            study.tell(trial, value)

    def _trials(self, variant: str) -> Sequence[optuna.trial.FrozenTrial]:
        return self._study(variant).get_trials(deepcopy=False) if self._journal.exists() else []

    def _study(self, variant: str, sampler: optuna.samplers.BaseSampler | None = None) -> optuna.Study:
        return self._optuna.create_study(
            storage=self._storage,
            study_name=variant,
            direction="minimize" if self._search.objective.endswith(".loss") else "maximize",
            sampler=sampler,
            load_if_exists=True,
        )

    @cached_property
    def _storage(self) -> optuna.storages.BaseStorage:
        storages = self._optuna.storages
        journal: optuna.storages.BaseStorage = storages.JournalStorage(
            storages.journal.JournalFileBackend(str(self._journal))
        )
        return journal

    @cached_property
    def _distributions(self) -> Mapping[str, optuna.distributions.BaseDistribution]:
        found: dict[str, optuna.distributions.BaseDistribution] = {}
        kinds = self._optuna.distributions
        for path, each in self._search.space.items():
            match each:
                case Choice(values=values):
                    # Optuna takes few types: a choice is known by its place.
                    found[path] = kinds.CategoricalDistribution(range(len(values)))
                case Integers(low=low, high=high):
                    found[path] = kinds.IntDistribution(low, high)
                case Uniform(kind=kind, low=low, high=high):
                    found[path] = kinds.FloatDistribution(low, high, log=kind == "log_uniform")
        return MappingProxyType(found)

    def _settings(self, parameters: Mapping[str, Any]) -> Settings:
        settings: Settings = {}
        for path, each in self._search.space.items():
            value = parameters[path]
            match each:
                case Choice(values=values):
                    settings[path] = values[value]
                case Uniform():
                    settings[path] = _short(value, each)
                case _:
                    settings[path] = value
        return settings
