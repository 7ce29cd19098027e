"""TensorBoard's files, read back by TensorBoard."""

from __future__ import annotations

import math
import sys
from dataclasses import replace
from pathlib import Path

import pytest

from dist_train.cluster.launch import is_installed
from dist_train.monitoring.observers import TensorBoard, check_installed
from dist_train.outcome import UsageError
from dist_train.rundir.records import (
    EvaluationRecord,
    EventRecord,
    Measurement,
    Outcome,
    RankMeasurement,
    RunFacts,
    StepParts,
    TrainRecord,
)
from tests.raising import raises
from tests.unit import records

pytest.importorskip("tensorboard")
FACTS = RunFacts("small", Path("run"), "m", "d", 9, 26, 6, 5, 1, 8, 3, 2.0, "none", 0, "none")
OUTCOME = Outcome("finished", "", 0, 8, 2.0, 1.0, None, None, None, None, None)
RANK = RankMeasurement(0.4, 0.1, 2e9, math.nan, math.nan, math.nan)


def train(step: int, loss: float) -> TrainRecord:
    return records.train(
        step,
        epoch=step / 3,
        loss=loss,
        learning_rate=0.25,
        noise_amplitude=0.125,
        gradient_norm=2.0,
        samples_per_second=52.0,
        time=1000.0 + step,
    )


def write(directory: Path, steps: range, loss: float) -> TensorBoard:
    """Write what a launch writes that begins at `steps`."""
    board = TensorBoard(directory)
    board.begin(replace(FACTS, start_step=steps.start - 1))
    for step in steps:
        board.record(train(step, loss))
        parts = StepParts(0.5, 0.25, 0.125, 0.0625, 0.0, 1.0)
        board.measurement(Measurement(step, 1000.0 + step, 0.5, parts, 4.0, 1.5, (RANK,)))
    return board


def read(directory: Path) -> dict[str, list[tuple[int, float]]]:
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    accumulator = EventAccumulator(str(directory / "tensorboard"))
    accumulator.Reload()
    tags = accumulator.Tags()["scalars"]
    return {tag: [(point.step, point.value) for point in accumulator.Scalars(tag)] for tag in tags}


def test_every_number_is_under_its_own_name(tmp_path: Path) -> None:
    board = write(tmp_path, range(1, 4), 2.0)
    for split, loss, accuracy in (("train", 1.5, 0.75), ("test", 1.75, 0.625)):
        board.record(EvaluationRecord(3, 1.0, split, loss, accuracy, 10, 1003.0))
    board.record(EventRecord(3, "checkpoint", 1003.0, {}))
    board.end(OUTCOME)
    numbers = read(tmp_path)
    assert numbers["loss/batch"] == [(1, 2.0), (2, 2.0), (3, 2.0)]
    assert {tag: points[-1] for tag, points in numbers.items()} == {
        "loss/batch": (3, 2.0),
        "loss/train": (3, 1.5),
        "loss/test": (3, 1.75),
        "accuracy/batch": (3, 0.5),
        "accuracy/train": (3, 0.75),
        "accuracy/test": (3, 0.625),
        "optimizer/learning_rate": (3, 0.25),
        "optimizer/noise_amplitude": (3, 0.125),
        "optimizer/gradient_norm": (3, 2.0),
        "speed/samples_per_second": (3, 52.0),
        "speed/step_seconds": (3, 0.5),
        "weights/norm": (3, 4.0),
        "weights/distance_from_initial": (3, 1.5),
        "step_parts/data_wait": (3, 0.5),
        "step_parts/forward_backward": (3, 0.25),
        "step_parts/perturb_restore": (3, 0.125),
        "step_parts/allreduce_wait": (3, 0.0625),
        "step_parts/optimizer": (3, 0.0),
        "step_parts/checkpoint_stall": (3, 1.0),
    }


def test_a_run_that_goes_on_from_an_earlier_step_shows_no_step_twice(tmp_path: Path) -> None:
    killed = write(tmp_path, range(1, 7), 2.0)
    killed.sync()
    write(tmp_path, range(5, 9), 1.0).end(OUTCOME)
    numbers = read(tmp_path)
    expected = [(step, 2.0 if step <= 4 else 1.0) for step in range(1, 9)]
    assert numbers["loss/batch"] == expected
    assert [step for step, _ in numbers["weights/norm"]] == list(range(1, 9))
    killed.end(OUTCOME)


def test_what_was_synced_is_there_although_the_run_goes_on(tmp_path: Path) -> None:
    board = write(tmp_path, range(1, 3), 2.0)
    board.sync()
    assert read(tmp_path)["loss/batch"] == [(1, 2.0), (2, 2.0)]
    board.end(OUTCOME)
    board.end(OUTCOME)


@pytest.mark.parametrize("name", ["tensorboard", "trackio", "wandb", "mlflow"])
def test_without_the_package_the_error_names_the_fix(monkeypatch: pytest.MonkeyPatch, name: str) -> None:
    check_installed("tensorboard")
    monkeypatch.delitem(sys.modules, "torch.utils.tensorboard", raising=False)
    for module in [module for module in sys.modules if module.split(".")[0] == name]:
        monkeypatch.delitem(sys.modules, module)
    monkeypatch.setitem(sys.modules, name, None)
    with raises(UsageError, f"{name}-missing") as refused:
        check_installed(name)
    assert f"pip install 'dist_train[{name}]'" in str(refused.value)


def test_a_library_that_breaks_while_it_is_imported_is_named(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "trackio.py").write_text("raise AttributeError('module numpy has\\nno attribute float_')\n")
    monkeypatch.syspath_prepend(tmp_path)
    monkeypatch.delitem(sys.modules, "trackio", raising=False)
    with raises(UsageError, "trackio-missing") as refused:
        check_installed("trackio")
    assert "(AttributeError: module numpy has no attribute float_)" in str(refused.value)


def test_a_folder_with_the_name_of_a_package_is_no_package(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "wandb").mkdir()  # as runs with W&B leave it in the current folder
    monkeypatch.setattr(sys, "path", [str(tmp_path)])
    for module in [module for module in sys.modules if module.split(".")[0] == "wandb"]:
        monkeypatch.delitem(sys.modules, module)
    assert not is_installed("wandb")
    with raises(UsageError, "wandb-missing"):
        check_installed("wandb")
    del sys.modules["wandb"]
