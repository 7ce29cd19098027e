from __future__ import annotations

import re
import sys
from pathlib import Path

import pytest

from benchmarks import norm_statistics


def test_figure_of_norm_statistics_is_drawn(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    for name, value in {"_AMPLITUDES": (0.0, 0.15), "_STEPS": 4, "_EVERY": 2, "_TEST_SAMPLES": 100}.items():
        monkeypatch.setattr(norm_statistics, name, value)
    monkeypatch.setattr(sys, "argv", ["norm_statistics", str(tmp_path / "figure.png")])
    norm_statistics.main()
    assert (tmp_path / "figure.png").stat().st_size > 10_000
    assert re.findall(r"^ +(0|0\.15) +4 ", capsys.readouterr().out, flags=re.MULTILINE) == ["0", "0.15"]
