"""Whether a run may be gone on with under other settings than it began with."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from typing import Literal

from pydantic import BaseModel

from dist_train.config.sections import Config

_FREE = frozenset(
    {
        "run.name",
        "run.directory",
        "run.max_steps",
        "run.profile_steps",
        "run.resume",
        "run.stop_signal",
        "data.root",
        "data.download",
        "data.loader_workers",
        "comm.verify_every",
        "comm.timeout",
        "evaluation",
        "checkpoint",
        "metrics",
    }
)
_DECIDED_ONCE = frozenset({"batch.micro_size", "precision.threads"})


@dataclass(frozen=True)
class Difference:
    """A setting that differs: its path, and its values in the first and the second configuration."""

    path: str
    before: object
    after: object

    def __str__(self) -> str:
        return f"{self.path}: {self.before} when the run began, {self.after} now"


def differences(before: Config, after: Config) -> list[Difference]:
    """Return the settings that can change a run's result and differ between its beginning and now.

    What a run decided once from its device (`auto`) may be left to `auto` again.
    """
    return [
        difference
        for difference in _differences(before, after, "")
        if not (difference.path in _DECIDED_ONCE and difference.after == "auto")
    ]


def with_decisions(config: Config, decided: Config) -> Config:
    """Return `config` with what was left to `auto` as `decided` has it."""
    if config.batch.micro_size == "auto":
        config = with_micro_size(config, decided.batch.micro_size)
    if config.precision.threads == "auto":
        config = with_threads(config, decided.precision.threads)
    return config


def with_micro_size(config: Config, micro_size: int | Literal["auto"]) -> Config:
    """Return `config` with another `batch.micro_size`."""
    return config.model_copy(update={"batch": config.batch.model_copy(update={"micro_size": micro_size})})


def with_threads(config: Config, threads: int | Literal["auto"]) -> Config:
    """Return `config` with another `precision.threads`."""
    return config.model_copy(update={"precision": config.precision.model_copy(update={"threads": threads})})


def _differences(before: BaseModel, after: BaseModel, prefix: str) -> Iterator[Difference]:
    for name in type(before).model_fields:
        path = f"{prefix}{name}"
        if path in _FREE:
            continue
        old, new = getattr(before, name), getattr(after, name, None)
        if isinstance(old, BaseModel) and isinstance(new, BaseModel) and type(old) is type(new):
            yield from _differences(old, new, f"{path}.")
        elif old != new:
            yield Difference(path, old, new)
