from __future__ import annotations

import logging
import shutil
from pathlib import Path

import pytest
import torch

from dist_train.checkpoint.files import list_checkpoints, write_checkpoint
from dist_train.checkpoint.state import find_resume_point
from dist_train.cluster.communicator import Alone
from dist_train.config import Config, load_config
from dist_train.outcome import UsageError
from dist_train.rundir.paths import RunDirectory
from tests.raising import raises
from tests.unit.checkpoint_files import contents
from tests.unit.small_trainers import build_trainer
from tests.unit.test_rundir_paths import DECIDED, parse


def run_with(root: Path, *steps: int) -> RunDirectory:
    directory = RunDirectory(root)
    directory.create()
    for step in steps:
        saved = contents(step, config=DECIDED.model_dump(mode="json"))
        write_checkpoint(directory.checkpoints, saved, lambda: None)
    return directory


def test_a_new_run_takes_its_settings_as_they_are(tmp_path: Path) -> None:
    resume_point = find_resume_point(parse(run={"seed": 5}), run_with(tmp_path))
    assert (resume_point.config, resume_point.contents) == (parse(run={"seed": 5}), None)


def test_a_run_is_gone_on_with_from_its_last_step_under_what_it_decided(tmp_path: Path) -> None:
    config = parse(run={"max_steps": 9}, metrics={"enabled": False})
    resume_point = find_resume_point(config, run_with(tmp_path, 2, 4))
    assert resume_point.contents is not None
    assert resume_point.contents.step == 4
    assert (resume_point.config.batch.micro_size, resume_point.config.precision.threads) == (64, 2)
    assert (resume_point.config.run.max_steps, resume_point.config.metrics.enabled) == (9, False)


def test_promise_5_other_settings_are_refused_by_name(tmp_path: Path) -> None:
    with raises(UsageError, "settings-changed") as caught:
        find_resume_point(parse(run={"seed": 1}, optimizer={"learning_rate": 0.5}), run_with(tmp_path, 4))
    assert "run.seed: 0" in str(caught.value)
    assert "optimizer.learning_rate: 0.1" in str(caught.value)


def test_a_run_that_is_never_to_be_gone_on_with_is_refused_where_there_is_one(tmp_path: Path) -> None:
    never = parse(run={"resume": "never"})
    assert find_resume_point(never, run_with(tmp_path)).contents is None
    with raises(UsageError, "run-exists"):
        find_resume_point(never, run_with(tmp_path, 4))


def test_another_run_s_checkpoint_is_only_a_beginning(tmp_path: Path) -> None:
    source = run_with(tmp_path / "source", 2, 4).checkpoints / "step-00000002.pt"
    config = parse(run={"resume": str(source)})
    first = find_resume_point(config, run_with(tmp_path / "new")).contents
    again = find_resume_point(config, run_with(tmp_path / "new", 7)).contents
    assert first is not None
    assert again is not None
    assert (first.step, again.step) == (2, 7)


def test_a_checkpoint_of_the_run_itself_takes_it_back(tmp_path: Path) -> None:
    directory = run_with(tmp_path, 2, 4)
    config = parse(run={"resume": str(directory.checkpoints / "step-00000002.pt")})
    found = find_resume_point(config, directory).contents
    assert found is not None
    assert found.step == 2


def test_a_longer_run_is_one_that_is_lengthened_and_a_shorter_one_is_refused(tmp_path: Path) -> None:
    directory = run_with(tmp_path, 4)
    resume_point = find_resume_point(parse(run={"epochs": 30}), directory)
    assert (resume_point.epochs_before, resume_point.config.run.epochs) == (10, 30)
    assert find_resume_point(parse(), directory).epochs_before is None
    with raises(UsageError, "settings-changed"):
        find_resume_point(parse(run={"epochs": 9}), directory)


def test_a_run_stands_for_its_last_checkpoint(tmp_path: Path) -> None:
    source = run_with(tmp_path / "source", 2, 4)
    resumed = find_resume_point(parse(run={"resume": str(source.root)}), run_with(tmp_path / "new")).contents
    assert resumed is not None
    assert resumed.step == 4


def test_a_run_that_has_not_begun_takes_the_weights_it_is_to_begin_with(tmp_path: Path) -> None:
    source = run_with(tmp_path / "source", 4)
    config = parse(run={"init_from": str(source.root)})
    found = find_resume_point(config, run_with(tmp_path / "new"))
    assert found.contents is None
    assert found.initial is not None
    assert (found.initial.step, found.initial.path) == (4, source.checkpoint(4))
    assert found.initial.sha256 == list_checkpoints(source.checkpoints)[0].sha256
    own = write_checkpoint(
        run_with(tmp_path / "begun").checkpoints, contents(2, config=config.model_dump(mode="json")), lambda: None
    )
    assert find_resume_point(config, RunDirectory.of_checkpoint(own.path)).initial is None


def test_a_damaged_checkpoint_is_told(tmp_path: Path) -> None:
    directory = run_with(tmp_path, 2, 4)
    (directory.checkpoints / "step-00000004.pt").write_bytes(b"")
    resume_point = find_resume_point(Config(), directory)
    assert resume_point.contents is not None
    assert resume_point.contents.step == 2
    assert list(resume_point.damage) == ["step-00000004.pt"]


def test_a_run_of_an_earlier_version_is_resumed(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    """`former_run` was saved when ranks had another name, half-way; `undisturbed.pt` is where that version ended."""
    former = Path(__file__).with_name("former_run")
    shutil.copytree(former, tmp_path / "run")
    with caplog.at_level(logging.WARNING):
        config = load_config(former / "config.yaml", ["run.max_steps=null"])
    assert (config.noise.sharing, config.metrics.ranks) == ("rank", "first")
    assert len(caplog.records) == 2
    point = find_resume_point(config, RunDirectory(tmp_path / "run"))
    trainer = build_trainer(point.config, tmp_path / "run", Alone(), contents=point.contents)
    trainer.run()
    ended = torch.load(former / "undisturbed.pt", weights_only=True)
    assert trainer.progress.step == ended["step"] == 16
    # Bit-identical on the kind of processor that it was made on; others round otherwise.
    for name, tensor in trainer.network.state_dict().items():
        torch.testing.assert_close(tensor, ended["model"][name], rtol=1e-3, atol=1e-5)
