"""The real trackio, wandb and MLflow, offline: their data equals `metrics.jsonl`, also after a kill.

They are installed in `.venv-loggers`, on top of this environment, since some need other versions of packages.
"""

from __future__ import annotations

import hashlib
import json
import math
import os
import shutil
import subprocess
import sys
import sysconfig
import tomllib
import venv
from pathlib import Path
from typing import Any

import pytest

from tests.launching import environment, events, records, small_settings, write_config
from tests.waiting import PATIENCE

pytestmark = pytest.mark.lengthy

ROOT = Path(__file__).parents[2]
FOLDER = ROOT / ".venv-loggers"
LOGGERS = ("trackio", "wandb", "mlflow")


@pytest.fixture(scope="module")
def python() -> Path:
    """The Python of `.venv-loggers`, which is created in 15 seconds unless it matches pyproject.toml."""
    extras = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]["optional-dependencies"]
    required = [requirement for name in LOGGERS for requirement in extras[name]]
    ours = sysconfig.get_path("purelib")
    digest = hashlib.sha256("\n".join([*required, ours]).encode()).hexdigest()
    record, executable = FOLDER / "digest", FOLDER / "bin" / "python"
    if not record.is_file() or record.read_text() != digest:
        shutil.rmtree(FOLDER, ignore_errors=True)
        venv.create(FOLDER, symlinks=True)
        packages = sysconfig.get_path("purelib", "venv", {"base": str(FOLDER), "platbase": str(FOLDER)})
        (Path(packages) / "ours.pth").write_text(f"import site; site.addsitedir({ours!r})\n")
        pip = [sys.executable, "-m", "pip", "--python", str(executable), "install", "--quiet", "--no-compile"]
        ended = subprocess.run([*pip, *required], capture_output=True, text=True, timeout=2 * PATIENCE)
        if ended.returncode != 0 and "connection broken" in ended.stderr:
            pytest.skip(f"no package index can be reached, to install {', '.join(LOGGERS)} from")
        assert ended.returncode == 0, ended.stderr
        record.write_text(digest)
    return executable


def run_python(python: Path, folder: Path, *words: str, code: int = 0) -> str:
    """Return the output of `python WORDS`, offline, with the libraries' files in `folder`."""
    files = {"PYTHONPATH": str(ROOT), "TRACKIO_DIR": str(folder / "trackio"), "MLFLOW_TRACKING_URI": uri(folder)}
    offline = {"HF_HUB_OFFLINE": "1", "MLFLOW_DISABLE_TELEMETRY": "true", "WANDB_ERROR_REPORTING": "false"}
    variables = {**environment(**files, **offline), "PATH": f"{python.parent}:{os.environ['PATH']}"}
    ended = subprocess.run(
        [str(python), *words], cwd=folder, env=variables, capture_output=True, text=True, timeout=PATIENCE
    )
    assert ended.returncode == code, ended.stdout + ended.stderr
    assert "left out" not in ended.stderr, ended.stderr
    return ended.stdout


def uri(folder: Path) -> str:
    return f"sqlite:///{folder}/mlflow.db"


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory, python: Path) -> Path:
    """A run of 16 updates, killed in the 7th after a checkpoint at the 4th, and resumed on two ranks."""
    folder = tmp_path_factory.mktemp("loggers")
    loggers = [{"name": name} for name in ("tensorboard", *LOGGERS)]
    settings = small_settings(
        run={"epochs": 2},
        metrics={"loggers": loggers},
        checkpoint={"every_steps": 4, "every_epochs": 0, "background": False},
    )
    words = ("train", write_config(folder, settings), "--run-dir", str(folder / "run"))
    run_python(python, folder, "-m", "tests.cluster.crash_at_step", "7", *words, code=-9)
    assert [record["step"] for record in records(folder / "run", "train")] == [1, 2, 3, 4, 5, 6]
    run_python(python, folder, "-m", "dist_train", "launch", "-np", "2", *words)
    [resumed] = events(folder / "run", "resumed")
    assert resumed["step"] == 4
    return folder


@pytest.fixture(scope="module")
def read(folder: Path, python: Path) -> dict[str, tuple[list[str], dict[str, Any]]]:
    """The names of the runs in each library, and the points of the last one by metric."""
    found: dict[str, Any] = json.loads(
        run_python(python, folder, "-m", "tests.longer.read_trackers", str(folder / "run"), uri(folder))
    )
    return found


def expected(run: Path) -> dict[str, list[list[float]]]:
    """Return the (step, value) of each metric in `metrics.jsonl`."""
    groups = {
        "loss/batch": "loss",
        "accuracy/batch": "accuracy",
        "optimizer/learning_rate": "learning_rate",
        "optimizer/noise_amplitude": "noise_amplitude",
        "optimizer/gradient_norm": "gradient_norm",
        "speed/samples_per_second": "samples_per_second",
        "speed/step_seconds": "step_seconds",
    }
    trained = records(run, "train")
    points = {name: [[record["step"], record[field]] for record in trained] for name, field in groups.items()}
    for record in records(run, "eval"):
        for field in ("loss", "accuracy"):
            points.setdefault(f"{field}/{record['split']}", []).append([record["step"], record[field]])
    return points


@pytest.mark.parametrize("library", LOGGERS)
def test_values_equal_the_recorded_ones_after_a_kill_and_a_resume(
    folder: Path, read: dict[str, tuple[list[str], dict[str, Any]]], library: str
) -> None:
    names, points = read[library]
    required = expected(folder / "run")
    assert len(required["loss/batch"]) == 16
    assert points == required
    assert names == ["run"], "one run, or runs of one name"


def test_a_copy_of_the_run_under_another_name_leaves_the_run_alone(
    folder: Path, read: dict[str, tuple[list[str], dict[str, Any]]], python: Path, tmp_path: Path
) -> None:
    """`read` has read the libraries' files before."""
    shutil.copytree(folder, tmp_path, dirs_exist_ok=True)
    copy = (tmp_path / "run").rename(tmp_path / "copy")
    run_python(python, tmp_path, "-m", "dist_train", "train", str(copy / "config.yaml"), "--run-dir", str(copy))
    found = json.loads(run_python(python, tmp_path, "-m", "tests.longer.read_trackers", str(copy), uri(tmp_path)))
    assert found["trackio"][0] == found["mlflow"][0] == ["run", "copy"]
    assert found["mlflow"][1] == read["mlflow"][1]


def test_tensorboard_has_the_recorded_values(folder: Path) -> None:
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    accumulator = EventAccumulator(str(folder / "run" / "tensorboard"))
    accumulator.Reload()
    for name, points in expected(folder / "run").items():
        found = [(point.step, point.value) for point in accumulator.Scalars(name)]
        assert [step for step, _ in found] == [step for step, _ in points]
        assert all(math.isclose(one, other, rel_tol=1e-6) for (_, one), (_, other) in zip(found, points, strict=True))


def test_each_launch_is_a_run_of_wandb(folder: Path) -> None:
    assert len(list(folder.glob("run/wandb/offline-run-*"))) == 2
