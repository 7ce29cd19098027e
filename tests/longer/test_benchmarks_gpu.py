"""The page of `make gpu`, with each part run on a CPU."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import pytest
import torch

from benchmarks.gpu import PARTS, Finding, main, recovery, same_bits
from benchmarks.groups import Device
from benchmarks.subject import settings
from dist_train.config import Config
from dist_train.outcome import ExitCode
from tests.launching import mostly_lengthy


@pytest.mark.skipif(torch.cuda.is_available(), reason="there is a GPU here")
def test_missing_gpu_is_reported_in_one_line(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["--page", str(tmp_path / "page.md")]) == ExitCode.USAGE
    assert len(capsys.readouterr().err.splitlines()) == 1
    assert not (tmp_path / "page.md").exists()


@pytest.mark.parametrize(
    "part", mostly_lengthy([*(part for part in PARTS if part not in ("same-bits", "recovery")), "kernels"])
)
def test_each_part_holds_on_a_cpu(tmp_path: Path, part: str) -> None:
    page = tmp_path / "page.md"
    code = main(["--device", "cpu", "--only", part, "--page", str(page), "--part-seconds", "500"])
    assert f"## {part}: holds" in page.read_text()
    assert code == 0


@pytest.mark.lengthy
@pytest.mark.parametrize("part", [recovery, same_bits])
def test_killed_resumed_and_launched_runs_are_bit_identical(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, part: Callable[[Device, Path], Finding]
) -> None:
    def narrow(width: float, global_size: int, **sections: Mapping[str, Any]) -> Config:
        return settings(width / 8, global_size, **sections)

    monkeypatch.setattr("benchmarks.gpu.settings", narrow)
    found = part("cpu", tmp_path)
    assert found.holds, found.text
    assert part is recovery or "| two ranks |" in found.text


def test_part_that_takes_too_long_fails_and_the_next_one_runs(tmp_path: Path) -> None:
    page = tmp_path / "page.md"
    arguments = [
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
    assert main(arguments) == 1
    assert "## peak-memory: FAILED" in page.read_text()
    assert "## profile: FAILED" in page.read_text()
