"""The loading benchmark runs as documented, on a few images."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import pytest

from tests.launching import environment


@pytest.mark.lengthy
def test_both_loaders_read_a_few_images(tmp_path: Path) -> None:
    words = ["--images", "40", "--pairs", "1", "--processes", "1"]
    ended = subprocess.run(
        [sys.executable, "-m", "benchmarks.loading", *words],
        env=environment(DIST_TRAIN_CACHE=str(tmp_path)),
        cwd=Path(__file__).parents[2],
        capture_output=True,
        text=True,
        check=True,
    )
    rows = ended.stdout.splitlines()
    assert len(rows) == 3
    assert all("DataLoader" in row for row in rows)
