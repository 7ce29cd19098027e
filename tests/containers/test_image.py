"""docker/Dockerfile built for CPUs: the contents of the image, and two ranks that train in it."""

from __future__ import annotations

import json
import subprocess
from pathlib import Path

import pytest

from tests.containers.engine import ROOT, Engine

pytestmark = [pytest.mark.services, pytest.mark.ranks, pytest.mark.lengthy, pytest.mark.timeout(1800)]

# A shortened demo.
SHORT = ("configs/demo.yaml", "run.max_steps=2", "batch.global_size=256", "evaluation.train_samples=200")


def fashion_mnist() -> str:
    return subprocess.run(
        [ROOT / "docker" / "fashion_mnist.sh"], capture_output=True, text=True, check=True
    ).stdout.strip()


@pytest.fixture
def runs(tmp_path: Path) -> Path:
    """A folder of runs to mount, writable for the image's user."""
    folder = tmp_path / "runs"
    folder.mkdir()
    folder.chmod(0o1777)
    return folder


@pytest.mark.parametrize("script", ["mpirun.sh", "local.sh"])
def test_two_ranks_train_in_the_image(engine: Engine, image: str, runs: Path, script: str) -> None:
    mounts = (f"--volume={fashion_mnist()}:/data:ro", f"--volume={runs}:/opt/dist_train/runs")
    words = ("-np", "2", "train", *SHORT, "data.root=/data")
    engine.run(image, *words, options=(*mounts, f"--entrypoint=launch/{script}"), timeout=240)
    status = json.loads((runs / "demo" / "status.json").read_text())
    assert (status["state"], status["exit_code"], status["world_size"], status["step"]) == ("finished", 0, 2, 2)
    # The run belongs to the image's user, who does not exist on the host.
    assert (runs / "demo").stat().st_uid == 10001


def test_image_is_slim_and_runs_without_root(engine: Engine, image: str) -> None:
    found = engine.run(
        image,
        "-c",
        "id -u; command -v g++ cmake; dist-train-healthcheck && echo healthy; ls; touch /opt/venv/x || echo safe",
        options=["--entrypoint=sh"],
        check=False,
    )
    assert found.stdout.split() == ["10001", "healthy", "configs", "launch", "runs", "studies", "safe"]


def test_doctor_finds_that_training_can_run(engine: Engine, image: str) -> None:
    doctor = engine.run(image, "doctor").stdout
    assert "training can run here" in doctor
    assert "built with MPI, Gloo" in doctor


def test_image_metadata(engine: Engine, image: str) -> None:
    described = json.loads(engine.call("podman", "image", "inspect", image).stdout)[0]
    config = described["Config"]
    assert config["User"] == "10001:10001"
    assert config["Entrypoint"] == ["dist-train"]
    assert described["Healthcheck"]["Test"] == ["CMD", "dist-train-healthcheck"]
    assert config["Labels"]["org.opencontainers.image.title"] == "dist_train"
    assert not [line for line in config["Env"] if "PIP_" in line or "CERT" in line]
