"""Where a launch starts: at a checkpoint of the run, of another run, or at weights that are named."""

from __future__ import annotations

import logging
import shutil
from functools import partial
from pathlib import Path

import pytest
import torch

from dist_train.checkpoint.files import find_checkpoint, list_checkpoints, prune, remove_checkpoint, write_checkpoint
from dist_train.checkpoint.state import Progress, restored_progress
from dist_train.cluster.communicator import SingleProcess
from dist_train.config import Config, load_config
from dist_train.config.resuming import SAVED
from dist_train.launching.preflight import check_batches, find_resume_point, saved_config
from dist_train.outcome import UsageError
from dist_train.rundir.paths import RunDirectory
from dist_train.training.evaluation import stored_config
from tests.raising import raises, raises_problems
from tests.unit.checkpoint_files import contents, write
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


def test_a_logger_that_is_no_longer_there_keeps_no_run_from_being_resumed(tmp_path: Path) -> None:
    directory, saved = run_with(tmp_path), DECIDED.model_dump(mode="json")
    saved["metrics"]["loggers"] = [{"name": "removed.py:Logger", "options": {}}]
    write(directory.checkpoints, 4, config=saved)
    found = find_resume_point(parse(), directory).contents
    assert found is not None
    assert found.step == 4


def test_a_batch_above_the_samples_that_are_left_to_train_on_is_refused_before_the_run_begins() -> None:
    data = {"name": "synthetic", "synthetic_samples": 100, "validation_size": 40}
    check_batches(parse(data=data, batch={"global_size": 60, "micro_size": 20}))
    for schedule in ({}, {"keep_updates": True, "base_batch": 64}):
        size = 60 if schedule else 64
        with raises(UsageError, "too-few-samples"):
            check_batches(parse(data=data, batch={"global_size": size, "micro_size": 4}, schedule=schedule))


def with_fallback(directory: RunDirectory, spare: Path, config: Config = DECIDED) -> Path:
    """Write a checkpoint of step 4 to the run's folder in `spare`, and return that."""
    fallback = directory.fallback(spare)
    fallback.mkdir(parents=True)
    write_checkpoint(fallback, contents(4, config=config.model_dump(mode="json")), lambda: None)
    return fallback


def test_a_later_checkpoint_in_the_fallback_directory_is_resumed_from(tmp_path: Path) -> None:
    directory = run_with(tmp_path / "run", 2)
    fallback = with_fallback(directory, tmp_path / "spare")
    found = find_resume_point(parse(checkpoint={"fallback_directory": str(tmp_path / "spare")}), directory).contents
    assert found is not None
    assert found.step == 4
    assert ([file.step for file in list_checkpoints(directory.checkpoints)], list_checkpoints(fallback)) == ([2, 4], [])


def test_the_fallback_directory_of_a_renamed_run_is_found(tmp_path: Path) -> None:
    directory = run_with(tmp_path / "run", 2)
    config = parse(checkpoint={"fallback_directory": str(tmp_path / "spare")})
    with_fallback(directory, tmp_path / "spare")
    (tmp_path / "link").symlink_to(directory.root.rename(tmp_path / "renamed"))
    found = find_resume_point(config, RunDirectory(tmp_path / "link")).contents
    assert found is not None
    assert found.step == 4


@pytest.mark.parametrize("now", [None, "other"])
def test_the_fallback_directory_of_the_last_launch_is_searched_too(tmp_path: Path, now: str | None) -> None:
    directory = run_with(tmp_path / "run", 2)
    directory.save_config(parse(checkpoint={"fallback_directory": str(tmp_path / "spare")}))
    with_fallback(directory, tmp_path / "spare")
    found = find_resume_point(parse(checkpoint={"fallback_directory": now and str(tmp_path / now)}), directory).contents
    assert found is not None
    assert found.step == 4


def test_the_fallback_directory_of_the_last_launch_may_be_unusable(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    directory = run_with(tmp_path / "run", 2)
    before = parse(checkpoint={"fallback_directory": str(tmp_path / "spare")})
    directory.save_config(before)
    fallback = with_fallback(directory, tmp_path / "spare")
    fallback.chmod(0o777)
    with raises(UsageError, "folder-foreign"):
        find_resume_point(before, directory)
    found = find_resume_point(parse(), directory).contents
    assert found is not None
    assert found.step == 2
    assert str(fallback) in caplog.text


@pytest.mark.parametrize("copy", ["copy", "elsewhere/run"])
def test_a_copy_of_a_run_leaves_it_its_fallback_checkpoint(tmp_path: Path, copy: str) -> None:
    directory = run_with(tmp_path / "run", 2)
    config = parse(checkpoint={"fallback_directory": str(tmp_path / "spare")})
    with_fallback(directory, tmp_path / "spare")
    shutil.copytree(directory.root, tmp_path / copy)
    for root in (tmp_path / copy, directory.root):
        found = find_resume_point(config, RunDirectory(root)).contents
        assert found is not None
        assert found.step == 4


@pytest.mark.parametrize("copy", ["copy", "elsewhere/run"])
def test_a_copy_s_fallback_checkpoint_is_left_to_it_once_it_has_other_settings(tmp_path: Path, copy: str) -> None:
    directory = run_with(tmp_path / "run", 2)
    config = parse(checkpoint={"fallback_directory": str(tmp_path / "spare")})
    directory.run_id()  # which the copy has, too
    shutil.copytree(directory.root, tmp_path / copy)
    longer = DECIDED.model_copy(update={"run": DECIDED.run.model_copy(update={"epochs": DECIDED.run.epochs + 1})})
    with_fallback(RunDirectory(tmp_path / copy), tmp_path / "spare", longer)
    found = find_resume_point(config, directory).contents
    assert found is not None
    assert found.step == 2


@pytest.mark.parametrize("metrics", [None, 3])
def test_a_checkpoint_whose_settings_are_malformed_is_refused(metrics: object) -> None:
    damaged = contents(4, config={**DECIDED.model_dump(mode="json"), "metrics": metrics})
    for read in (partial(saved_config, config=DECIDED), partial(stored_config, overrides=())):
        with raises_problems(("metrics", "wrong-type")):
            read(damaged)


def test_code_may_have_moved_and_a_loggers_be_gone(tmp_path: Path) -> None:
    def given(folder: str, name: str = "half", loggers: tuple[str, ...] = ()) -> Config:
        return load_config(
            {
                "schedule": {"decay": str(tmp_path / folder / f"rate.py:{name}")},
                "metrics": {"loggers": [{"name": str(tmp_path / folder / f"logs.py:{each}")} for each in loggers]},
            }
        )

    (tmp_path / "then").mkdir()
    (tmp_path / "then" / "rate.py").write_text("def half(over):\n    return 1 - over / 2\n\n\nthird = half\n")
    (tmp_path / "then" / "logs.py").write_text("def silent(directory): ...\n")
    saved = contents(4, config=given("then", loggers=("silent",)).model_dump(mode="json"))
    directory = run_with(tmp_path / "run")
    write_checkpoint(directory.checkpoints, saved, lambda: None)
    (tmp_path / "then").rename(tmp_path / "now")
    (tmp_path / "now" / "logs.py").unlink()
    now = given("now")
    assert find_resume_point(now, directory).config.schedule == now.schedule
    with raises(UsageError, "settings-changed"):
        find_resume_point(given("now", "third"), directory)


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


def test_a_run_whose_only_checkpoint_is_in_the_fallback_directory_is_there_too(tmp_path: Path) -> None:
    """Else its records are erased, and the new run resumes from what the former has left."""
    directory = run_with(tmp_path / "run")
    fallback = with_fallback(directory, tmp_path / "spare")
    settings = {"run": {"resume": "never"}, "checkpoint": {"fallback_directory": str(tmp_path / "spare")}}
    with raises(UsageError, "run-exists"):
        find_resume_point(parse(**settings), directory)
    assert [file.step for file in list_checkpoints(fallback)] == [4]


def test_another_run_s_checkpoint_is_only_a_beginning(tmp_path: Path) -> None:
    source = run_with(tmp_path / "source", 2, 4).checkpoints / "step-00000002.pt"
    config = parse(run={"resume": str(source)})
    first = find_resume_point(config, run_with(tmp_path / "new")).contents
    again = find_resume_point(config, run_with(tmp_path / "new", 7)).contents
    assert first is not None
    assert again is not None
    assert (first.step, again.step) == (2, 7)


def test_a_run_that_begins_at_another_run_s_checkpoint_keeps_a_best_one_of_its_own(tmp_path: Path) -> None:
    source = run_with(tmp_path / "source")
    theirs = Progress(step=4, best_accuracy=0.9, best_saved_step=2, best_saved_accuracy=0.9)
    write(source.checkpoints, 4, metrics=theirs.metrics(), config=parse().model_dump(mode="json"))
    new = run_with(tmp_path / "new")
    found = find_resume_point(parse(run={"resume": str(source.root)}), new).contents
    assert found is not None
    progress = restored_progress(found)
    for progress.step, accuracy in ((5, 0.7), (6, 0.6), (7, 0.5)):
        progress.note_accuracy("test", accuracy)
        progress.note_saved()
        write(new.checkpoints, progress.step, metrics=progress.metrics())
        prune(new.checkpoints, keep=1, best_step=progress.best_saved_step)
    assert [file.step for file in list_checkpoints(new.checkpoints)] == [5, 7]
    assert find_checkpoint(Path(f"{new.root}@best")) == new.checkpoint(5)
    assert progress.best_accuracy == 0.9


@pytest.mark.parametrize("name", ["run/checkpoints/step-00000002.pt", "run/checkpoints/step-00000002.json", "run@2"])
def test_an_earlier_checkpoint_of_the_run_itself_is_refused(tmp_path: Path, name: str) -> None:
    directory = run_with(tmp_path / "run", 2, 4)
    config = parse(run={"resume": str(tmp_path / name)})
    with raises(UsageError, "checkpoint-not-last"):
        find_resume_point(config, directory)
    assert [file.step for file in list_checkpoints(directory.checkpoints)] == [2, 4]
    remove_checkpoint(directory.checkpoint(4))
    found = find_resume_point(config, directory).contents
    assert found is not None
    assert found.step == 2


@pytest.mark.parametrize(
    ("source", "is_gone"),
    [
        ("run@2", True),
        ("run@7", False),
        ("run/checkpoints/step-00000002.pt", True),
        ("removed@2", True),
        ("x" * 300, True),  # the system refuses to look for it, as for what a user may not read or a server has lost
    ],
)
def test_a_checkpoint_to_resume_from_that_is_gone_is_named(tmp_path: Path, source: str, is_gone: bool) -> None:
    directory = run_with(tmp_path / "run", 4, 7)
    found = find_resume_point(parse(run={"resume": str(tmp_path / source)}), directory)
    assert found.contents is not None
    assert found.contents.step == 7
    assert found.gone == (tmp_path / source if is_gone else None)


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


@pytest.mark.parametrize("resume", ["auto", "never"])
def test_a_run_that_has_not_begun_takes_the_weights_it_is_to_begin_with(tmp_path: Path, resume: str) -> None:
    source = run_with(tmp_path / "source", 4)
    config = parse(run={"init_from": str(source.root), "resume": resume})
    found = find_resume_point(config, run_with(tmp_path / "new"))
    assert found.contents is None
    assert found.initial is not None
    assert (found.initial.step, found.initial.path) == (4, source.checkpoint(4))
    assert found.initial.sha256 == list_checkpoints(source.checkpoints)[0].sha256
    own = write_checkpoint(
        run_with(tmp_path / "begun").checkpoints, contents(2, config=config.model_dump(mode="json")), lambda: None
    )
    begun = config.model_copy(update={"run": config.run.model_copy(update={"resume": "auto"})})
    assert find_resume_point(begun, RunDirectory.of_checkpoint(own.path)).initial is None


def test_a_damaged_checkpoint_is_told(tmp_path: Path) -> None:
    directory = run_with(tmp_path, 2, 4)
    (directory.checkpoints / "step-00000004.pt").write_bytes(b"")
    resume_point = find_resume_point(Config(), directory)
    assert resume_point.contents is not None
    assert resume_point.contents.step == 2
    assert list(resume_point.damage) == ["step-00000004.pt"]


@pytest.mark.parametrize("name", ["run/checkpoints/step-00000004.pt", "run@4", "run"])
def test_a_damaged_checkpoint_that_is_named_is_told_too(tmp_path: Path, name: str) -> None:
    """The run's last one: there is none that could be moved away."""
    directory = run_with(tmp_path / "run", 2, 4)
    directory.checkpoint(4).write_bytes(b"")
    resume_point = find_resume_point(parse(run={"resume": str(tmp_path / name)}), directory)
    assert resume_point.contents is not None
    assert resume_point.contents.step == 2
    assert list(resume_point.damage) == ["step-00000004.pt"]


def test_a_run_without_a_whole_checkpoint_starts_from_the_one_that_is_named(tmp_path: Path) -> None:
    directory, other = run_with(tmp_path / "damaged", 2), run_with(tmp_path / "other", 3)
    (directory.checkpoints / "step-00000002.pt").write_bytes(b"")
    for _ in range(2):
        with raises(UsageError, "no-whole-checkpoint"):
            find_resume_point(Config(), directory)
    found = find_resume_point(parse(run={"resume": str(other.checkpoint(3))}), directory).contents
    assert found is not None
    assert found.step == 3


def test_a_run_of_an_earlier_version_is_resumed(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    """`former_run` was saved when ranks had another name, half-way; `undisturbed.pt` is where that version ended."""
    former = Path(__file__).with_name("former_run")
    shutil.copytree(former, tmp_path / "run")
    with caplog.at_level(logging.WARNING):
        config = load_config(former / "config.yaml", ["run.max_steps=null"])
    assert (config.noise.sharing, config.metrics.ranks) == ("rank", "first")
    assert len(caplog.records) == 2
    point = find_resume_point(config, RunDirectory(tmp_path / "run"))
    trainer = build_trainer(point.config, tmp_path / "run", SingleProcess(), contents=point.contents)
    trainer.run()
    ended = torch.load(former / "undisturbed.pt", weights_only=True)
    assert trainer.progress.step == ended["step"] == 16
    # Bit-identical on the kind of processor that it was made on; others round otherwise.
    for name, tensor in trainer.network.state_dict().items():
        torch.testing.assert_close(tensor, ended["model"][name], rtol=1e-3, atol=1e-5)


def test_a_setting_of_a_later_version_is_reported_with_where_the_version_is() -> None:
    for read in (partial(saved_config, config=Config()), partial(stored_config, overrides=())):
        with raises_problems(("later", "unknown-key")) as refused:
            read(contents(2, config={"later": {}}))
        assert str(refused.value).startswith(SAVED)
