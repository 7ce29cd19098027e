"""Early stopping: a function of the evaluations so far, which a checkpoint holds."""

from __future__ import annotations

import math
from pathlib import Path

import pytest

from dist_train.checkpoint.files import list_checkpoints
from dist_train.checkpoint.state import Progress
from dist_train.cluster.communicator import SingleProcess
from dist_train.config import Config
from dist_train.config.parts import EarlyStoppingSettings
from dist_train.training.stopping import note_evaluation, why_stop_early
from tests.unit.small_trainers import build_trainer, small_config


def stopping(patience: int | None, min_delta: float = 0.0, metric: str = "test.accuracy") -> Config:
    settings = EarlyStoppingSettings(patience=patience, min_delta=min_delta, metric=metric)
    return small_config().model_copy(update={"early_stopping": settings})


def stopped_at(values: list[float], patience: int | None, min_delta: float = 0.0, metric: str = "test.accuracy") -> int:
    """Return the evaluation, from 1, at which a run with these `values` stops; 0 where it does not."""
    config, progress = stopping(patience, min_delta, metric), Progress()
    for number, value in enumerate(values, start=1):
        progress.step = number
        note_evaluation(config, progress, {metric: value, "train.loss": 0.0})
        if why_stop_early(config, progress):
            return number
    return 0


@pytest.mark.parametrize(
    ("values", "patience", "expected"),
    [
        ([0.1, 0.2, 0.3, 0.4], 1, 0),
        ([0.1, 0.2, 0.2], 1, 3),
        ([0.3, 0.2, 0.1, 0.4], 3, 0),
        ([0.3, 0.2, 0.1, 0.3], 3, 4),
        ([0.1, math.nan, math.nan, 0.2], 2, 3),
        ([0.1] * 9, None, 0),
    ],
)
def test_it_ends_after_so_many_evaluations_without_an_improvement(
    values: list[float], patience: int | None, expected: int
) -> None:
    assert stopped_at(values, patience) == expected


@pytest.mark.parametrize("split", ["test", "validation-averaged"])
def test_an_accuracy_beside_a_loss_that_is_not_finite_is_no_improvement(split: str) -> None:
    config, progress = stopping(2, metric=f"{split}.accuracy"), Progress()
    for loss in (math.nan, math.inf):
        assert not why_stop_early(config, progress)
        note_evaluation(config, progress, {f"{split}.accuracy": 0.1, f"{split}.loss": loss, "train.loss": 0.0})
    assert progress.stopping_best is None
    assert why_stop_early(config, progress)
    note_evaluation(config, progress, {f"{split}.accuracy": 0.1, f"{split}.loss": 2.3, "train.loss": math.nan})
    assert progress.stopping_best == 0.1


def test_a_loss_improves_by_falling_and_only_by_more_than_min_delta() -> None:
    assert stopped_at([3.0, 2.0, 1.0, 1.0], 1, metric="validation.loss") == 4
    assert stopped_at([3.0, 2.0, 1.95, 1.91], 2, min_delta=0.1, metric="validation.loss") == 4


def test_what_it_has_seen_is_in_the_progress_and_more_patience_continues() -> None:
    progress = Progress(step=3, stopping_best=0.5, stopping_waited=2)
    assert "test.accuracy" in why_stop_early(stopping(2), progress)
    assert not why_stop_early(stopping(3), progress)


@pytest.mark.parametrize(("metric", "best"), [("test.accuracy", "(best 100.00 %)"), ("test.loss", "(best 1)")])
def test_its_reason_has_the_best_value_in_the_metric_s_unit(metric: str, best: str) -> None:
    assert best in why_stop_early(stopping(1, metric=metric), Progress(stopping_best=1.0, stopping_waited=1))


@pytest.mark.parametrize("is_asked_to_stop", [False, True])
def test_a_run_that_stops_early_is_saved_and_finished(tmp_path: Path, is_asked_to_stop: bool) -> None:
    config = small_config(
        run={"epochs": 5},
        early_stopping={"patience": 1, "metric": "test.accuracy", "min_delta": 1.0},
        checkpoint={"every_epochs": 0},
    )
    trainer = build_trainer(config, tmp_path, SingleProcess())
    while trainer.progress.step < 5:
        trainer.advance()
    if is_asked_to_stop:
        trainer.stop.request("SIGTERM")
    trainer.run()
    assert [file.step for file in list_checkpoints(tmp_path / "checkpoints")] == [6]


def test_an_evaluation_that_a_longer_run_would_not_have_does_not_count(tmp_path: Path) -> None:
    stops = {"patience": 9, "metric": "test.accuracy", "min_delta": 1.0}
    trainer = build_trainer(small_config(run={"max_steps": 4}, early_stopping=stops), tmp_path, SingleProcess())
    trainer.run()
    assert (trainer.progress.evaluated_step, trainer.progress.stopping_waited) == (4, 0)
