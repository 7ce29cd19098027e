"""The Python API of finished runs: records, model, exports, and replayed updates."""

from __future__ import annotations

import importlib.util
import json
import signal
import sys
import tempfile
from dataclasses import replace
from pathlib import Path
from typing import Any
from unittest.mock import Mock

import onnxruntime
import onnxscript._framework_apis
import pytest
import torch
from safetensors import safe_open
from safetensors.torch import load_file

import dist_train
from dist_train import diagnostics
from dist_train.api import Format
from dist_train.checkpoint.files import read_stored, remove_checkpoint, write_checkpoint
from dist_train.cluster.launch import Launch
from dist_train.config import Config, load_config
from dist_train.config.resuming import with_setting
from dist_train.data.images import BatchRequest
from dist_train.data.loader import open_splits
from dist_train.outcome import DivergedError, ExitCode, StoppedError, UsageError
from dist_train.rundir.metrics_file import to_json
from dist_train.rundir.paths import RunDirectory
from dist_train.rundir.records import EvaluationRecord, EventRecord, Record
from tests.launching import launch, mostly_lengthy, small_settings, start, train_alone, wait_for_ends, write_config
from tests.raising import raises
from tests.unit.image_folders import write_folder


@pytest.fixture(scope="module")
def run(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A finished run with a checkpoint after every third update."""
    folder = tmp_path_factory.mktemp("api")
    settings = small_settings(checkpoint={"every_steps": 3, "every_epochs": 0, "keep": 100})
    train_alone(write_config(folder, settings), folder / "run")
    return folder / "run"


PAGE = (Path(__file__).parents[2] / "docs" / "python.md").read_text(encoding="utf-8")


def example(heading: str) -> str:
    """Return the first block of Python on the page below `heading`."""
    return PAGE.partition(f"{heading}\n")[2].partition("```python\n")[2].partition("```")[0]


def test_the_examples_of_the_page_work(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    names: dict[str, Any] = {}
    exec(example("# From Python"), names)
    assert names["model"](torch.rand(3, *names["config"].data.image_format.shape)).shape == (3, 10)
    exec(example("## A metric of your own"), names)
    counts = names["confusion"].sum(), names["confusion"].diagonal().sum()
    assert counts[1] / counts[0] == pytest.approx(names["run"].evaluate()["accuracy"])


def test_the_script_of_the_page_trains_alike_on_one_rank_and_on_two(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    models = []
    for ranks, controller in ((1, "alone"), (2, "torchrun")):
        folder = tmp_path / controller
        folder.mkdir()
        (folder / "train_mine.py").write_text(example("## Your own model and data"))
        monkeypatch.chdir(folder)
        ended = launch(ranks, controller, program=["train_mine.py"])
        assert ended.code == 0, ended.output
        assert ended.output.count("finished, test accuracy 1.0") == ranks
        models.append(dist_train.load_run("runs/halves").model().state_dict())
    one, two = models
    assert all(torch.equal(one[name], two[name]) for name in one)


@pytest.mark.parametrize("normalize", [False, True])
def test_the_page_prepares_new_images_as_evaluations_do(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, normalize: bool
) -> None:
    monkeypatch.chdir(tmp_path)
    images = write_folder(Path("images"), per_class=4, test_per_class=1)
    data = {"name": "imagefolder", "root": images, "classes": 3, "image_size": 32, "normalize": normalize}
    settings = small_settings(data=data, run={"max_steps": 1}, batch={"global_size": 4, "micro_size": 4})
    dist_train.train(dist_train.load_config(settings), "runs/mine")
    run = dist_train.load_run("mine")
    statistics = run.normalization()
    spread = min(statistics.deviation) if statistics else 1.0
    for image, label in zip(*next(run.batches()), strict=True):
        names: dict[str, Any] = {}
        [file] = Path("images/val", ("ant", "bee", "cat")[label]).iterdir()
        exec(example("## Predicting new images").replace("new.jpg", str(file)), names)
        torch.testing.assert_close(names["image"] * spread, image * spread, rtol=0, atol=1.01 / 255)
        assert names["names"][label] == file.parent.name
    dist_train.export(run, "safetensors", tmp_path / "model.safetensors")
    with safe_open(tmp_path / "model.safetensors", "pt") as written:
        assert json.loads(written.metadata()["dist_train"])["class_names"] == ["ant", "bee", "cat"]


def test_public_names_are_listed_for_completion() -> None:
    assert {*dist_train.__all__, "__version__"} == {*dir(dist_train)}


def test_load_run_gives_status_configuration_and_metrics(run: Path) -> None:
    loaded = dist_train.load_run(run)
    assert loaded.status.state == "finished"
    assert loaded.config.noise.method == "smoothout"
    assert loaded.steps[0] == 3
    rows = loaded.metrics()
    if importlib.util.find_spec("pandas"):
        rows = rows.to_dict("records")
    assert [row["step"] for row in rows if row["kind"] == "train"] == list(range(1, loaded.status.step + 1))
    assert loaded.checkpoint("best") in map(loaded.checkpoint, loaded.steps)
    with raises(UsageError, code="checkpoint-missing"):
        loaded.model(step=1)
    with raises(UsageError, code="target-missing"):
        dist_train.load_run(run.parent / "nowhere")


@pytest.mark.parametrize("normalize", [False, True])
def test_a_metric_of_one_s_own_over_a_run_s_batches_is_that_of_the_evaluation(tmp_path: Path, normalize: bool) -> None:
    settings = small_settings(data={"normalize": normalize}, evaluation={"batch_size": 7}, run={"max_steps": 3})
    dist_train.train(dist_train.load_config(settings), tmp_path)
    run = dist_train.load_run(tmp_path)
    model = run.model()
    with torch.no_grad():
        hits = [model(images).argmax(1) == labels for images, labels in run.batches("test")]
    assert {len(each) for each in hits[:-1]} == {7}
    assert torch.cat(hits).double().mean().item() == pytest.approx(run.evaluate()["accuracy"], abs=1e-12)
    with raises(UsageError, code="no-validation"):
        run.batches("validation")


def test_the_statistics_of_a_run_normalize_its_images(tmp_path: Path) -> None:
    write_config(tmp_path, small_settings(data={"normalize": True}))
    run = dist_train.load_run(tmp_path)
    statistics = run.normalization()
    plain, normalized = (
        open_splits(run.config.data.model_copy(update={"normalize": on}), 0, torch.device("cpu")).test.read(
            BatchRequest(torch.arange(4))
        )[0]
        for on in (False, True)
    )
    assert statistics
    mean, deviation = (torch.tensor(values)[:, None, None] for values in (statistics.mean, statistics.deviation))
    torch.testing.assert_close((plain - mean) / deviation, normalized)


def test_the_statistics_of_a_run_need_no_images(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    settings = small_settings(data={"normalize": True}, run={"max_steps": 1})
    dist_train.train(dist_train.load_config(settings), tmp_path / "run")
    run = dist_train.load_run(tmp_path / "run")
    expected = open_splits(run.config.data, run.config.run.seed, torch.device("cpu")).normalization
    dist_train.export(run, "safetensors", tmp_path / "model.safetensors")
    with safe_open(tmp_path / "model.safetensors", "pt") as file:
        notes = json.loads(file.metadata()["dist_train"])
    monkeypatch.delattr("dist_train.api.open_splits")
    assert expected is not None
    assert run.normalization() == expected
    assert notes["normalization"] == {"mean": [*expected.mean], "deviation": [*expected.deviation]}


@pytest.mark.parametrize("to", mostly_lengthy(["safetensors", "torch-export", "onnx"]))
def test_exported_model_gives_the_same_logits(run: Path, tmp_path: Path, to: str) -> None:
    ended = launch(1, "alone", "export", str(run), "--to", to, "-o", str(tmp_path / "model"))
    assert ended.code == 0, ended.output
    notes = {"dist_train": ""}
    if to == "safetensors":
        with safe_open(tmp_path / "model", "pt") as file:
            notes = file.metadata()
    if to == "torch-export":
        images = torch.rand(7, *dist_train.load_run(run).config.data.image_format.shape)
        exported = torch.export.load(tmp_path / "model", extra_files=notes).module()(images)
        torch.testing.assert_close(exported, dist_train.load_run(run).model()(images))
    if to == "onnx":
        session = onnxruntime.InferenceSession(tmp_path / "model")
        notes = session.get_modelmeta().custom_metadata_map
        images = torch.rand(7, *dist_train.load_run(run).config.data.image_format.shape)
        [logits] = session.run(None, {"images": images.numpy()})
        torch.testing.assert_close(torch.from_numpy(logits), dist_train.load_run(run).model()(images))
    stored, data = read_stored(run), dist_train.load_run(run).config.data.image_format
    form = {"shape": [*data.shape], "classes": data.classes, "class_names": [], "normalization": None}
    assert json.loads(notes["dist_train"]) == {"step": stored.contents.step, "sha256": stored.sha256, **form}


def test_an_onnxscript_too_old_for_torch_is_told_from_a_missing_one(
    run: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(onnxscript._framework_apis, "__path__", [])  # without the part for this torch
    for name in [name for name in sys.modules if name.startswith("onnxscript._framework_apis.")]:
        monkeypatch.delitem(sys.modules, name)
    with raises(UsageError, code="export-missing") as refused:
        dist_train.export(run, "onnx", tmp_path / "model.onnx")
    assert "pip install --upgrade onnxscript" in str(refused.value)


def test_a_library_that_is_broken_is_told_from_a_missing_one(
    run: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "onnxruntime.py").write_text("raise ImportError('libcudart.so: cannot open shared object file')\n")
    monkeypatch.syspath_prepend(tmp_path)
    monkeypatch.delitem(sys.modules, "onnxruntime")
    with raises(UsageError, code="export-missing") as refused:
        dist_train.export(run, "onnx", tmp_path / "model.onnx")
    assert "libcudart.so: cannot open" in str(refused.value)
    assert "not installed" not in str(refused.value)


@pytest.mark.parametrize(("to", "name"), [("safetensors", "folder"), ("torch-export", "file/model")])
def test_export_to_an_unwritable_place_is_refused(run: Path, tmp_path: Path, to: Format, name: str) -> None:
    (tmp_path / "folder").mkdir()
    (tmp_path / "file").touch()
    with raises(UsageError, code="output-unwritable"):
        dist_train.export(run, to, tmp_path / name)
    assert sorted(path.name for path in tmp_path.iterdir()) == ["file", "folder"]


@pytest.mark.parametrize(
    ("to", "flat"),
    [("torch-export", "images.flatten(1) * (1 if images.sum() > 0 else -1)"), ("onnx", "images.view(len(images), -1)")],
)
def test_a_model_that_a_format_cannot_represent_is_refused(tmp_path: Path, to: Format, flat: str) -> None:
    (tmp_path / "mine.py").write_text(
        "from torch import nn\n\n\n"
        "class Mine(nn.Linear):\n"
        "    def forward(self, images):\n"
        f"        return super().forward({flat})\n\n\n"
        "def mine(images, width, norm):\n"
        "    return Mine(64, images.classes)\n"
    )
    sections = small_settings(model={"name": "mine.py:mine"}, data={"synthetic_shape": [1, 8, 8]})
    train_alone(write_config(tmp_path, sections), tmp_path / "run", "run.max_steps=1")
    with raises(UsageError, code="plugin-failed") as refused:
        dist_train.export(tmp_path / "run", to, tmp_path / "model")
    assert f"{to} cannot represent" in str(refused.value)
    assert "images.shape[0]" in str(refused.value)
    assert not (tmp_path / "model").exists()
    assert dist_train.export(tmp_path / "run", "safetensors", tmp_path / "model.safetensors").difference == 0


def test_a_model_that_fails_on_random_images_is_compared_on_the_run_s(tmp_path: Path) -> None:
    (tmp_path / "mine.py").write_text(
        "from pathlib import Path\nimport torch\nfrom torch import nn\n\n\n"
        "class Tokens(nn.Module):\n"
        "    def __init__(self, classes):\n"
        "        super().__init__()\n"
        "        self.table = nn.Embedding(64, classes)\n\n"
        "    def forward(self, images):\n"
        "        return self.table((images.flatten(1) * 255).round().long()).mean(1)\n\n\n"
        "def tokens(images, width, norm):\n"
        "    return Tokens(images.classes)\n\n\n"
        "def words(settings, split, seed):\n"
        "    count = int(Path(__file__).with_name('count').read_text())\n"
        "    return [(torch.full((1, 1, 4), n % 64, dtype=torch.uint8), n % 10) for n in range(count)]\n"
    )
    (tmp_path / "count").write_text("256")
    data = {"name": "mine.py:words", "shape": [1, 1, 4], "classes": 10}
    sections = small_settings(model={"name": "mine.py:tokens"}, data=data)
    train_alone(write_config(tmp_path, sections), tmp_path / "run", "run.max_steps=1")
    output = tmp_path / "model.safetensors"
    assert dist_train.export(tmp_path / "run", "safetensors", output).difference == 0
    (tmp_path / "count").unlink()
    with raises(UsageError, code="plugin-failed"):
        dist_train.export(tmp_path / "run", "safetensors", output)
    with raises(UsageError, code="output-form"):
        dist_train.export(tmp_path / "run", "onnx", output)


def test_averaged_weights_are_evaluated_and_exported(tmp_path: Path) -> None:
    sections = small_settings(
        run={"epochs": 2},
        averaging={"kind": "ema", "decay": 0.8},
        data={"validation_size": 100},
        evaluation={"train_samples": 0, "batch_size": 50},
        early_stopping={"patience": 9},
    )
    train_alone(write_config(tmp_path, sections), tmp_path / "run")
    loaded = dist_train.load_run(tmp_path / "run")
    last = {record.split: record for record in loaded.records if isinstance(record, EvaluationRecord)}
    assert list(last) == ["validation", "test", "validation-averaged", "test-averaged"]
    for split in ("validation", "test"):
        assert loaded.evaluate(split)["loss"] == last[split].loss
        averaged = loaded.evaluate(split, weights="averaged")
        assert (averaged["loss"], averaged["weights"]) == (last[f"{split}-averaged"].loss, "averaged")
        assert averaged["loss"] != last[split].loss
    written = dist_train.export(loaded.directory.root, "safetensors", tmp_path / "model.safetensors", "averaged")
    exported = load_file(written.path)
    assert all(
        torch.equal(exported[name], value) for name, value in loaded.model(weights="averaged").state_dict().items()
    )
    assert dist_train.replay(loaded.directory.root, 9).agrees


def test_evaluating_missing_averages_or_splits_is_refused(run: Path) -> None:
    with raises(UsageError, code="no-averaged-weights"):
        dist_train.evaluate(run, weights="averaged")
    with raises(UsageError, code="no-validation"):
        dist_train.evaluate(run, "validation")


def test_arguments_of_another_kind_are_refused_or_converted(run: Path, tmp_path: Path) -> None:
    arguments: Any = dist_train
    with raises(UsageError, code="no-such-choice"):
        arguments.load_run(run).evaluate("foo")
    with raises(UsageError, code="no-such-choice"):
        arguments.load_run(run).batches("foo")
    with raises(UsageError, code="no-such-choice"):
        arguments.export(run, "foo")
    with raises(UsageError, code="wrong-type"):
        arguments.train("config.yaml", tmp_path / "run")
    with raises(UsageError, code="wrong-type"):
        arguments.learning_rate_range("config.yaml", 0.1, 1.0, 5, tmp_path / "range")
    for observers in (dist_train.Observer(), [dist_train.Observer]):
        with raises(UsageError, code="wrong-type"):
            arguments.train(dist_train.load_config("dist_train:configs/smoke.yaml"), tmp_path / "run", observers)
    written = dist_train.export(run, "safetensors", str(tmp_path / "model.safetensors"))
    assert written.path == tmp_path / "model.safetensors"
    assert dist_train.load_run(run).learning_curve(str(tmp_path / "curve.png")) == tmp_path / "curve.png"


@pytest.mark.parametrize(("ranks", "step"), mostly_lengthy([(2, 5), (1, 2), (1, 6)]))
def test_replayed_update_is_bit_identical(run: Path, ranks: int, step: int) -> None:
    before = (run / "metrics.jsonl").read_bytes()
    ended = launch(ranks, "torch" if ranks > 1 else "alone", "replay", f"{run}@{step}")
    assert ended.code == 0, ended.output
    assert (run / "metrics.jsonl").read_bytes() == before


def test_an_update_is_replayed_from_the_checkpoint_before_it_whatever_updates_are_recorded(tmp_path: Path) -> None:
    settings = small_settings(run={"epochs": 1}, metrics={"every_steps": 5}, checkpoint={"every_steps": 3, "keep": 100})
    train_alone(write_config(tmp_path, settings), tmp_path / "run")
    again = dist_train.replay(tmp_path / "run", 5)
    assert (again.begun_at, again.agrees) == (3, True)


def test_an_update_is_replayed_where_the_data_and_the_code_are_elsewhere(tmp_path: Path) -> None:
    before, now = tmp_path / "before", tmp_path / "now"
    images = write_folder(before / "images")
    (before / "mine.py").write_text("def half(over):\n    return 1 - over / 2\n")
    settings = small_settings(
        data={"name": "imagefolder", "root": str(images), "classes": 3, "image_size": 8},
        batch={"global_size": 8, "micro_size": 8},
        schedule={"decay": f"{before}/mine.py:half"},
        checkpoint={"every_steps": 2, "every_epochs": 0, "keep": 100},
    )
    config = write_config(tmp_path, settings)
    assert launch(1, "alone", "train", config, "run.max_steps=4", "--run-dir", str(tmp_path / "run")).code == 0
    before.rename(now)
    there = f"data.root={now}/images", f"schedule.decay={now}/mine.py:half"
    for step in (1, 4):  # from the beginning, and from a checkpoint
        assert dist_train.replay(tmp_path / "run", step, there).agrees


def test_updates_of_a_lengthened_run_are_replayed_with_the_schedules_of_their_time(tmp_path: Path) -> None:
    config = write_config(tmp_path, small_settings(schedule={"decay": "cosine"}, checkpoint={"keep": 100}))
    run = tmp_path / "run"
    for epochs in (2, 4):
        train_alone(config, run, f"run.epochs={epochs}")
    for step in (3, 16, 18):
        assert dist_train.replay(run, step).agrees
    for step in dist_train.load_run(run).steps:
        remove_checkpoint(dist_train.load_run(run).checkpoint(step))
    assert dist_train.replay(run, 3).agrees
    with raises(UsageError, code="step-not-replayable"):
        dist_train.replay(run, 18)


def test_an_update_before_which_the_run_was_lengthened_is_not_replayed_from_an_unfinished_one(tmp_path: Path) -> None:
    config = write_config(
        tmp_path, small_settings(schedule={"decay": "constant"}, checkpoint={"every_steps": 3, "keep": 100})
    )
    run = tmp_path / "run"
    for epochs in (1, 2):
        train_alone(config, run, f"run.epochs={epochs}")
    loaded = dist_train.load_run(run)
    lengthened = next(each.step for each in loaded.records if getattr(each, "event", "") == "lengthened")
    for step in loaded.steps:
        if step >= lengthened:
            remove_checkpoint(loaded.checkpoint(step))
    with raises(UsageError, code="step-not-replayable"):
        dist_train.replay(run, lengthened + 2)
    for step in loaded.steps:
        remove_checkpoint(loaded.checkpoint(step))
    assert dist_train.replay(run, lengthened + 2).agrees


def test_updates_of_a_run_whose_micro_batches_were_halved_are_replayed_with_those_of_their_time(tmp_path: Path) -> None:
    config = small_settings(run={"epochs": 2}, checkpoint={"every_steps": 3, "every_epochs": 0, "keep": 100})
    train_alone(write_config(tmp_path, config), tmp_path / "run")
    run = dist_train.load_run(tmp_path / "run")
    # As if memory had run out in update 14; the updates before it are those that are replayed.
    run.directory.save_config(with_setting(run.config, "batch.micro_size", 8))
    halved = EventRecord(13, "micro_size", 0.0, {"before": 16, "now": 8, "reason": "out of memory"})
    with run.directory.metrics.open("a") as file:
        file.write(f"{to_json(halved)}\n")
    assert dist_train.replay(run.directory.root, 8).agrees
    with raises(UsageError, code="step-not-replayable"):
        dist_train.replay(run.directory.root, 14)
    for step in run.steps:
        remove_checkpoint(run.checkpoint(step))
    assert dist_train.replay(run.directory.root, 3).agrees


def test_updates_of_a_run_that_began_from_another_one_s_checkpoint_need_one_of_its_own(tmp_path: Path) -> None:
    config = write_config(tmp_path, small_settings(run={"epochs": 1}, checkpoint={"every_steps": 2, "keep": 100}))
    train_alone(config, tmp_path / "first", "run.max_steps=2")
    train_alone(config, tmp_path / "run", f"run.resume={tmp_path / 'first'}")
    run = dist_train.load_run(tmp_path / "run")
    assert dist_train.replay(run.directory.root, 5).agrees
    for step in run.steps:
        remove_checkpoint(run.checkpoint(step))
    with raises(UsageError, code="step-not-replayable"):
        dist_train.replay(run.directory.root, 5)


def test_settings_of_a_run_are_read_on_demand(tmp_path: Path) -> None:
    directory = RunDirectory(tmp_path)
    config = load_config(write_config(tmp_path, small_settings(run={"epochs": 1})))
    directory.save_config(config)
    run = dist_train.load_run(tmp_path)
    assert run.config.run.epochs == 1
    directory.save_config(with_setting(config, "run.epochs", 2))
    assert run.config.run.epochs == 2


def test_a_replay_of_a_run_that_names_its_logger_as_it_was_called_attaches_none(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    run = tmp_path / "run"
    train_alone(write_config(tmp_path, small_settings(checkpoint={"every_steps": 2, "keep": 100})), run)
    contents = read_stored(run / "checkpoints" / "step-00000002.pt").contents
    metrics = {**contents.config["metrics"], "tensorboard": True, "loggers": []}
    remove_checkpoint(run / "checkpoints" / "step-00000002.pt")
    write_checkpoint(
        run / "checkpoints", replace(contents, config={**contents.config, "metrics": metrics}), lambda: None
    )
    monkeypatch.setattr("dist_train.diagnostics.train", trained := Mock(side_effect=dist_train.train))
    assert dist_train.replay(run, 3).agrees
    assert trained.call_args.args[0].metrics.loggers == ()


def test_last_update_before_a_divergence_is_replayed(tmp_path: Path) -> None:
    config = load_config(write_config(tmp_path, small_settings(optimizer={"learning_rate": 1e6})))
    with pytest.raises(DivergedError):
        dist_train.train(config, tmp_path / "run")
    last = dist_train.load_run(tmp_path / "run").status.step
    again = dist_train.replay(tmp_path / "run", last)
    assert again.agrees
    assert again.weights_agree is None


@pytest.mark.lengthy
def test_replays_of_one_update_at_once_do_not_disturb_each_other(run: Path) -> None:
    ended = wait_for_ends(*(start(1, "alone", "replay", f"{run}@2") for _ in range(2)))
    assert [each.code for each in ended] == [0, 0], ended


def test_refused_replay_leaves_the_other_launch_s_files(
    run: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def refuse(config: Config, place: Path) -> None:
        RunDirectory(place).lock.touch()  # as the other launch does
        raise UsageError("another launch trains here", code="run-in-use")

    monkeypatch.setattr(diagnostics, "train", refuse)
    monkeypatch.setattr(tempfile, "tempdir", str(tmp_path))
    with raises(UsageError, code="run-in-use"):
        diagnostics.replay(run, 2)
    assert len(list(tmp_path.iterdir())) == 1


class _Interrupting(dist_train.Observer):
    def record(self, record: Record) -> None:
        if record.step == 3:
            signal.raise_signal(signal.SIGINT)


def test_interrupted_call_saves_and_the_same_call_resumes(tmp_path: Path) -> None:
    config = load_config(write_config(tmp_path, small_settings(run={"epochs": 1})))
    with pytest.raises(StoppedError):
        dist_train.train(config, tmp_path / "run", [_Interrupting()])
    assert dist_train.load_run(tmp_path / "run").status.state == "stopped"
    assert dist_train.train(config, tmp_path / "run").state == "finished"


def test_replay_on_another_rank_does_not_read_what_rank_0_removes(run: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(diagnostics, "current_launch", lambda: Launch("torchrun", 2, 1))
    monkeypatch.setattr(diagnostics, "train", lambda config, place: None)
    again = diagnostics.replay(run, 2)
    assert (again.step, again.recorded, again.agrees) == (2, {}, True)


def test_replay_detects_a_changed_record(run: Path, tmp_path: Path) -> None:
    lines = (run / "metrics.jsonl").read_text().splitlines()
    records = [json.loads(line) for line in lines]
    index = next(n for n, record in enumerate(records) if record["kind"] == "train" and record["step"] == 2)
    records[index]["loss"] *= 1 + 1e-12
    try:
        (run / "metrics.jsonl").write_text("".join(json.dumps(record) + "\n" for record in records))
        assert launch(1, "alone", "replay", f"{run}@2").code == ExitCode.DISAGREEMENT
    finally:
        (run / "metrics.jsonl").write_text("\n".join(lines) + "\n")
    assert launch(1, "alone", "replay", f"{run}@100000").code == ExitCode.USAGE
