"""Fixtures of the container tests: one engine and its images."""

from __future__ import annotations

import shutil
import tempfile
from collections.abc import Iterator
from pathlib import Path

import pytest

from tests.containers.engine import ROOT, Engine, missing_requirement


@pytest.fixture(scope="session")
def engine() -> Iterator[Engine]:
    """An engine with a stand-in for python:3.11-slim-trixie."""
    missing = missing_requirement()
    if missing:
        pytest.skip(missing)
    # Not below pytest's own folder, which keeps the files of three sessions.
    engine = Engine(Path(tempfile.mkdtemp(prefix="dist_train-images-")) / "engine")
    try:
        engine.make_python_image()
        yield engine
    finally:
        engine.close()
        engine.folder.parent.rmdir()


@pytest.fixture(scope="session")
def image(engine: Engine) -> str:
    """The trainer's image, built from docker/Dockerfile."""
    engine.build("dist-train", ROOT / "docker" / "Dockerfile")
    return "localhost/dist-train"


@pytest.fixture(scope="session")
def cuda_image(engine: Engine) -> str:
    """The trainer's image with PyPI's torch, which is built for CUDA."""
    if shutil.disk_usage("/tmp").free < 35 * 2**30:
        pytest.skip("the image for CUDA needs 35 GiB below /tmp")
    engine.build(
        "dist-train-cuda",
        ROOT / "docker" / "Dockerfile",
        timeout=3000,
        pip_without=("find-links", "constraint"),
    )
    return "localhost/dist-train-cuda"
