"""Image folders in the real program: bit-identical on any number of ranks and loaders; kills; damaged images."""

from __future__ import annotations

import os
import signal
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import pytest

from tests.launching import (
    assert_same_run,
    descendants,
    events,
    kill,
    launch,
    results,
    run_here,
    small_settings,
    start,
    status,
    train_alone,
    train_ranks,
    write_config,
)
from tests.unit.image_folders import damage, write_folder
from tests.waiting import PATIENCE, wait_for, wait_for_lines, wait_until_gone

pytestmark = pytest.mark.ranks


def folder_settings(root: Path, loaders: int, **sections: Mapping[str, Any]) -> dict[str, Any]:
    """Return settings of a small run on an image folder: 96 training images, 3 steps per epoch."""
    data = {
        "name": "imagefolder",
        "root": str(root),
        "classes": 3,
        "image_size": 16,
        "augment": "crop-flip",
        "normalize": True,
        "loader_workers": loaders,
    }
    defaults: dict[str, Mapping[str, Any]] = {
        "data": data,
        "batch": {"global_size": 30, "micro_size": 8},
        "evaluation": {"batch_size": 5, "train_samples": 20},
        **sections,
    }
    settings = small_settings(**defaults)
    settings["data"] = data
    return settings


@pytest.fixture(scope="module")
def root(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_folder(tmp_path_factory.mktemp("folder"), per_class=32)


def loaders_of(pid: int) -> list[int]:
    """Return the loader processes below `pid`."""
    found = []
    for child in descendants(pid):
        try:
            words = Path(f"/proc/{child}/cmdline").read_text().split("\0")
        except (FileNotFoundError, ProcessLookupError):
            continue
        if "dist_train.data.loader_workers" in words:
            found.append(child)
    return found


def test_promise_3_bits_do_not_depend_on_ranks_and_loaders(root: Path, tmp_path: Path) -> None:
    train_alone(write_config(tmp_path, folder_settings(root, 0)), tmp_path / "alone")
    two = write_config(tmp_path, folder_settings(root, 1))
    train_ranks(2, "mpi", two, tmp_path / "two")
    assert_same_run(tmp_path / "two", tmp_path / "alone")
    train_ranks(2, "torch", two, tmp_path / "dynamic", "batch.dealing=dynamic")
    assert_same_run(tmp_path / "dynamic", tmp_path / "alone")
    assert {record["split"] for record in results(tmp_path / "two", ["eval"])} == {"train", "test"}


def test_promise_5_killed_run_leaves_no_loader_and_resumes_bit_identically(root: Path, tmp_path: Path) -> None:
    settings = folder_settings(root, 1, run={"epochs": 16}, checkpoint={"every_steps": 4})
    config = write_config(tmp_path, settings)
    train_alone(config, tmp_path / "whole")

    run = tmp_path / "run"
    process = start(2, "mpi", "train", config, "--run-dir", str(run))
    try:
        wait_for(lambda: list((run / "checkpoints").glob("*.json")), "a checkpoint")
        loaders = loaders_of(process.pid)
        assert len(loaders) == 2
        kill_all_but(process.pid, loaders)
        assert process.poll() is None or process.returncode != 0
    finally:
        kill(process)
    wait_until_gone(loaders)  # they end with the process that started them

    config = write_config(tmp_path, folder_settings(root, 2, run={"epochs": 16}, checkpoint={"every_steps": 4}))
    train_alone(config, run)
    assert events(run, "resumed")
    assert_same_run(run, tmp_path / "whole")


def kill_all_but(pid: int, spared: list[int]) -> None:
    for child in {pid, *descendants(pid)} - set(spared):
        try:
            os.kill(child, signal.SIGKILL)
        except ProcessLookupError:
            continue


def test_damaged_image_ends_the_run_with_a_message_that_names_it(tmp_path: Path) -> None:
    broken = damage(write_folder(tmp_path / "folder", per_class=32) / "train" / "bee" / "0007.png")
    config = write_config(tmp_path, folder_settings(tmp_path / "folder", 1))
    ended = launch(2, "mpi", "train", config, "data.normalize=false", "--run-dir", str(tmp_path / "run"))
    assert ended.code == 1
    assert "[image-unreadable]" in ended.output
    assert "Traceback" not in ended.output
    assert str(broken) in status(tmp_path / "run")["reason"]


def test_killed_loader_ends_the_run_with_an_error(root: Path, tmp_path: Path) -> None:
    config = write_config(tmp_path, folder_settings(root, 1, run={"epochs": 50_000}, evaluation={"every_epochs": 0}))
    run = tmp_path / "run"
    process = start(1, "alone", "train", config, "--run-dir", str(run))
    try:
        wait_for_lines(run / "metrics.jsonl", 5)
        os.kill(loaders_of(process.pid)[0], signal.SIGKILL)
        output, _ = process.communicate(timeout=PATIENCE)
    finally:
        kill(process)
    assert process.returncode == 1, output
    assert "[loader-ended]" in output
    assert "Traceback" not in output
    assert status(run)["exit_code"] == 1


def test_ctrl_c_to_the_whole_process_group_saves_and_stops(root: Path, tmp_path: Path) -> None:
    config = write_config(tmp_path, folder_settings(root, 2, run={"epochs": 50_000}, evaluation={"every_epochs": 0}))
    run = tmp_path / "run"
    process = start(1, "alone", "train", config, "--run-dir", str(run))
    try:
        wait_for_lines(run / "metrics.jsonl", 5)
        os.killpg(process.pid, signal.SIGINT)
        output, _ = process.communicate(timeout=PATIENCE)
    finally:
        kill(process)
    assert process.returncode == 75, output
    assert "Traceback" not in output


@pytest.mark.lengthy
def test_wrong_number_of_classes_is_refused(root: Path, tmp_path: Path) -> None:
    config = write_config(tmp_path, folder_settings(root, 1))
    ended = launch(2, "mpi", "train", config, "data.classes=4", "--run-dir", str(tmp_path / "run"))
    assert ended.code == 2
    assert ended.output.count("[class-count]") == 1
    assert "Traceback" not in ended.output


def test_evaluate_reads_the_image_folder(root: Path, tmp_path: Path) -> None:
    config = write_config(tmp_path, folder_settings(root, 1, run={"max_steps": 2}))
    run = tmp_path / "run"
    train_alone(config, run)
    ended = run_here("evaluate", str(run), "--split", "test")
    assert ended.code == 0, ended.output
    final = next(record for record in results(run, ["eval"]) if record["split"] == "test")
    assert f"{final['loss']:.4f}"[:5] in ended.output
