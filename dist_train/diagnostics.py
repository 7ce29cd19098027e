"""Short trainings of which only the records are needed: learning-rate range tests, and replays of a run's updates."""

from __future__ import annotations

import math
import os
import shutil
import sys
import tempfile
from collections.abc import Mapping
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path

import torch

from dist_train.api import Overrides, Run, Target, load_run, splits_of
from dist_train.checkpoint.files import read_checkpoint
from dist_train.cluster.launch import current_launch
from dist_train.config import Config, ScheduleSettings, parse_config
from dist_train.config.loading import with_overrides
from dist_train.config.resuming import SAVED, with_setting
from dist_train.data.plan import BatchPlan
from dist_train.launching.run import check_is_config, train
from dist_train.outcome import CodedError, DivergedError, ExitCode, UsageError
from dist_train.report.drawing import RangeTest, read_range_test, write_range_test
from dist_train.rundir.paths import RANGE_TEST, RunDirectory
from dist_train.rundir.records import EventRecord, TrainRecord
from dist_train.rundir.status import record_end
from dist_train.training.compute import restoring_torch

_ONLY_RECORDS: Mapping[str, object] = {
    "early_stopping.patience": None,
    "checkpoint": {"every_epochs": 0, "every_steps": None, "fallback_directory": None},
    "evaluation": {"every_epochs": 0, "train_samples": 0},
    "metrics": {"enabled": False, "loggers": []},
}
"""Overrides of a run of which only the training records are needed."""


def learning_rate_range(config: Config, low: float, high: float, updates: int, run_directory: Path | str) -> RangeTest:
    """Train as `config` says with a rate that rises exponentially from `low` to `high` over `updates` updates.

    Every rank of a launch calls it. The result ends before the first loss that is not finite; it is also written into
    `run_directory`, as lr_range.csv, .json and .png.

    Examples:
        >>> config = dist_train.load_config("dist_train:configs/smoke.yaml")
        >>> test = dist_train.learning_rate_range(config, 0.001, 1, updates=3, run_directory="runs/range")
        >>> len(test.rates), len(test.losses)
        (3, 3)

    Raises:
        UsageError: the rates do not rise, or `train` refuses the settings.
    """
    check_is_config(config)
    low, high, updates = float(low), float(high), int(updates)  # NumPy's have another text
    if not (0 < low < high and high / low < math.inf) or updates < 2:
        raise UsageError(
            f"the rate must rise, from above 0, in 2 updates or more: not from {low:g} to {high:g} in {updates}",
            code="option-range",
        )
    with restoring_torch():  # without keeping the data: `train` opens them again
        samples = len(splits_of(with_setting(config, "data.normalize", False)).train)
    steps_per_epoch = BatchPlan(config.batch.global_size, 1).steps_per_epoch(samples)
    epochs = -(-updates // steps_per_epoch)
    # The schedule rises on to the end of the last epoch, where the rate must still be a number.
    least = 2 + math.floor(math.log(high / low, sys.float_info.max) * epochs * steps_per_epoch)
    if updates < least:
        raise UsageError(
            f"{updates} updates are too few where an epoch has {steps_per_epoch}: set --updates to {least} or more",
            code="option-range",
        )
    ratio = (high / low) ** (epochs * steps_per_epoch / (updates - 1))
    overrides: dict[str, object] = {
        **_ONLY_RECORDS,
        "run.name": f"{config.run.name.removesuffix(RANGE_TEST)}{RANGE_TEST}",  # by which reports know it
        "run.epochs": epochs,
        "run.max_steps": updates,
        "run.resume": "auto",  # not from a checkpoint that the configuration names
        "optimizer.learning_rate": low,
        "schedule": ScheduleSettings(decay="exponential", final_fraction=ratio).model_dump(mode="json"),
        "averaging.kind": "none",
        "batch.schedule": [],
        "metrics.every_steps": 1,
    }
    tested = parse_config(with_overrides(config.model_dump(mode="json"), overrides), source="the range test")
    directory = RunDirectory(Path(run_directory))
    try:
        train(tested, directory.root)
    except DivergedError:  # the result is what was measured before
        if current_launch().rank == 0:
            record_end(directory.status, "finished", ExitCode.FINISHED, "the loss was no longer finite")
    except UsageError as error:
        if error.code != "settings-changed":
            raise
        raise UsageError(
            f"{directory.root} holds a range test with other settings, or other --from, --to or --updates: choose "
            f"another folder with --run-dir DIR",
            code="settings-changed",
        ) from error
    test = read_range_test(directory)
    if current_launch().rank == 0:
        write_range_test(test, directory)
    return test


_COMPARED = ("loss", "accuracy", "learning_rate", "noise_amplitude", "gradient_norm")


@dataclass(frozen=True)
class Replay:
    """A replayed update: the values that the run recorded of it, and those of the replay, by name.

    `weights_agree`: whether the weights after it equal those of the run's checkpoint; None if there is no such one.
    """

    step: int
    begun_at: int
    recorded: Mapping[str, float]
    replayed: Mapping[str, float]
    weights_agree: bool | None

    @property
    def agrees(self) -> bool:
        """Whether everything is bit-identical."""
        return self.recorded == self.replayed and self.weights_agree is not False


def replay(path: Target, step: int, overrides: Overrides = ()) -> Replay:
    """Repeat update `step` of a run, from the checkpoint before it or from the beginning; the run is only read.

    `overrides`: as for `load_run`.

    Every rank of a launch calls it, on any number of ranks. Only rank 0 compares: on the others `recorded` and
    `replayed` are empty.

    Examples:
        >>> again = dist_train.replay("runs/demo", 20)
        >>> again.begun_at, again.agrees
        (0, True)

    Raises:
        UsageError: the run has not recorded that update, or no longer has a checkpoint from which to repeat it.
    """
    run = load_run(path, overrides)
    recorded = _update(run, step)
    before = [each for each in run.steps if each < step]
    begun_at = before[-1] if before else 0
    start = run.directory.checkpoint(begun_at) if before else None
    _check_replayable(run, step, begun_at)
    # Read before the overrides, so that a setting's former name does not survive them.
    begun = run.config
    if start:
        begun = parse_config(with_overrides(read_checkpoint(start).config, run.overrides), source=SAVED)
    settings = begun.model_dump(mode="json")
    changes = {
        **_ONLY_RECORDS,
        "run.max_steps": step,
        "run.resume": str(start.absolute()) if start else "never",
        "run.profile_steps": 0,
        "run.epochs": _value_at(run, step, "run.epochs", "lengthened"),
        "batch.micro_size": begun.batch.micro_size if start else _value_at(run, 1, "batch.micro_size", "micro_size"),
    }
    config = parse_config(with_overrides(settings, changes), source="the run")
    launch = current_launch()
    # The same folder on all ranks of a node; a single process has its own.
    own = f"-{os.getpid()}" if launch.size == 1 else ""
    place = RunDirectory(Path(tempfile.gettempdir()) / f"dist_train-replay-{run.directory.run_id()}-{step}{own}")
    is_ours = launch.rank == 0
    try:
        try:
            place.create()  # nodes do not share it, and each rank has a log there
            train(config, place.root)
        except DivergedError as error:
            # Otherwise the update is recorded: only the evaluation at the end is not finite.
            if error.code == "step-not-finite":
                raise
        if not is_ours:  # rank 0 may have removed the folder already, or another node has its files
            return Replay(step, begun_at, {}, {}, None)
        again = load_run(place.root)
        replayed = _update(again, step)
        weights_agree = None
        if step in run.steps and step in again.steps:
            weights_agree = _same_weights(run.checkpoint(step), again.checkpoint(step))
    except CodedError as error:
        is_ours = is_ours and error.code != "run-in-use"  # another launch replays the same update
        raise
    finally:
        if is_ours or not place.lock.exists():  # without the lock it is not the folder of a rank 0
            shutil.rmtree(place.root, ignore_errors=True)
    return Replay(step, begun_at, recorded, replayed, weights_agree)


def _events(run: Run, name: str) -> list[EventRecord]:
    return [each for each in run.records if isinstance(each, EventRecord) and each.event == name]


def _value_at(run: Run, step: int, setting: str, event: str) -> object:
    """Return the value of `setting` at update `step`: the run has recorded an `event` where it has changed it since."""
    later = (each.details["before"] for each in _events(run, event) if each.step >= step)
    return next(later, run.config.value(setting))


_BEFORE_START = ("corrupt_checkpoint", "requeued")  # events that may precede what a run begins with


def _check_replayable(run: Run, step: int, begun_at: int) -> None:
    """Raise UsageError unless one launch from `begun_at`, a checkpoint or 0, makes the run's updates up to `step`."""
    config, reason = run.config, ""
    is_stretched = (config.schedule.decay, config.noise.schedule.kind) != ("constant", "constant")
    # the checkpoint of an unfinished run cannot be lengthened
    if (is_stretched or begun_at) and any(begun_at < each.step < step for each in _events(run, "lengthened")):
        reason = "the run was lengthened since"
    if any(max(begun_at, 1) <= each.step < step for each in _events(run, "micro_size")):
        reason = "its micro-batches were halved since, when memory ran out"
    since_start = (each for each in run.records if not (isinstance(each, EventRecord) and each.event in _BEFORE_START))
    first = next(since_start, None)
    if not begun_at and isinstance(first, EventRecord) and first.event == "resumed":
        reason = "the run began from a checkpoint of another one"
    if reason:
        raise UsageError(
            f"{run.directory.root} has no checkpoint from which to repeat update {step}: {reason}; choose an update "
            f"after one of its checkpoints (checkpoint.keep says how many a run keeps)",
            code="step-not-replayable",
        )


def _update(run: Run, step: int) -> dict[str, float]:
    with suppress(FileNotFoundError):
        for record in run.records:
            if isinstance(record, TrainRecord) and record.step == step:
                return {name: float(getattr(record, name)) for name in _COMPARED}
    raise UsageError(
        f"{run.directory.root} has no record of update {step}: choose one of its metrics.jsonl",
        code="step-not-recorded",
    )


def _same_weights(one: Path, other: Path) -> bool:
    first, second = (read_checkpoint(path).model for path in (one, other))
    return first.keys() == second.keys() and all(torch.equal(first[name], second[name]) for name in first)
