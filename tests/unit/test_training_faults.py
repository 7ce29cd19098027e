"""Faults that a run can meet, and what it makes of them."""

from __future__ import annotations

import errno
import os
import time
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Any
from unittest.mock import Mock

import pytest
import torch
from torch import nn

from dist_train.checkpoint import writer
from dist_train.checkpoint.files import list_checkpoints, read_checkpoint, write_checkpoint
from dist_train.cli.main import main
from dist_train.cluster.communicator import SingleProcess
from dist_train.models.norms import norm_modules
from dist_train.outcome import DivergedError, ExitCode, FaultError, PeerFailedError, StoppedError, UsageError
from dist_train.rundir.metrics_file import read_records
from dist_train.rundir.paths import RunDirectory
from dist_train.rundir.records import EventRecord
from dist_train.rundir.status import StatusFile
from dist_train.training.evaluation import evaluate_stored
from tests.raising import raises
from tests.unit.simulated_ranks import SimulatedRanks, on_ranks, results
from tests.unit.small_trainers import build_trainer, small_config
from tests.unit.test_cli_commands import write_config
from tests.unit.test_training_step import Limited, take


def test_statistics_out_of_range_are_a_divergence(tmp_path: Path) -> None:
    trainer = build_trainer(small_config(), tmp_path, SingleProcess())
    with torch.no_grad():
        trainer.network.get_parameter("convolution1_1.weight").mul_(1e7)
    with raises(DivergedError, "step-not-finite"):
        take(trainer)
    assert all(norm.running_var.min() >= 0 for norm in trainer.training_step.statistics.norms)


def sizes_at_norms(network: nn.Module) -> list[int]:
    """Return a list to which each pass that collects statistics adds, at each norm, the number of its samples."""
    sizes: list[int] = []

    def note(norm: nn.Module, inputs: tuple[torch.Tensor, ...]) -> None:
        if norm.training:
            sizes.append(len(inputs[0]))

    for norm in norm_modules(network):
        norm.register_forward_pre_hook(note)
    return sizes


@pytest.mark.parametrize(
    "sections",
    [
        {"batch": {"global_size": 33, "micro_size": "auto"}},
        {"model": {"norm_samples": 31}},
        {"batch": {"global_size": 2, "micro_size": "auto"}},
    ],
)
def test_no_micro_batch_of_one_sample_reaches_a_norm(tmp_path: Path, sections: dict[str, Any]) -> None:
    trainer = build_trainer(small_config(run={"max_steps": 2}, **sections), tmp_path, SingleProcess())
    sizes = sizes_at_norms(trainer.network)
    trainer.run()
    assert min(sizes) >= 2


def test_shrinking_leaves_no_single_sample(tmp_path: Path) -> None:
    trainer = build_trainer(
        small_config(batch={"global_size": 34, "micro_size": 22}),
        tmp_path,
        SingleProcess(),
    )
    trainer.training_step = replace(trainer.training_step, model=Limited(trainer.network, 12))
    trainer.may_shrink = True
    sizes = sizes_at_norms(trainer.network)
    trainer.run()
    assert min(sizes) >= 2


def test_status_that_cannot_be_written_does_not_stop(tmp_path: Path) -> None:
    (tmp_path / "gone").mkdir()
    file = StatusFile(tmp_path / "gone" / "status.json", 1)
    (tmp_path / "gone").rmdir()
    file.progress(step=1)
    file.change("running")


@pytest.mark.parametrize("background", [True, False])
@pytest.mark.parametrize("every_steps", [None, 1], ids=["at the end", "at a stop"])
def test_a_last_checkpoint_that_fails_is_a_fault(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, background: bool, every_steps: int | None
) -> None:
    def fail(*_: object) -> None:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(writer, "write_checkpoint", fail)
    settings = {"background": background, "every_steps": every_steps}
    trainer = build_trainer(small_config(checkpoint=settings), tmp_path, SingleProcess())
    if every_steps:
        trainer.stop.request("SIGTERM")
    with raises(FaultError, "checkpoint-not-written"):
        trainer.run()


def test_a_last_checkpoint_that_fails_ends_all_ranks_with_one_message(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def fail(*_: object) -> None:
        raise OSError(28, "No space left on device")

    def stop(comm: SimulatedRanks) -> None:
        trainer = build_trainer(small_config(), tmp_path, comm)
        trainer.stop.request("SIGTERM")
        trainer.run()

    monkeypatch.setattr(writer, "write_checkpoint", fail)
    first, second = on_ranks(2, stop)
    assert isinstance(first, FaultError)
    assert isinstance(second, PeerFailedError)
    assert second.exit_code == ExitCode.FAULT


def test_a_configuration_that_rank_0_cannot_write_ends_all_ranks_with_one_message(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(RunDirectory, "save_config", Mock(side_effect=OSError(errno.ENOSPC, "no space")))
    first, second = on_ranks(2, partial(build_trainer, small_config(), tmp_path))
    assert isinstance(first, OSError)
    assert isinstance(second, PeerFailedError), "not a lost rank, which it would report"


@pytest.mark.parametrize("ending", [StoppedError, DivergedError])
def test_no_rank_leaves_before_the_checkpoint_is_on_disk(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, ending: type[Exception]
) -> None:
    def slowly(*arguments: Any) -> Any:
        time.sleep(1.5)
        return write_checkpoint(*arguments)

    monkeypatch.setattr(writer, "write_checkpoint", slowly)
    config = small_config(checkpoint={"every_steps": 1})
    if ending is DivergedError:
        rate = {"learning_rate": 1e30}
        config = small_config(checkpoint={"every_steps": 1}, model={"norm": "none", "width": 0.25}, optimizer=rate)

    def stop(comm: SimulatedRanks) -> list[str]:
        trainer = build_trainer(config, tmp_path, comm)
        if ending is StoppedError:
            trainer.stop.request("SIGTERM")
        with pytest.raises(ending):
            trainer.run()
        return [file.path.name for file in list_checkpoints(tmp_path / "checkpoints")]

    assert results(2, stop) == [["step-00000001.pt"]] * 2


def test_overrides_may_follow_an_option(tmp_path: Path) -> None:
    config = write_config(tmp_path)
    assert main(["config", "run-directory", config, "--run-dir", "x", "run.seed=3"]) == 0


@pytest.mark.parametrize(("keep_best", "kept"), [(True, [6, 24]), (False, [24])])
def test_keep_best_keeps_the_best_of_what_was_saved(tmp_path: Path, keep_best: bool, kept: list[int]) -> None:
    config = small_config(run={"epochs": 8}, checkpoint={"every_epochs": 2, "keep": 1, "keep_best": keep_best})
    accuracies = iter([0.1, 0.8, 0.9, 0.2, 0.1, 0.3, 0.1, 0.1])
    trainer = build_trainer(config, tmp_path, SingleProcess())
    note = trainer.progress.note_accuracy

    def told(split: str, accuracy: float) -> None:
        note(split, next(accuracies) if split == "test" else accuracy)

    trainer.progress.note_accuracy = told  # type: ignore[method-assign]  # known accuracies
    trainer.run()
    assert [f.step for f in list_checkpoints(tmp_path / "checkpoints")] == kept


def test_an_evaluation_decides_its_own_threads(tmp_path: Path) -> None:
    build_trainer(small_config(), tmp_path, SingleProcess()).run()
    evaluate_stored(tmp_path, "test", ["precision.threads=auto"])


@pytest.mark.parametrize("override", ["model.width=0.5", "data.synthetic_shape=[1,20,20]", "model.norm=none"])
def test_an_evaluation_of_another_model_is_refused(tmp_path: Path, override: str) -> None:
    build_trainer(small_config(), tmp_path, SingleProcess()).run()
    with raises(UsageError, "settings-changed"):
        evaluate_stored(tmp_path, "test", [override])


def test_another_model_s_checkpoint_is_refused(tmp_path: Path) -> None:
    config = write_config(tmp_path)
    assert main(["train", config, "--run-dir", str(tmp_path / "a")]) == 0
    saved = tmp_path / "a/checkpoints/step-00000003.pt"
    assert main(["train", config, "model.width=0.25", f"run.resume={saved}", "--run-dir", str(tmp_path / "b")]) == 2


def test_another_run_s_checkpoint_with_other_settings_is_refused(tmp_path: Path) -> None:
    config = write_config(tmp_path)
    assert main(["train", config, "--run-dir", str(tmp_path / "a")]) == 0
    saved = tmp_path / "a/checkpoints/step-00000003.pt"
    assert (
        main(["train", config, "optimizer.momentum=0.5", f"run.resume={saved}", "--run-dir", str(tmp_path / "b")]) == 2
    )


def test_checkpoint_config_after_shrinking(tmp_path: Path) -> None:
    trainer = build_trainer(small_config(), tmp_path, SingleProcess())
    trainer.training_step = replace(trainer.training_step, model=Limited(trainer.network, 3))
    trainer.may_shrink = True
    trainer.run()
    assert read_checkpoint(list_checkpoints(tmp_path / "checkpoints")[-1].path).config["batch"]["micro_size"] == 3


def test_shrinking_does_not_need_the_disk(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    trainer = build_trainer(small_config(), tmp_path, SingleProcess())
    trainer.training_step = replace(trainer.training_step, model=Limited(trainer.network, 3))
    trainer.may_shrink = True
    with monkeypatch.context() as patch:
        patch.setattr(os, "fsync", Mock(side_effect=OSError(errno.ENOSPC, "No space left on device")))
        trainer.advance()
    assert trainer.plan.micro_size == 3
    assert str(trainer.directory.config) in caplog.text


def test_the_last_good_checkpoint_is_named_also_when_it_is_still_being_written(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    def slowly(*arguments: Any) -> Any:
        time.sleep(0.5)
        return write_checkpoint(*arguments)

    monkeypatch.setattr(writer, "write_checkpoint", slowly)
    config = write_config(
        tmp_path,
        model={"norm": "none", "width": 0.25},
        optimizer={"learning_rate": 1e30},
        checkpoint={"every_steps": 1},
    )
    run = tmp_path / "run"
    assert main(["train", config, "--run-dir", str(run)]) == 3
    assert "[step-not-finite]" in capsys.readouterr().err
    events = [record.event for record in read_records(run / "metrics.jsonl") if isinstance(record, EventRecord)]
    assert "checkpoint" in events
