"""Promise 6: a checkpoint is complete or absent; no disk fault destroys the last good one."""

from __future__ import annotations

import os
import shutil
import signal
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest
import torch

from dist_train.config import parse_config
from dist_train.models import build_model
from dist_train.rundir.paths import RunDirectory
from tests.launching import (
    assert_same_run,
    events,
    final_checkpoint,
    records,
    run_here,
    small_settings,
    train_alone,
    write_config,
)
from tests.torture.disk import can_mount


@pytest.fixture
def small_disk(tmp_path: Path) -> Iterator[Path]:
    """A disk of 600 KiB."""
    disk = tmp_path / "disk"
    disk.mkdir()
    subprocess.run(["mount", "-t", "tmpfs", "-o", "size=600k", "tmpfs", str(disk)], check=True)
    yield disk
    subprocess.run(["umount", str(disk)], check=True)


def test_checkpoint_has_the_documented_contents(tmp_path: Path) -> None:
    settings = small_settings(run={"max_steps": 8})
    train_alone(write_config(tmp_path, settings), tmp_path / "run")
    contents = final_checkpoint(tmp_path / "run")
    required = {"format", "step", "epoch", "model", "optimizer", "config", "metrics"}
    known = {"plugins", "data", "normalization", "class_names", "average", "noise", "grid_exponents"}
    assert contents.keys() == required | known
    build_model(parse_config(contents["config"], source="test")).load_state_dict(contents["model"])
    assert (contents["step"], contents["epoch"]) == (8, 1.0)


@pytest.fixture(scope="module")
def undamaged(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with the run `whole` of 12 steps, and `run`, stopped after 8."""
    folder = tmp_path_factory.mktemp("undamaged")
    config = write_config(folder, small_settings(checkpoint={"every_steps": 3}))
    for name, steps in (("whole", 12), ("run", 8)):
        train_alone(config, folder / name, f"run.max_steps={steps}")
    return folder


@pytest.mark.parametrize("damage", ["truncated", "flipped", "no record"])
def test_damaged_checkpoint_is_reported_and_the_previous_one_used(undamaged: Path, tmp_path: Path, damage: str) -> None:
    config, whole, run = str(undamaged / "config.yaml"), undamaged / "whole", tmp_path / "run"
    shutil.copytree(undamaged / "run", run)
    last = run / "checkpoints" / "step-00000008.pt"
    content = last.read_bytes()
    if damage == "truncated":
        last.write_bytes(content[:-100])
    elif damage == "flipped":
        middle = len(content) // 2
        last.write_bytes(content[:middle] + bytes([content[middle] ^ 1]) + content[middle + 1 :])
    else:
        last.with_suffix(".json").unlink()
    ended = train_alone(config, run, "run.max_steps=12")
    assert "Traceback" not in ended.output
    [resumed] = events(run, "resumed")
    assert resumed["step"] == 6
    if damage != "no record":
        assert "step-00000008.pt is damaged" in ended.output
    assert_same_run(run, whole, ["train"])


@pytest.mark.skipif(not can_mount(), reason="this machine does not let us mount a small disk")
def test_full_disk_is_reported_and_the_last_good_checkpoint_stays(tmp_path: Path, small_disk: Path) -> None:
    config = write_config(tmp_path, small_settings(run={"max_steps": 3}, checkpoint={"keep": 1}))
    run = small_disk / "run"
    train_alone(config, run)
    good = final_checkpoint(run)
    (small_disk / "ballast").write_bytes(b"x" * (_free(small_disk) - 20_000))
    ended = run_here("train", config, "run.max_steps=6", "--run-dir", str(run))
    assert ended.code == 1
    assert "[checkpoint-not-written]" in ended.output
    assert "Traceback" not in ended.output
    after = final_checkpoint(run)
    assert after["step"] == 3
    assert all(torch.equal(after["model"][name], tensor) for name, tensor in good["model"].items())
    (small_disk / "ballast").unlink()
    train_alone(config, run, "run.max_steps=6")
    assert [record["step"] for record in records(run, "train")] == [1, 2, 3, 4, 5, 6]


def test_unwritable_folder_is_reported_in_one_line(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("")
    config = write_config(tmp_path, small_settings())
    ended = run_here("train", config, "--run-dir", str(tmp_path / "file" / "run"))
    assert ended.code == 2
    assert "[run-directory-unwritable]" in ended.output
    assert len(ended.output.splitlines()) == 1


KILLED = """
import os, signal, sys
from pathlib import Path
from dist_train.checkpoint.files import write_checkpoint
from tests.unit.checkpoint_files import contents
write_checkpoint(Path(sys.argv[1]), contents(9), lambda: os.kill(os.getpid(), signal.SIGKILL))
"""


def test_what_a_killed_process_has_left_of_a_checkpoint_is_deleted(tmp_path: Path) -> None:
    elsewhere = tmp_path / "elsewhere"
    config = write_config(tmp_path, small_settings(checkpoint={"fallback_directory": str(elsewhere)}))
    run = RunDirectory(tmp_path / "run")
    train_alone(config, run.root, "run.max_steps=2")
    folders = (run.checkpoints, run.fallback(elsewhere))
    for folder in folders:
        folder.mkdir(parents=True, exist_ok=True)
        killed = subprocess.run([sys.executable, "-c", KILLED, str(folder)], cwd=Path(__file__).parents[2], check=False)
        assert killed.returncode == -signal.SIGKILL
        assert list(folder.glob(".*"))
    (folders[1] / ".records.jsonl.0123456789abcdef.part").touch()
    train_alone(config, run.root, "run.max_steps=3")
    assert [list(folder.glob(".*")) for folder in folders] == [[], []]
    assert final_checkpoint(run.root)["step"] == 3


def _free(disk: Path) -> int:
    stats = os.statvfs(disk)
    return stats.f_bavail * stats.f_frsize
