"""SmoothOut prefers the flat one of two minima."""

from __future__ import annotations

import re
import subprocess
import sys
from pathlib import Path

import pytest
import torch

from benchmarks.double_well import (
    AMPLITUDE,
    FLAT,
    INTERVAL,
    SHARP,
    barrier,
    descend,
    draw,
    in_flat_minimum,
    loss,
    run,
    table,
)
from benchmarks.double_well import smoothed_loss as smoothed
from dist_train.config import NoiseSettings


def test_minima_are_equally_deep_and_have_half_of_the_starts_each() -> None:
    x = torch.linspace(*INTERVAL, 60_001, dtype=torch.float64)
    values = loss(x)
    lowest = [float(x[i]) for i in range(1, len(x) - 1) if values[i] < values[i - 1] and values[i] <= values[i + 1]]
    assert lowest == pytest.approx([SHARP, FLAT], abs=0.1)
    depths = [float(loss(torch.tensor(minimum, dtype=torch.float64))) for minimum in lowest]
    assert depths[0] <= depths[1]
    assert depths == pytest.approx([0, 0], abs=0.03)
    low, high = INTERVAL
    assert (high - barrier()) / (high - low) == pytest.approx(0.5, abs=0.02)


def test_smoothed_loss_is_the_mean_over_the_noise() -> None:
    points = torch.tensor([-2.0, SHARP, 0.3, FLAT], dtype=torch.float64)
    noise = torch.linspace(-AMPLITUDE, AMPLITUDE, 20_001, dtype=torch.float64)
    means = loss(points[:, None] + noise).mean(dim=1)
    torch.testing.assert_close(smoothed(points), means, rtol=0, atol=1e-4)


def test_smoothout_finds_the_flat_minimum_for_almost_all_seeds(tmp_path: Path) -> None:
    ends = run(100)
    assert len(set(ends.starts)) == 100
    assert in_flat_minimum(ends.smoothed) >= 90
    assert in_flat_minimum(ends.plain) <= 60
    # Without noise, descent stays in the basin of its start.
    assert in_flat_minimum(ends.plain) == in_flat_minimum(ends.starts)
    draw(ends, tmp_path / "double_well.png")
    assert (tmp_path / "double_well.png").read_bytes().startswith(b"\x89PNG")
    page = (Path(__file__).parents[2] / "docs" / "method.md").read_text()
    counts = re.compile(r"(?<=\| )\d+(?= \|$)", flags=re.MULTILINE)
    [documented] = re.findall(r"^\| 60 updates .*\n(?:\|.*\n){3}", page, flags=re.MULTILINE)
    assert counts.sub("N", documented.strip()) == counts.sub("N", table(ends))
    # Processors round differently, and SmoothOut never converges.
    printed = [int(count) for count in counts.findall(table(ends))]
    assert [int(count) for count in counts.findall(documented)] == pytest.approx(printed, abs=2)


@pytest.mark.parametrize("method", ["none", "smoothout", "arwp", "langevin", "sgld", "fsgld", "sam", "asam", "ivon"])
def test_the_loop_works_with_every_method(method: str) -> None:
    settings = NoiseSettings.model_validate({"method": method, "amplitude": 0.01})
    assert descend(settings, FLAT, 0) == pytest.approx(FLAT, abs=0.05)


def test_the_loop_scales_the_noise_of_sgld_by_the_rate() -> None:
    scaled, by_hand = (
        NoiseSettings(method="sgld", amplitude=0.05),
        NoiseSettings(method="langevin", amplitude=0.02236068),
    )
    assert descend(scaled, FLAT, 0) == pytest.approx(descend(by_hand, FLAT, 0), abs=1e-4)


def test_figure_is_drawn_only_on_request(tmp_path: Path) -> None:
    (tmp_path / "docs").mkdir()
    subprocess.run(
        [sys.executable, "-m", "benchmarks.double_well", "--seeds", "2"],
        cwd=tmp_path,
        env={"PYTHONPATH": str(Path(__file__).parents[2])},
        check=True,
        capture_output=True,
    )
    assert list((tmp_path / "docs").iterdir()) == []
