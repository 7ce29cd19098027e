"""One storage and one image for all tests of this folder."""

from __future__ import annotations

import shutil
import tempfile
from collections.abc import Iterator
from pathlib import Path

import pytest

from tests.containers.engine import ROOT, Engine, what_is_missing


@pytest.fixture(scope="session")
def engine() -> Iterator[Engine]:
    """An engine with the stand-in for python:3.11-slim-trixie."""
    missing = what_is_missing()
    if missing:
        pytest.skip(missing)
    # Not below pytest's own folder, which keeps what the last three sessions left.
    made = Engine(Path(tempfile.mkdtemp(prefix="dist_train-images-")) / "engine")
    try:
        made.make_python_image()
        yield made
    finally:
        made.close()
        made.folder.parent.rmdir()


@pytest.fixture(scope="session")
def image(engine: Engine) -> str:
    """The trainer's image, built from docker/Dockerfile as it is."""
    engine.build("dist-train", ROOT / "docker" / "Dockerfile")
    return "localhost/dist-train"


@pytest.fixture(scope="session")
def cuda_image(engine: Engine) -> str:
    """The same with the torch that pip gives everybody, which is built for CUDA."""
    if shutil.disk_usage("/tmp").free < 35 * 2**30:
        pytest.skip("the image for CUDA needs 35 GiB below /tmp")
    engine.build(
        "dist-train-cuda",
        ROOT / "docker" / "Dockerfile",
        timeout=3000,
        pip_without=("find-links", "constraint"),
    )
    return "localhost/dist-train-cuda"
