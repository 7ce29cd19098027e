"""Every number that is not finite is reported: 40 random runs, many of which diverge."""

from __future__ import annotations

import io
import json
import math
import tempfile
from collections.abc import Iterator
from contextlib import redirect_stderr, redirect_stdout
from pathlib import Path
from typing import Any

import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import event as note
from hypothesis import strategies as st
from torch import Tensor
from torch.nn import functional

from dist_train.checkpoint.files import list_checkpoints, read_checkpoint
from dist_train.cli.main import main
from dist_train.config import parse_config
from dist_train.data.images import BatchRequest
from dist_train.data.loader import open_splits
from dist_train.launching.run import train
from dist_train.models import build_model
from dist_train.outcome import DivergedError, ExitCode
from tests.unit.image_folders import write_folder

NETWORKS = {
    "vgg9": (8, 0.03125),
    "vgg16": (32, 0.03125),
    "vgg19": (32, 0.03125),
    "resnet18": (8, 0.125),
    "resnet50": (8, 0.0625),
}
"""Side of the images, and a width at which no 1 x 1 convolution of stride 2 has fewer than 8 channels: for those, the
backward pass of torch 2.13 on CPUs in channels-last layout writes outside its memory."""
PRECISIONS = ["float32", "bfloat16", *(["float16"] if torch.cuda.is_available() else [])]
NOISE = (
    {"method": "none"},
    {"method": "smoothout"},
    {"method": "smoothout", "scale": "filter", "sharing": "micro_batch"},
    {"method": "langevin", "distribution": "normal"},
    {"method": "sam", "sharing": "micro_batch"},
)


def powers(least: int, most: int) -> st.SearchStrategy[float]:
    return st.integers(least, most).map(lambda exponent: 10.0**exponent)


@st.composite
def runs(draw: st.DrawFn) -> dict[str, dict[str, Any]]:
    """Draw the settings of a run of one to three updates, without `data.root` of image folders."""
    model = draw(st.sampled_from(sorted(NETWORKS)))
    size, width = NETWORKS[model]
    synthetic = {"name": "synthetic", "synthetic_samples": 16, "synthetic_shape": [1, size, size]}
    folder = {"name": "imagefolder", "image_size": size, "classes": 3}
    micro_size = draw(st.sampled_from([2, 3, 4, 8]))
    noise = dict(draw(st.sampled_from(NOISE)))
    return {
        "run": {"name": "random", "seed": draw(st.integers(0, 9)), "epochs": 3, "max_steps": draw(st.integers(1, 3))},
        "data": {**draw(st.sampled_from([synthetic, folder])), "normalize": draw(st.booleans())},
        "model": {
            "name": model,
            "width": width,
            "norm": draw(st.sampled_from(["batch", "ghost", "sync", "group", "none"])),
            "ghost_size": draw(st.integers(2, 4)),
            "norm_statistics": draw(st.sampled_from(["auto", "running", "recomputed"])),
            "norm_samples": draw(st.sampled_from([2, 9, 16])),
        },
        "batch": {"global_size": 8, "micro_size": micro_size},
        "noise": {**noise, **({} if noise["method"] == "none" else {"amplitude": draw(powers(-3, 1))})},
        "optimizer": {
            "name": draw(st.sampled_from(["sgd", "adam", "adamw", "lars", "lamb"])),
            "learning_rate": draw(powers(-3, 38)),
            "clip_norm": draw(st.sampled_from([None, 1.0])),
        },
        "precision": {
            "threads": 1,
            "compute": draw(st.sampled_from(PRECISIONS)),
            "channels_last": draw(st.booleans()),
        },
        "evaluation": {"every_epochs": draw(st.integers(0, 1)), "batch_size": 5, "train_samples": 7},
        "checkpoint": {"every_steps": draw(st.sampled_from([None, 1]))},
        "metrics": {"enabled": False},
    }


@pytest.fixture(scope="module")
def images(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_folder(tmp_path_factory.mktemp("images"), suffix=".jpg")


@pytest.mark.usefixtures("threads_as_before")
@settings(max_examples=40, deadline=None, suppress_health_check=list(HealthCheck), derandomize=True)
@given(changes=runs())
def test_every_number_that_is_not_finite_has_its_event_and_exit_code(
    images: Path, changes: dict[str, dict[str, Any]]
) -> None:
    if changes["data"]["name"] == "imagefolder":
        changes["data"]["root"] = str(images)
    with tempfile.TemporaryDirectory() as folder:
        run = Path(folder) / "run"
        code = train_and_check_console(changes, run)
        check(run, code)
        reported = {event["event"] for event in events(run)} & {"not_finite", "non_finite_evaluation"}
        note(f"exit code {code:d}, {', '.join(sorted(reported)) or 'no event'}")


def train_and_check_console(changes: dict[str, dict[str, Any]], run: Path) -> ExitCode:
    with redirect_stdout(io.StringIO()) as console:
        try:
            train(parse_config(changes, source="test"), run)
        except DivergedError:
            return ExitCode.DIVERGED
        finally:
            for event in events(run):
                assert event["event"].replace("_", " ") in console.getvalue()
    return ExitCode.FINISHED


def check(run: Path, code: ExitCode) -> None:
    reported = events(run)
    counted = read_json(run / "counts.json") if (run / "counts.json").exists() else {}
    assert counted == {
        name: sum(event["event"] == name for event in reported) for name in {e["event"] for e in reported}
    }
    status = read_json(run / "status.json")
    assert status["exit_code"] == code
    steps = {event["step"] for event in reported if "finite" in event["event"]}
    for record in records(run):
        if record["kind"] != "event" and None in record.values():
            assert record["step"] in steps, record
    for file in list_checkpoints(run / "checkpoints"):
        read_json(file.path.with_suffix(".json"))
        if not all(tensor.isfinite().all() for tensor in tensors(read_checkpoint(file.path).model)):
            assert {step for step in steps if step >= file.step}, "weights that are not finite were not reported"
    if status["step"] in steps:
        assert code == ExitCode.DIVERGED
    last = list_checkpoints(run / "checkpoints")
    if last and last[-1].step == status["step"]:
        is_finite = all(evaluates_to_finite_loss(run, split) for split in ("train", "test"))
        if code == ExitCode.FINISHED:
            assert is_finite


def evaluates_to_finite_loss(run: Path, split: str) -> bool:
    """Whether `dist-train evaluate` finds a finite loss; its exit code must say the same."""
    with redirect_stdout(io.StringIO()) as out, redirect_stderr(io.StringIO()):
        code = main(["evaluate", str(run), "--split", split])
    loss = parse_json(out.getvalue())["loss"]
    assert code == (ExitCode.DIVERGED if loss is None else ExitCode.FINISHED)
    assert loss is None or math.isfinite(loss)
    return loss is not None


def events(run: Path) -> list[dict[str, Any]]:
    return [record for record in records(run) if record["kind"] == "event"]


def records(run: Path) -> list[dict[str, Any]]:
    path = run / "metrics.jsonl"
    return [parse_json(line) for line in path.read_text().splitlines()] if path.exists() else []


def read_json(path: Path) -> dict[str, Any]:
    return parse_json(path.read_text())


def parse_json(text: str) -> dict[str, Any]:
    def refuse(constant: str) -> None:
        raise AssertionError(f"JSON has no {constant}")

    fields: dict[str, Any] = json.loads(text, parse_constant=refuse)
    return fields


def tensors(value: Any) -> Iterator[Tensor]:
    if isinstance(value, Tensor):
        yield value
    elif isinstance(value, dict):
        for inner in value.values():
            yield from tensors(inner)


def test_very_large_loss_is_finite(images: Path, tmp_path: Path) -> None:
    """The running averages of this ResNet-50 lag behind its weights, so that its test loss is huge, but finite."""
    changes: dict[str, dict[str, Any]] = {
        "run": {"name": "large", "max_steps": 3},
        "data": {"name": "imagefolder", "root": str(images), "image_size": 32, "classes": 3},
        "model": {"name": "resnet50", "width": 0.25, "norm": "batch"},
        "batch": {"global_size": 8, "micro_size": 4},
        "optimizer": {"learning_rate": 0.1},
        "precision": {"threads": 1},
        "metrics": {"enabled": False},
    }
    assert train_and_check_console(changes, tmp_path) == ExitCode.FINISHED
    losses = {record["split"]: record["loss"] for record in records(tmp_path) if record["kind"] == "eval"}
    contents = read_checkpoint(list_checkpoints(tmp_path / "checkpoints")[-1].path)
    model = build_model(parse_config(changes, source="test"))
    model.load_state_dict(contents.model)
    inputs, labels = open_splits(parse_config(changes, source="test").data, 0, torch.device("cpu")).test.read(
        BatchRequest(torch.arange(0, 12))
    )
    with torch.no_grad():
        expected = functional.cross_entropy(model.eval().double()(inputs.double()), labels).item()
    assert expected > 1e7
    assert losses["test"] == pytest.approx(expected, rel=1e-3)
