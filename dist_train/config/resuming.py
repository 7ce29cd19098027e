"""Resuming runs: which settings a resume may change, and the former names of settings."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from typing import Any, Literal

from pydantic import BaseModel

from dist_train.config.sections import Config

_CHANGEABLE = frozenset(
    {
        "run.name",
        "run.directory",
        "run.max_steps",
        "run.profile_steps",
        "run.resume",
        "run.stop_signal",
        "batch.dealing",
        "data.root",
        "data.download",
        "data.loader_workers",
        "precision.cuda_graphs",
        "comm.engine",
        "comm.verify_every",
        "comm.timeout",
        "launch",
        "evaluation",
        "early_stopping.patience",
        "checkpoint",
        "metrics",
    }
)
LENGTHS = ("run.max_steps", "early_stopping.patience")
"""Settings that a resume may change although they decide after how many updates a run has finished."""

_DECIDED_ONCE = ("run.device", "batch.micro_size", "precision.threads", "precision.deterministic")


@dataclass(frozen=True)
class Difference:
    """A setting that differs: its path, and its values in the first and the second configuration."""

    path: str
    before: object
    after: object

    def __str__(self) -> str:
        return f"{self.path}: {self.before} when the run began, {self.after} now"


def differences(before: Config, after: Config) -> list[Difference]:
    """Return the settings that differ between a run's beginning and now, and can change its result.

    A setting that a run decided once from `auto` may be `auto` again, or have been `auto` in a run of an older version.
    """
    return [
        difference
        for difference in _differences(before, after, "")
        if difference.path not in _DECIDED_ONCE or "auto" not in (difference.before, difference.after)
    ]


def differing_lengths(before: Config, after: Config) -> list[Difference]:
    """Return the settings among `LENGTHS` that differ."""
    found = (Difference(path, before.value(path), after.value(path)) for path in LENGTHS)
    return [difference for difference in found if difference.before != difference.after]


def may_change(path: str) -> bool:
    """Whether a resume may change the setting at the dotted `path`."""
    return any(path == each or path.startswith(f"{each}.") for each in _CHANGEABLE)


def with_decisions(config: Config, decided: Config) -> Config:
    """Return `config` with the values of `decided` for settings that are `auto`."""
    for path in _DECIDED_ONCE:
        if config.value(path) == "auto":
            config = with_setting(config, path, decided.value(path))
    return config


def with_device(config: Config, device: Literal["cpu", "cuda"]) -> Config:
    """Return `config` with `device`; `precision.deterministic`, if `auto`, is decided by it."""
    config = with_setting(config, "run.device", device)
    if config.precision.deterministic != "auto":
        return config
    # exact sums are bit-identical only if the kernels before them are
    deterministic = device == "cuda" and config.comm.is_exact
    return with_setting(config, "precision.deterministic", deterministic)


def with_setting(config: Config, path: str, value: object) -> Config:
    """Return `config` with the setting at the dotted `path` set to `value`, unchecked."""
    section, name = path.split(".")
    changed = getattr(config, section).model_copy(update={name: value})
    return config.model_copy(update={section: changed})


def _differences(before: BaseModel, after: BaseModel, prefix: str) -> Iterator[Difference]:
    for name in type(before).model_fields:
        path = f"{prefix}{name}"
        if path in _CHANGEABLE:
            continue
        old, new = getattr(before, name), getattr(after, name, None)
        if isinstance(old, BaseModel) and isinstance(new, BaseModel) and type(old) is type(new):
            yield from _differences(old, new, f"{path}.")
        elif old != new:
            yield Difference(path, old, new)


SAVED = "the checkpoint, which another version of dist_train may have saved (status.json names it)"
"""How messages call the settings in a checkpoint that cannot be read."""

STREAM_OF_A_RANK = "worker"
"""Name of the random stream of one rank's noise. Renaming it would change the noise, also that of resumed runs."""


def with_present_names(settings: Mapping[str, Any], note: Callable[[str], object]) -> Mapping[str, Any]:
    """Return nested `settings` with present names and values for former ones; `note` gets a sentence about each."""
    changed = dict(settings)
    noise, metrics = settings.get("noise"), settings.get("metrics")
    if isinstance(noise, Mapping) and noise.get("sharing") == "worker":
        changed["noise"] = {**noise, "sharing": "rank"}
        note("noise.sharing=worker is called rank now")
    if isinstance(metrics, Mapping):
        if "workers" in metrics and "ranks" not in metrics:
            metrics = {"ranks" if name == "workers" else name: value for name, value in metrics.items()}
            note("metrics.workers is called metrics.ranks now")
        changed["metrics"] = _with_tensorboard_as_logger(metrics, note)
    return changed


def _with_tensorboard_as_logger(metrics: Mapping[str, Any], note: Callable[[str], object]) -> Mapping[str, Any]:
    """Return `metrics` with the former setting `tensorboard: true` as a logger."""
    others = {name: value for name, value in metrics.items() if name != "tensorboard"}
    loggers = metrics.get("loggers", [])
    if metrics.get("tensorboard") is False:
        return others
    if metrics.get("tensorboard") is not True or not isinstance(loggers, list | tuple):
        return metrics
    note("metrics.tensorboard is metrics.loggers=[{name: tensorboard}] now")
    logger = {"name": "tensorboard"}
    is_named = any(isinstance(each, Mapping) and each.get("name") == "tensorboard" for each in loggers)
    return {**others, "loggers": [*loggers] if is_named else [logger, *loggers]}
