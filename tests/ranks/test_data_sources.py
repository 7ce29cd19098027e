"""Data in every form by the real program: equal pixels give equal runs; a user's code the same bits on any ranks."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

import pytest

from tests.launching import launch, results, small_settings, status, train_alone, weights_digest, write_config
from tests.unit.image_folders import write_folder
from tests.unit.image_sets import write_arrays, write_parquet, write_saved, write_shards

pytestmark = pytest.mark.ranks

SIZE = 16
CODE = "tests.unit.drawing_data"


def settings(data: Mapping[str, Any], **sections: Mapping[str, Any]) -> dict[str, Any]:
    whole: dict[str, Mapping[str, Any]] = {
        "batch": {"global_size": 12, "micro_size": 4},
        "model": {"ghost_size": 4, "norm_samples": 8},
        "evaluation": {"batch_size": 5, "train_samples": 10},
    }
    made = small_settings(**{name: {**whole.get(name, {}), **sections.get(name, {})} for name in {*whole, *sections}})
    return {**made, "data": dict(data)}


@pytest.mark.lengthy
def test_equal_pixels_give_equal_runs(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
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
        assert weights_digest(tmp_path / f"run-{name}") == weights_digest(tmp_path / "run-imagefolder")
        assert results(tmp_path / f"run-{name}") == results(tmp_path / "run-imagefolder")


def test_promise_3_and_5_a_users_data_and_augmentation_give_the_same_bits(tmp_path: Path) -> None:
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
    ended = launch(2, "torch", "train", config, "data.loader_workers=1", "--run-dir", str(tmp_path / "two"))
    assert ended.code == 0, ended.output
    ended = launch(3, "torch", "train", config, "run.max_steps=4", "--run-dir", str(tmp_path / "three"))
    assert ended.code == 0, ended.output
    train_alone(config, tmp_path / "three")
    assert any(record["event"] == "resumed" for record in results(tmp_path / "three", ["event"]))
    for name in ("two", "three"):
        assert weights_digest(tmp_path / name) == weights_digest(tmp_path / "alone")
        assert results(tmp_path / name, ["train"]) == results(tmp_path / "alone", ["train"])


def test_a_mistake_in_a_sample_ends_the_run_and_is_named(tmp_path: Path) -> None:
    name = f"{CODE}:broken"
    data = {"name": name, "options": {"index": 13, "how": "raises"}, "shape": [3, 12, 12], "classes": 2}
    config = write_config(tmp_path, settings({**data, "loader_workers": 1}))
    ended = launch(2, "torch", "train", config, "--run-dir", str(tmp_path / "run"))
    assert ended.code == 2, ended.output
    assert "[plugin-failed]" in ended.output
    assert "Traceback" not in ended.output
    assert f"sample 13 of {name}" in status(tmp_path / "run")["reason"]
