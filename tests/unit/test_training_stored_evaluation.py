"""Evaluation of what a run has saved."""

from __future__ import annotations

import math
import sys
import threading
from collections.abc import Sequence
from contextlib import closing
from pathlib import Path
from unittest.mock import Mock, call

import numpy as np
import pytest
import torch
from safetensors.torch import load_file
from torch import nn
from torch.nn import functional

from dist_train.analysis.landscape_files import LandscapeSettings
from dist_train.analysis.landscape_points import PointEvaluator, open_subject, place_in, place_of
from dist_train.analysis.sharpness_record import SharpnessSettings
from dist_train.analysis.subset_loss import open_stored_subset
from dist_train.api import Format, Run, evaluate, export, load_run
from dist_train.checkpoint.files import find_checkpoint, list_checkpoints, read_checkpoint, read_stored
from dist_train.cluster.communicator import Communicator, SingleProcess
from dist_train.config import Config, ImageFormat
from dist_train.data.images import BatchRequest, Split
from dist_train.data.loader import open_splits
from dist_train.models import build_model
from dist_train.optim.averaging import mean_of
from dist_train.outcome import ExitCode, PeerFailedError, UsageError
from dist_train.rundir.paths import RunDirectory
from dist_train.rundir.status import StatusFile
from dist_train.training import evaluation
from dist_train.training.compute import Compute, set_up_compute
from dist_train.training.evaluation import StoredEvaluation, evaluate_stored, stored_config, stored_model
from tests.raising import raises, raises_problems
from tests.unit.checkpoint_files import write
from tests.unit.image_folders import write_folder
from tests.unit.simulated_ranks import on_ranks
from tests.unit.small_trainers import build_trainer, small_config
from tests.unit.test_rundir_metrics_file import files_limited_to

pytestmark = pytest.mark.usefixtures("threads_as_before")


@pytest.fixture(scope="module")
def run(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("run")
    build_trainer(small_config(data={"normalize": True}), folder, SingleProcess()).run()
    return folder


class TestFinding:
    def test_a_run_stands_for_its_last_checkpoint(self, run: Path) -> None:
        assert find_checkpoint(run) == run / "checkpoints" / "step-00000006.pt"

    def test_a_checkpoint_stands_for_itself(self, run: Path) -> None:
        path = run / "checkpoints" / "step-00000003.pt"
        assert find_checkpoint(path) == path

    def test_a_run_is_named_below_runs_and_its_checkpoints_by_step_or_as_the_best(
        self, run: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        (tmp_path / "runs").mkdir()
        (tmp_path / "runs" / "demo").symlink_to(run)
        monkeypatch.chdir(tmp_path)
        checkpoints = Path("runs/demo/checkpoints")
        last = list_checkpoints(checkpoints)[-1]
        assert find_checkpoint(Path("demo")) == last.path
        assert find_checkpoint(Path("demo@3")) == checkpoints / "step-00000003.pt"
        assert find_checkpoint(Path("demo@best")) == checkpoints / f"step-{last.metrics['best_saved_step']:08d}.pt"
        with raises(UsageError, "checkpoint-missing"):
            find_checkpoint(Path("demo@4"))
        with raises(UsageError, "target-missing") as refused:
            find_checkpoint(Path("dmo"))
        assert "did you mean runs/demo?" in str(refused.value)

    def test_what_is_not_there_is_told(self, tmp_path: Path) -> None:
        with raises(UsageError, "target-missing"):
            find_checkpoint(tmp_path / "nowhere")
        with raises(UsageError, "target-missing") as refused:
            find_checkpoint(tmp_path / "step-00000003.pt")
        assert "no file" in str(refused.value)
        with raises(UsageError, "target-missing"):  # a folder, but not of a run
            find_checkpoint(tmp_path)
        (tmp_path / "status.json").touch()
        with raises(UsageError, "no-checkpoint") as refused:
            find_checkpoint(tmp_path)
        assert "wait for" in str(refused.value)
        StatusFile(tmp_path / "status.json", 1).end("failed", ExitCode.USAGE, "")
        with raises(UsageError, "no-checkpoint") as refused:
            find_checkpoint(tmp_path)
        assert "has ended" in str(refused.value)
        run = RunDirectory(tmp_path)
        run.create()
        (lost := write(run.checkpoints, 2).path).unlink()
        with raises(UsageError, "no-checkpoint") as refused:
            find_checkpoint(tmp_path)
        assert str(lost) in str(refused.value)
        assert "fallback" not in str(refused.value)
        run.config.write_text(f"checkpoint: {{fallback_directory: {tmp_path / 'spare'}}}\n")
        run.fallback(tmp_path / "spare").mkdir(parents=True)
        written = write(run.fallback(tmp_path / "spare"), 3)
        with raises(UsageError, "no-checkpoint") as refused:
            find_checkpoint(tmp_path)
        assert str(written.path) in str(refused.value)


@pytest.mark.parametrize(("split", "samples"), [("train", 100), ("test", 25)])
def test_it_is_loss_and_accuracy_over_the_whole_split(run: Path, split: str, samples: int) -> None:
    result = evaluate_stored(run, split, [])  # type: ignore[arg-type]
    contents = read_checkpoint(find_checkpoint(run))
    config = stored_config(contents, [])
    model = build_model(config).eval()
    model.load_state_dict(contents.model)
    inputs, labels = getattr(open_splits(config.data, 0, torch.device("cpu")), split).read(
        BatchRequest(torch.arange(0, samples))
    )
    with torch.no_grad():
        logits = model(inputs)
    assert result["loss"] == pytest.approx(functional.cross_entropy(logits, labels).item(), rel=1e-5)
    assert result["accuracy"] == (logits.argmax(1) == labels).sum().item() / samples
    assert (result["samples"], result["split"], result["step"], result["epoch"]) == (samples, split, 6, 2.0)
    assert result["checkpoint"] == str(find_checkpoint(run))


def test_a_model_that_does_not_fit_the_memory_is_told(run: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def build(config: Config) -> nn.Module:
        raise torch.OutOfMemoryError("CUDA out of memory")

    monkeypatch.setattr(evaluation, "build_model", build)
    with raises(UsageError, "out-of-memory"):
        evaluate_stored(run, "test", [])


def test_other_data_than_those_of_the_run_are_told(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    root = write_folder(tmp_path / "data", per_class=10)
    data = {"name": "imagefolder", "root": root, "classes": 3, "image_size": 16}
    with closing(build_trainer(small_config(data=data), tmp_path / "run", SingleProcess())) as trainer:
        trainer.run()
    moved = root.rename(tmp_path / "elsewhere")
    evaluate_stored(tmp_path / "run", "test", [f"data.root={moved}"])
    assert not caplog.records
    (moved / "val" / "bee" / "0000.png").unlink()
    assert evaluate_stored(tmp_path / "run", "test", [f"data.root={moved}"])["samples"] == 11
    assert str(find_checkpoint(tmp_path / "run")) in caplog.text


def test_other_data_are_normalized_as_the_model_s_were_in_training(tmp_path: Path) -> None:
    images = np.random.default_rng(0).integers(0, 120, (16, 3, 8, 8), dtype=np.uint8)
    labels = np.arange(16) % 2
    for name, pixels in (("here", images), ("there", images // 2 + 100)):
        (tmp_path / name).mkdir()
        for split in ("train", "test"):
            np.save(tmp_path / name / f"{split}_images.npy", pixels)
            np.save(tmp_path / name / f"{split}_labels.npy", labels)
    data = {"name": "numpy", "root": tmp_path / "here", "shape": [3, 8, 8], "classes": 2, "normalize": True}
    batches = {"batch": {"global_size": 8, "micro_size": 8}, "evaluation": {"batch_size": 16, "train_samples": 0}}
    config = small_config(data=data, **batches)
    build_trainer(config, tmp_path / "run", SingleProcess()).run()
    run = load_run(tmp_path / "run", [f"data.root={tmp_path / 'there'}"])
    statistics = run.normalization()
    assert statistics
    mean, deviation = (torch.tensor(each)[:, None, None] for each in (statistics.mean, statistics.deviation))
    inputs = (torch.from_numpy(images // 2 + 100) / 255 - mean) / deviation
    [(found, _)] = run.batches("test")
    torch.testing.assert_close(found, inputs)
    with torch.no_grad():
        expected = functional.cross_entropy(run.model()(inputs), torch.from_numpy(labels)).item()
    assert run.evaluate("test")["loss"] == pytest.approx(expected, rel=1e-5)


def test_a_class_that_had_another_name_in_training_is_told(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    root = write_folder(tmp_path / "data", per_class=10)
    data = {"name": "imagefolder", "root": root, "classes": 3, "image_size": 16}
    with closing(build_trainer(small_config(data=data), tmp_path / "run", SingleProcess())) as trainer:
        trainer.run()
    for split in ("train", "val"):
        (root / split / "bee").rename(root / split / "ape")
    caplog.clear()
    evaluate_stored(tmp_path / "run", "test", [])
    stored = read_stored(tmp_path / "run")
    open_subject(stored, [], LandscapeSettings("direction", -1.0, 1.0, 3), local_rank=0)
    open_stored_subset(stored, SharpnessSettings(), [])
    assert caplog.messages == 3 * [
        f"the data set is not that with which {stored.path} was trained: files or labels differ",
        "label 1 is the class ape here, but was bee in training",
    ]


def test_it_is_what_the_run_itself_measured(run: Path) -> None:
    result = evaluate_stored(run, "test", [])
    assert result["accuracy"] == list_checkpoints(run / "checkpoints")[-1].metrics["test_accuracy"]


def tied(images: ImageFormat, width: float, norm: object) -> nn.Module:
    """Return a network of which two layers have the same weights."""
    inputs, first, second = nn.Linear(math.prod(images.shape), 8), nn.Linear(8, 8), nn.Linear(8, 8)
    second.weight = first.weight
    return nn.Sequential(nn.Flatten(), inputs, first, nn.ReLU(), second, nn.ReLU(), nn.Linear(8, images.classes))


def test_tied_parameters_are_averaged_and_exported_under_both_names(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    averaging = {"kind": "lawa", "every_steps": 2}
    build_trainer(
        small_config(model={"name": f"{__name__}:tied"}, averaging=averaging), tmp_path, SingleProcess()
    ).run()
    contents = read_checkpoint(find_checkpoint(tmp_path))
    model = stored_model(contents, stored_config(contents, []), "averaged")
    expected = mean_of([row["2.weight"] for row in contents.average["kept"]])
    assert torch.equal(model.get_parameter("2.weight"), expected)
    assert not torch.equal(model.get_parameter("2.weight"), contents.model["2.weight"])
    monkeypatch.chdir(tmp_path)
    raw, averaged = (export(tmp_path, "safetensors", weights=weights).path for weights in ("raw", "averaged"))
    assert raw != averaged
    written = load_file(averaged)
    assert torch.equal(written["2.weight"], expected)
    assert torch.equal(written["4.weight"], expected)


class Silent(nn.Sequential):
    """A network whose method `train` returns nothing, a usual mistake."""

    def train(self, mode: bool = True) -> None:  # type: ignore[override]
        super().train(mode)


def silent(images: ImageFormat, width: float, norm: object) -> nn.Module:
    return Silent(nn.Flatten(), nn.Linear(math.prod(images.shape), images.classes), nn.Dropout())


def test_a_model_whose_method_train_returns_nothing_is_trained_exported_and_moved(tmp_path: Path) -> None:
    build_trainer(small_config(model={"name": f"{__name__}:silent"}), tmp_path, SingleProcess()).run()
    assert export(tmp_path, "safetensors", tmp_path / "model").difference == 0
    model = Run(RunDirectory(tmp_path)).model()
    assert not any(module.training for module in model.modules())
    batch = torch.zeros(2, *small_config().data.image_format.shape), torch.tensor([0, 1])
    evaluator = PointEvaluator(model, [[batch]], [], Compute(torch.device("cpu"), torch.float32))
    [measured] = evaluator.evaluate(place_of(model))
    assert measured.loss == pytest.approx(functional.cross_entropy(model(batch[0]), batch[1]).item(), rel=1e-6)


def test_an_export_is_named_after_the_folder_of_its_run(run: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(run)
    for target in (Path("."), find_checkpoint(Path("."))):
        written = export(target, "safetensors")
        assert written.path == Path(f"{run.name}-{written.step:08d}.safetensors")
        written.path.unlink()


def halved(images: ImageFormat, width: float, norm: object) -> nn.Module:
    """Return a network that writes half of its weights."""
    model = nn.Sequential(nn.Flatten(), nn.Linear(math.prod(images.shape), images.classes))

    def halve(module: nn.Module, state: dict[str, torch.Tensor], *_: object) -> None:
        state.update({name: value / 2 for name, value in state.items()})

    model.register_state_dict_post_hook(halve)
    return model


def test_an_export_compares_the_file_with_the_model_before(tmp_path: Path) -> None:
    build_trainer(small_config(model={"name": f"{__name__}:halved"}), tmp_path, SingleProcess()).run()
    assert export(tmp_path, "safetensors", tmp_path / "model").difference > 0


@pytest.mark.parametrize("to", ["safetensors", "torch-export"])
def test_an_export_to_a_full_disk_is_refused(run: Path, tmp_path: Path, to: Format) -> None:
    with files_limited_to(1000), raises(UsageError, code="output-unwritable"):
        export(run, to, tmp_path / "model")
    assert not any(tmp_path.iterdir())


def evaluated_on_ranks(
    size: int, monkeypatch: pytest.MonkeyPatch, run: Path, split: Split, overrides: Sequence[str] = ()
) -> list[StoredEvaluation | Exception]:
    here = threading.local()
    monkeypatch.setattr(evaluation, "join_to_measure", lambda **_: here.comm)

    def evaluated(comm: Communicator) -> StoredEvaluation:
        here.comm = comm
        return evaluate_stored(run, split, overrides)

    return on_ranks(size, evaluated)


def test_promise_3_it_has_the_same_bits_on_any_number_of_ranks(run: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    expected = evaluate_stored(run, "test", [])
    looks = Mock(side_effect=find_checkpoint)
    monkeypatch.setattr(evaluation, "find_checkpoint", looks)
    assert evaluated_on_ranks(3, monkeypatch, run, "test") == [expected] * 3
    assert looks.call_args_list == [call(run)], "each rank alone could find another last checkpoint, if the run trains"


@pytest.mark.parametrize(
    ("split", "overrides", "code"),
    [("validation", (), "no-validation"), ("test", ("optimizer.name=adam",), "settings-changed")],
)
def test_what_all_ranks_refuse_is_reported_once(
    run: Path, monkeypatch: pytest.MonkeyPatch, split: Split, overrides: Sequence[str], code: str
) -> None:
    ended = evaluated_on_ranks(2, monkeypatch, run, split, overrides)
    assert [getattr(each, "code", "") for each in ended] == [code, PeerFailedError.code]


def test_settings_may_be_overridden_for_this_machine(run: Path) -> None:
    contents = read_checkpoint(find_checkpoint(run))
    config = stored_config(contents, ["evaluation.batch_size=3", "data.root=/elsewhere"])
    assert (config.evaluation.batch_size, config.data.root) == (3, Path("/elsewhere"))
    assert config.model == stored_config(contents, []).model
    few = evaluate_stored(run, "test", ["evaluation.batch_size=3"])
    many = evaluate_stored(run, "test", [])
    assert few["accuracy"] == many["accuracy"]
    assert math.isclose(float(str(few["loss"])), float(str(many["loss"])), rel_tol=1e-6)


def test_a_run_whose_logger_is_gone_can_be_evaluated(run: Path) -> None:
    contents = read_checkpoint(find_checkpoint(run))
    contents.config["metrics"]["loggers"] = [{"name": "/gone/logs.py:silent", "options": {}}]
    assert stored_config(contents, []).metrics.loggers == ()


def test_a_run_whose_plug_in_has_moved_is_read_at_its_new_place(tmp_path: Path) -> None:
    file, moved = tmp_path / "before" / "mine.py", tmp_path / "after" / "mine.py"
    file.parent.mkdir()
    file.write_text(f"from {__name__} import tied\n")
    build_trainer(small_config(model={"name": f"{file}:tied"}), tmp_path / "run", SingleProcess()).run()
    file.parent.rename(moved.parent)
    forget(file)
    with raises_problems(("model.name", "plugin-import")) as refused:
        load_run(tmp_path / "run").model()
    assert "if it has moved" in str(refused.value)
    there = [f"model.name={moved}:tied"]
    run = load_run(tmp_path / "run", there)
    assert (run.config.model.name, run.evaluate()["step"]) == (f"{moved}:tied", 6)
    assert run.evaluate(overrides=["evaluation.batch_size=8"])["samples"] == 25
    for one in (there[0], {"model.name": f"{moved}:tied"}):  # as load_config takes them
        again = load_run(tmp_path / "run", one)
        assert again.config.model.name == f"{moved}:tied"
        assert again.evaluate(overrides="evaluation.batch_size=8")["samples"] == 25
    assert load_run(run, "evaluation.batch_size=8").config.evaluation.batch_size == 8
    assert (
        load_run(run).evaluate()["step"] == evaluate(run)["step"] == export(run, "safetensors", tmp_path / "one").step
    )
    assert repr(run) == f"Run({str(tmp_path / 'run')!r}, {there[0]!r})"
    with torch.no_grad():
        assert run.model()(torch.rand(3, *run.config.data.image_format.shape)).isfinite().all()
    assert export(tmp_path / "run", "safetensors", tmp_path / "model", overrides=there).difference == 0
    first, last = (read_stored(run.checkpoint(step)) for step in (3, 6))
    subject = Mock(config=run.config, model=run.model())
    assert not torch.equal(place_in(first, subject).weights, place_in(last, subject).weights)


def test_a_plug_in_that_was_edited_since_is_told(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    file = tmp_path / "mine.py"
    file.write_text(f"from {__name__} import tied\n")
    build_trainer(small_config(model={"name": f"{file}:tied"}), tmp_path / "run", SingleProcess()).run()
    run = load_run(tmp_path / "run")
    run.model()
    assert not caplog.records
    file.write_text(f"from {__name__} import tied  # edited\n")
    forget(file)
    told = f"plug-ins have changed since the checkpoint of step 6 was saved: {tmp_path.name}/mine.py"
    for read in (run.model, run.evaluate, lambda: export(tmp_path / "run", "safetensors", tmp_path / "model")):
        caplog.clear()
        read()
        assert caplog.messages == [told]


def forget(file: Path) -> None:
    """Let the plug-in in `file` be unknown to this process."""
    for name in [name for name, module in sys.modules.items() if getattr(module, "__file__", None) == str(file)]:
        del sys.modules[name]


def test_run_with_cuda_graphs_can_be_evaluated_on_a_cpu(run: Path) -> None:
    contents = read_checkpoint(find_checkpoint(run))
    contents.config["run"]["device"], contents.config["precision"]["cuda_graphs"] = "cuda", True
    config = stored_config(contents, ["run.device=cpu"])
    set_up_compute(config.precision, torch.device("cpu"))


def test_promise_6_a_damaged_checkpoint_is_told(tmp_path: Path) -> None:
    write(tmp_path, 1).path.write_bytes(b"")
    with raises(UsageError, "checkpoint-size"):
        evaluate_stored(tmp_path / "step-00000001.pt", "test", [])
