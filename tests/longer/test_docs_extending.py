"""The example of `docs/extending.md` trains as the page says, in a folder outside the package."""

from __future__ import annotations

import json
import re
from pathlib import Path
from typing import Any

import pytest
import torch
from torch.nn.functional import binary_cross_entropy_with_logits

from dist_train.api import load_run
from dist_train.cli.main import main
from dist_train.config import load_config
from dist_train.config.plugins import plugin_files
from dist_train.launching.run import train
from dist_train.models import build_model
from dist_train.outcome import UsageError
from dist_train.rundir.records import TrainRecord
from tests.launching import launch, train_alone
from tests.raising import raises, raises_problems

PAGE = (Path(__file__).parents[2] / "docs" / "extending.md").read_text(encoding="utf-8")
FILES = dict(re.findall(r"```(?:python|yaml)\n# (\S+)\n(.*?)```", PAGE, re.DOTALL))


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with the page's files, and their runs on one rank and on two."""
    folder = tmp_path_factory.mktemp("mine")
    for name, content in FILES.items():
        (folder / name).write_text(content)
    for ranks, name in ((1, "mine"), (2, "two")):
        controller = "torch" if ranks > 1 else "alone"
        words = ("train", str(folder / "mine.yaml"), f"run.name={name}", f"run.directory={folder / 'runs'}")
        ended = launch(ranks, controller, *words, "metrics.enabled=false")
        assert ended.code == 0, ended.output
        assert "no effect" not in ended.output
    return folder


def saved(folder: Path, name: str) -> Any:
    return torch.load(folder / "runs" / name / "checkpoints" / "step-00000002.pt", weights_only=True)


def test_run_uses_everything_that_the_page_adds(folder: Path) -> None:
    run = folder / "runs" / "mine"
    records = [json.loads(line) for line in (run / "metrics.jsonl").read_text().splitlines()]
    trained = [record for record in records if record["kind"] == "train"]
    assert [record["noise_amplitude"] for record in trained] == [0.1, 0.0]
    assert [record["learning_rate"] for record in trained] == [0.01, 0.00875]
    [test] = [record for record in records if record["kind"] == "eval" and record["split"] == "test"]
    assert test["samples"] == 64
    assert saved(folder, "mine")["model"]["1.weight"].shape == (32, 64)
    states = saved(folder, "mine")["optimizer"]["state"].values()
    assert {name for state in states for name in state} == {"square_avg", "step"}
    assert len((run / "lines.txt").read_text().splitlines()) >= len(records) - 1


def test_two_ranks_are_bit_identical_to_one(folder: Path) -> None:
    one, two = (saved(folder, name)["model"] for name in ("mine", "two"))
    assert all(torch.equal(one[name], two[name]) for name in one)


def test_run_resumes_and_is_reported(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(folder)
    for last in (1, 2):
        train_alone("mine.yaml", Path("runs/stopped"), "metrics.enabled=false", f"run.max_steps={last}")
    whole, resumed = (saved(folder, name)["model"] for name in ("mine", "stopped"))
    assert all(torch.equal(whole[name], resumed[name]) for name in whole)
    assert main(["report", "runs/stopped", "-o", "report.html"]) == 0
    assert "perceptron" in (folder / "report.html").read_text()


def test_parts_of_a_model_have_rates_of_their_own(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(folder)
    tuning = ("run.init_from=runs/mine", "optimizer.name=rates.py:slower_body", "metrics.enabled=false")
    train_alone("mine.yaml", Path("runs/tuned"), *tuning, 'optimizer.options={"head": "4.", "factor": 0.1}')
    rates = [group["lr"] for group in saved(folder, "tuned")["optimizer"]["param_groups"]]
    assert rates == pytest.approx([0.00875] * 2 + [0.000875] * 4)


def test_classes_have_weights_in_the_loss(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(folder)
    for weights in ([1.0, 3.0], [2.0, 6.0]):
        options = (f"loss.options={{'weights': {weights}}}", "loss.name=weights.py:weighted", "run.max_steps=1")
        train_alone("mine.yaml", Path(f"runs/{weights}"), *options, "metrics.enabled=false")
    once, twice = (load_run(f"{folder}/runs/{weights}").records for weights in ("[1.0, 3.0]", "[2.0, 6.0]"))
    [[first], [second]] = ([each for each in run if isinstance(each, TrainRecord)] for run in (once, twice))
    assert second.loss == pytest.approx(2 * first.loss)


def test_sets_of_labels_are_classes_with_the_loss_of_their_labels(
    folder: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(folder)
    train_alone("labels.yaml", Path("runs/labels"), "metrics.enabled=false")
    run = load_run("runs/labels")
    network, measured = run.model().get_submodule("network"), run.evaluate("test")
    losses: list[float] = []
    right: list[bool] = []
    with torch.no_grad():
        for images, classes in run.batches("test"):
            logits, labels = network(images), classes[:, None] >> torch.arange(3) & 1
            losses += binary_cross_entropy_with_logits(logits, labels.float(), reduction="none").sum(1).tolist()
            right += ((logits > 0) == labels).all(1).tolist()
    assert measured["loss"] == pytest.approx(sum(losses) / len(losses), rel=1e-4)
    assert measured["accuracy"] == sum(right) / len(right) > 0.9


def test_installed_package_provides_names_by_entry_points(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, folder: Path
) -> None:
    package = tmp_path / "site"
    (package / "stripes-1.0.dist-info").mkdir(parents=True)
    (package / "stripes_package.py").write_text(FILES["mine.py"])
    (package / "stripes-1.0.dist-info" / "METADATA").write_text("Metadata-Version: 2.1\nName: stripes\nVersion: 1.0\n")
    names = re.findall(r'register\("(\w+)", "(\w+)"\)\n(?:class|def) (\w+)', FILES["mine.py"])
    points = "".join(f"[dist_train.{kind}]\n{name} = stripes_package:{target}\n" for kind, name, target in names)
    (package / "stripes-1.0.dist-info" / "entry_points.txt").write_text(points)
    monkeypatch.syspath_prepend(package)
    (tmp_path / "installed.yaml").write_text(FILES["mine.yaml"].replace("plugins: [mine.py]", ""))
    words = ("--run-dir", str(tmp_path / "runs" / "mine"), "metrics.enabled=false")
    ended = launch(2, "torch", "train", str(tmp_path / "installed.yaml"), *words, extra={"PYTHONPATH": str(package)})
    assert ended.code == 0, ended.output
    mine, installed = (saved(each, "mine")["model"] for each in (folder, tmp_path))
    assert all(torch.equal(mine[name], installed[name]) for name in mine)
    assert load_config(tmp_path / "installed.yaml").model.name == "stripes_package:perceptron"


def test_run_records_its_plugins_and_their_changes(folder: Path) -> None:
    [(name, digest)] = saved(folder, "mine")["plugins"].items()
    assert name == f"{folder.name}/mine.py"
    status = json.loads((folder / "runs" / "mine" / "status.json").read_text())
    assert status["environment"][f"plug-in {name}"] == digest
    (folder / "mine.py").write_text(FILES["mine.py"] + "\n# changed\n")
    words = ("train", str(folder / "runs" / "mine" / "config.yaml"), "run.max_steps=3")
    ended = launch(1, "alone", *words, "--run-dir", str(folder / "runs" / "mine"))
    (folder / "mine.py").write_text(FILES["mine.py"])
    assert ended.code == 0, ended.output
    events = (folder / "runs" / "mine" / "metrics.jsonl").read_text()
    assert '"plugins_changed"' in events


def test_a_noise_of_one_s_own_is_the_same_on_all_ranks(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(folder)
    for ranks, controller in ((1, "alone"), (2, "torch")):
        ended = launch(ranks, controller, "train", "gradient.yaml", f"run.name={controller}", "run.max_steps=2")
        assert ended.code == 0, ended.output
    one, two = (saved(folder, name)["model"] for name in ("alone", "torch"))
    assert all(torch.equal(one[name], two[name]) for name in one)
    first, second = (each for each in load_run("alone").records if isinstance(each, TrainRecord))
    assert first.noise_amplitude == 0.01
    assert second.noise_amplitude == pytest.approx(0.01 * 2**-0.275)


def test_short_example_has_a_run_of_its_own(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(folder)
    small = ("data.name=synthetic", "data.synthetic_samples=64", "batch.global_size=32", "batch.micro_size=16")
    ended = launch(1, "alone", "train", "short.yaml", *small, "run.max_steps=1")
    assert ended.code == 0, ended.output
    assert load_run("short").config.model.name == f"{folder / 'short.py'}:perceptron"


def test_short_example_works_without_registration(folder: Path) -> None:
    config = load_config("dist_train:configs/demo.yaml", [f"model.name={folder / 'short.py'}:perceptron"])
    assert build_model(config)(torch.zeros(2, *config.data.image_format.shape)).shape == (2, 10)


@pytest.mark.parametrize(
    ("override", "path", "code"),
    [
        ("model.options.hidden=0", "model.options.hidden", "out-of-range"),
        ("model.options.hiden=3", "model.options.hiden", "unknown-key"),
        ("data.options.colour=red", "data.options", "plugin-options"),
        ("model.name=perceptrum", "model.name", "no-such-choice"),
        ("noise.scale=mine.py:rooot", "noise.scale", "plugin-missing"),
        ("optimizer.name=no_such_package:rmsprop", "optimizer.name", "plugin-import"),
        ("data.shape=null", "data.shape", "plugin-data-form"),
    ],
)
def test_invalid_option_is_one_problem(
    folder: Path, monkeypatch: pytest.MonkeyPatch, override: str, path: str, code: str
) -> None:
    monkeypatch.chdir(folder)
    with raises_problems((path, code)):
        load_config(folder / "mine.yaml", [override])


BROKEN = """
from torch import nn
from torch.utils.data import Dataset

def raises(*_, **__):
    raise ValueError("no such depth")

def nothing(*_, **__):
    return None

def too_narrow(images, width, norm):
    return nn.Sequential(nn.Flatten(), nn.Linear(64, 1))

def yields_no_more(noise, weights, filters, drawn, amplitude, unit):
    yield from drawn
    raise ValueError("no such part")

class Torn(Dataset):
    def __init__(self, settings, split, seed): ...
    def __len__(self): return 256
    def __getitem__(self, index): raise OSError("a torn file")
"""


@pytest.mark.parametrize(
    ("override", "code"),
    [
        ("model={name: broken.py:raises, options: {}}", "plugin-failed"),
        ("model={name: broken.py:nothing, options: {}}", "plugin-result"),
        ("model={name: broken.py:too_narrow, options: {}}", "plugin-result"),
        ("data={name: broken.py:raises, shape: [1, 8, 8], classes: 2}", "plugin-failed"),
        ("data={name: broken.py:nothing, shape: [1, 8, 8], classes: 2}", "plugin-result"),
        ("data={name: broken.py:Torn, shape: [1, 8, 8], classes: 2}", "plugin-failed"),
        ("noise={method: smoothout, amplitude: 0.1, scale: broken.py:yields_no_more}", "plugin-failed"),
        ("noise={method: smoothout, amplitude: 0.1, scale: broken.py:nothing}", "plugin-result"),
        ("noise={method: broken.py:nothing}", "plugin-result"),
        ("optimizer={name: broken.py:nothing}", "plugin-result"),
        ("schedule={decay: broken.py:raises}", "plugin-failed"),
        ("metrics={enabled: false, loggers: [{name: broken.py:raises}]}", "plugin-failed"),
        ("metrics={enabled: false, loggers: [{name: broken.py:nothing}]}", "plugin-result"),
    ],
)
def test_failing_plugin_ends_the_run_with_an_error_code(
    folder: Path, monkeypatch: pytest.MonkeyPatch, tmp_path: Path, override: str, code: str
) -> None:
    monkeypatch.chdir(folder)
    (folder / "broken.py").write_text(BROKEN)
    with raises(UsageError, code):
        train(load_config("mine.yaml", ["metrics.enabled=false", override]), tmp_path / "run")


def test_logger_that_fails_during_the_run_is_disabled(folder: Path, tmp_path: Path) -> None:
    (folder / "breaks.py").write_text(
        "import dist_train\n\n"
        "class Breaks(dist_train.Observer):\n"
        "    def __init__(self, directory): ...\n"
        "    def record(self, record): raise OSError('the server is gone')\n"
    )
    logger = f"metrics={{enabled: false, loggers: [{{name: '{folder}/breaks.py:Breaks'}}]}}"
    train_alone(str(folder / "mine.yaml"), tmp_path / "run", logger)
    logged = (tmp_path / "run" / "logs" / "rank-0.log").read_text()
    assert logged.count("Breaks failed and is disabled") == 1
    whole, other = (
        saved(folder, "mine")["model"],
        torch.load(tmp_path / "run" / "checkpoints" / "step-00000002.pt", weights_only=True)["model"],
    )
    assert all(torch.equal(whole[name], other[name]) for name in whole)


def test_logger_that_fails_at_the_start_ends_all_ranks(folder: Path, tmp_path: Path) -> None:
    (folder / "broken.py").write_text(BROKEN)
    logger = f"metrics={{enabled: false, loggers: [{{name: '{folder}/broken.py:raises'}}]}}"
    ended = launch(2, "torch", "train", str(folder / "mine.yaml"), logger, "--run-dir", str(tmp_path / "run"))
    assert ended.code == 2, ended.output
    assert "Traceback" not in ended.output
    assert "broken.py:6" in ended.output


def test_plugin_file_can_be_given_on_the_command_line(folder: Path) -> None:
    config = load_config(
        Path("dist_train:configs/demo.yaml"), ["model.name=perceptron"], plugins=[str(folder / "mine.py")]
    )
    assert config.model.name == f"{folder / 'mine.py'}:perceptron"
    assert f"{folder.name}/mine.py" in plugin_files(config.model_dump(mode="json"))
