"""`make study-smoke`: a study from its search to its report, on synthetic images."""

from __future__ import annotations

import json
import re
import subprocess
import sys
from pathlib import Path
from statistics import fmean

import pytest
import yaml

from tests.launching import environment
from tests.longer.report_page import cells, evaluations, rendered
from tests.waiting import PATIENCE

ROOT = Path(__file__).parents[2]


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder in which the target's commands were run, except the set-up."""
    folder = tmp_path_factory.mktemp("checkout")
    for name in ("studies", "configs"):
        (folder / name).symlink_to(ROOT / name)
    (folder / ".venv").symlink_to(sys.prefix)  # not its bin alone: Python 3.13 looks for pyvenv.cfg beside it
    lines = (ROOT / "Makefile").read_text().split("\nstudy-smoke:")[1].split("\n\n")[0].splitlines()[1:]
    assert len(lines) == 5
    for line in lines:
        command = line.strip().replace("$(python)", ".venv/bin/python").replace("$(CURDIR)", str(folder))
        ended = subprocess.run(
            ["bash", "-euo", "pipefail", "-c", command.replace("$$", "$")],
            cwd=folder,
            env=environment(PYTHONPATH=str(ROOT)),
            stdin=subprocess.DEVNULL,
            capture_output=True,
            text=True,
            timeout=5 * PATIENCE,  # a line may stand for dozens of commands
            check=False,
        )
        assert ended.returncode == 0, f"{command}\n{ended.stdout}{ended.stderr}"
    return folder


def test_best_trial_of_each_variant_is_confirmed_with_new_seeds(folder: Path) -> None:
    confirmation = yaml.safe_load((folder / "runs" / "confirm.yaml").read_text())
    assert confirmation["seeds"] == [100, 101]
    for variant in ("sb", "lb"):
        trials = [folder / "runs" / "search" / f"{variant}-trial-{number}-seed-0" for number in range(3)]
        best = max(trials, key=lambda run: evaluations(run, "validation")[-1]["accuracy"])
        chosen = yaml.safe_load((best / "config.yaml").read_text())
        for seed in (100, 101):
            run = folder / "runs" / "search-confirm" / f"{variant}-seed-{seed}"
            config = yaml.safe_load((run / "config.yaml").read_text())
            for section in ("optimizer", "noise", "batch"):
                assert config[section] == chosen[section]
            assert config["run"]["seed"] == seed


def test_report_has_contrast_line_and_sharpness(folder: Path) -> None:
    study = folder / "runs" / "search-confirm"
    assert (study / "report.html").is_file()
    table, page = cells(study), rendered(study)
    runs = [[study / f"{variant}-seed-{seed}" for seed in (100, 101)] for variant in ("sb", "lb")]
    last = [[evaluations(run, "test")[-1]["accuracy"] for run in pair] for pair in runs]
    mean = 100 * (fmean(last[0]) - fmean(last[1]))
    cell = table["there is a gap: difference from LB, 128", "SB, 32", "final test accuracy, points"]
    shown = re.sub("[*+]", "", cell).replace("\u2212", "-").split()[0]
    assert float(shown) == pytest.approx(mean, abs=0.0051)
    assert cell.endswith("n = 2)")
    assert "SB, 32 (0) to LB, 128 (1)" in page.text
    [record] = runs[0][0].glob("analysis/sharpness-*.json")
    eigenvalue = json.loads(record.read_text())["hessian"]["eigenvalues"][0]
    assert page.of("sharpness-largest Hessian eigenvalue", run="sb-seed-100")[0] == eigenvalue
