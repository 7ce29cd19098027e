"""The unit tests depend on no state: after a demo, in random order, from another folder, in the background."""

from __future__ import annotations

import os
import random
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

from tests.launching import launch, small_settings, write_config

ROOT = Path(__file__).parents[2]
IGNORED = (".git", ".venv*", "__pycache__", ".*_cache", ".hypothesis", "*.egg-info", "build", "runs", "results")
FOREIGN_VARIABLES = {
    "COLUMNS": "30",
    "OMP_NUM_THREADS": "3",
    "SLURM_JOB_ID": "4711",
    "SLURM_RESTART_COUNT": "2",
    "HOROVOD_SIZE": "2",
    # as in a pod of Kubeflow's PyTorchJob; on this port nothing answers
    "RANK": "0",
    "WORLD_SIZE": "2",
    "MASTER_ADDR": "127.0.0.1",
    "MASTER_PORT": "9",
    "DIST_TRAIN_LAUNCH": "another",
}

pytestmark = [pytest.mark.lengthy, pytest.mark.timeout(3600)]


def files_of(folder: Path) -> dict[str, tuple[int, int]]:
    """Return size and modification time of each file below `folder`, except Python's bytecode."""
    found = {path: path.lstat() for path in folder.rglob("*") if path.suffix != ".pyc" and not path.is_dir()}
    return {str(path.relative_to(folder)): (status.st_size, status.st_mtime_ns) for path, status in found.items()}


@pytest.fixture
def checkout(tmp_path: Path) -> Path:
    """A copy of the checkout with the run of a demo."""
    copy = tmp_path / "a checkout"
    shutil.copytree(ROOT, copy, ignore=shutil.ignore_patterns(*IGNORED))
    (copy / "results").symlink_to(ROOT / "results")
    config = write_config(tmp_path, small_settings(run={"name": "demo"}, checkpoint={"every_steps": 4}))
    ended = launch(1, "alone", "train", config, "--run-dir", str(copy / "runs" / "demo"))
    assert ended.code == 0, ended.output
    return copy


@pytest.fixture
def home(tmp_path: Path) -> Path:
    """A home whose caches are full of damaged files."""
    home = tmp_path / "home"
    for name in ("datasets/fashion-mnist/train-images-idx3-ubyte.gz", "decoded/images.npy", "wheels/horovod.whl"):
        file = home / ".cache" / "dist_train" / name
        file.parent.mkdir(parents=True)
        file.write_bytes(b"damaged")
    return home


def test_unit_tests_read_and_write_no_foreign_files(checkout: Path, home: Path, tmp_path: Path) -> None:
    (elsewhere := tmp_path / "elsewhere").mkdir()
    before = files_of(checkout), files_of(home)
    seed = random.SystemRandom().randrange(2**32)
    print(f"--randomly-seed={seed}")
    tests = (checkout / "tests" / "unit", checkout / "tests" / "longer" / "test_monitoring_exporter.py")
    pytest_command = (sys.executable, "-m", "pytest", "-q", "-n", "auto", "-p", "no:cacheprovider")
    shuffled = ("-o", "addopts=-ra --strict-markers --strict-config", f"--randomly-seed={seed}")
    ended = subprocess.run(
        # like a shell's `&` and nohup
        ["sh", "-c", 'trap "" INT HUP; exec "$@"', "sh", *pytest_command, *shuffled, *tests],
        cwd=elsewhere,
        env={
            **os.environ,
            **FOREIGN_VARIABLES,
            "GIT_DIR": str(home / "repository"),  # what commits into it creates it
            "HOME": str(home),
            "XDG_CACHE_HOME": "",
            "PYTHONPATH": os.environ["PYTHONPATH"].replace(str(ROOT), str(checkout)),
            "PYTHONDONTWRITEBYTECODE": "1",
        },
        stdin=subprocess.DEVNULL,
        capture_output=True,
        text=True,
        check=False,
    )
    assert ended.returncode == 0, ended.stdout + ended.stderr
    assert (files_of(checkout), files_of(home)) == before
    assert not list(elsewhere.iterdir())
    assert [path.name for path in Path(os.environ["TMPDIR"]).iterdir() if not path.name.startswith("pytest-of-")] == []
