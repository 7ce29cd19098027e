"""The page of `make gpu`, each part of it tried on a CPU."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch

from benchmarks.gpu import PARTS, main
from dist_train.outcome import ExitCode


@pytest.mark.skipif(torch.cuda.is_available(), reason="there is a GPU here")
def test_without_a_gpu_it_is_refused_in_one_line(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["--page", str(tmp_path / "page.md")]) == ExitCode.USAGE
    assert len(capsys.readouterr().err.splitlines()) == 1
    assert not (tmp_path / "page.md").exists()


@pytest.mark.timeout(600)
@pytest.mark.parametrize("part", [*PARTS, "kernels"])
def test_each_part_holds_on_a_cpu(tmp_path: Path, part: str) -> None:
    page = tmp_path / "page.md"
    code = main(["--device", "cpu", "--only", part, "--page", str(page), "--part-seconds", "500"])
    assert f"## {part}: holds" in page.read_text()
    assert code == 0


def test_a_part_that_takes_too_long_is_written_down_and_the_next_begins(tmp_path: Path) -> None:
    page = tmp_path / "page.md"
    words = [
        "--device",
        "cpu",
        "--only",
        "peak-memory",
        "--only",
        "profile",
        "--page",
        str(page),
        "--part-seconds",
        "1",
    ]
    assert main(words) == 1
    assert "## peak-memory: FAILED" in page.read_text()
    assert "## profile: FAILED" in page.read_text()
