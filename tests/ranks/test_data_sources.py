"""Every data format in the real program: equal pixels give equal runs; user code is bit-identical on all ranks."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

import pytest

from tests.launching import (
    assert_same_run,
    events,
    launch,
    small_settings,
    status,
    train_alone,
    train_ranks,
    write_config,
)
from tests.unit.image_folders import write_folder
from tests.unit.image_sets import write_arrays, write_parquet, write_saved, write_shards

pytestmark = pytest.mark.ranks

SIZE = 16
CODE = "tests.unit.drawing_data"


def settings(data: Mapping[str, Any], **sections: Mapping[str, Any]) -> dict[str, Any]:
    defaults: dict[str, Mapping[str, Any]] = {
        "batch": {"global_size": 12, "micro_size": 4},
        "model": {"ghost_size": 4, "norm_samples": 8},
        "evaluation": {"batch_size": 5, "train_samples": 10},
    }
    names = {*defaults, *sections}
    merged = small_settings(**{name: {**defaults.get(name, {}), **sections.get(name, {})} for name in names})
    return {**merged, "data": dict(data)}


@pytest.mark.lengthy
def test_equal_pixels_give_equal_runs_in_every_format(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("DIST_TRAIN_CACHE", str(tmp_path / "cache"))
    root = write_folder(tmp_path / "folder")
    folders = {
        "imagefolder": root,
        "parquet": write_parquet(tmp_path / "parquet", root, 3),
        "webdataset": write_shards(tmp_path / "shards", root, 3),
        "huggingface": write_saved(tmp_path / "saved", root, 3),
        "numpy": write_arrays(tmp_path / "arrays", root, 3, SIZE, seed=0),
    }
    for name, folder in folders.items():
        data = {"name": name, "root": str(folder), "classes": 3}
        data |= {"shape": [3, SIZE, SIZE]} if name == "numpy" else {"image_size": SIZE}
        model = {"name": "torchvision:resnet18", "width": 1.0}
        sections: dict[str, Any] = {"run": {"epochs": 1}, "model": model, "noise": {"method": "none"}}
        config = write_config(tmp_path, settings(data, **sections))
        train_alone(config, tmp_path / f"run-{name}")
        assert_same_run(tmp_path / f"run-{name}", tmp_path / "run-imagefolder")


def test_promise_3_and_5_user_data_and_augmentation_are_bit_identical(tmp_path: Path) -> None:
    data = {
        "name": f"{CODE}:drawing",
        "options": {"train": 36},
        "shape": [3, 12, 12],
        "classes": 2,
        "augment": f"{CODE}:erased",
        "normalize": True,
    }
    config = write_config(tmp_path, settings(data, run={"epochs": 2}))
    train_alone(config, tmp_path / "alone")
    run = tmp_path / "run"
    train_ranks(3, "torch", config, run, "data.loader_workers=1", "run.max_steps=4")
    train_alone(config, run)
    assert events(run, "resumed")
    assert_same_run(run, tmp_path / "alone", ["train"])


@pytest.mark.lengthy
def test_error_in_a_sample_ends_the_run_with_a_message_that_names_it(tmp_path: Path) -> None:
    name = f"{CODE}:broken"
    data = {"name": name, "options": {"index": 13, "how": "raises"}, "shape": [3, 12, 12], "classes": 2}
    config = write_config(tmp_path, settings({**data, "loader_workers": 1}))
    ended = launch(2, "torch", "train", config, "--run-dir", str(tmp_path / "run"))
    assert ended.code == 2, ended.output
    assert "[plugin-failed]" in ended.output
    assert "Traceback" not in ended.output
    assert f"sample 13 of {name}" in status(tmp_path / "run")["reason"]
