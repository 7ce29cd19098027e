"""Every command in the README and the documentation works as written, tested here or elsewhere."""

from __future__ import annotations

import json
import os
import re
import shutil
import subprocess
import sys
from importlib.util import find_spec
from pathlib import Path

import pytest
import yaml

from tests.launching import environment, small_settings, train_alone, write_config
from tests.unit.image_folders import write_folder
from tests.waiting import PATIENCE

ROOT = Path(__file__).parents[2]
PAGES = [ROOT / "README.md", *sorted((ROOT / "docs").glob("*.md"))]

TESTED_ELSEWHERE = {
    r"\b(sbatch|dist-train submit (?!.*--dry-run))": "cluster/test_submit.py",
    r"^#!|^#SBATCH |SLURM_CPUS_PER_TASK": "cluster/test_batch_script.py",
    r"--hostfile | -H \w": "cluster/test_launch_over_ssh.py",
    r"--listen|--join": "ranks/test_elastic_launch.py",
    r"slurm/lb_8192.sh|analyses.txt": "cluster/test_batch_script.py",
    r"docker |DIST_TRAIN_TARGETS=|^mkdir -p targets|apptainer ": "containers/test_compose.py",
    r"^python -m benchmarks\.double_well": "longer/test_benchmarks_double_well.py",
    r"^python -m benchmarks\.norm_statistics": "longer/test_benchmarks_norm_statistics.py",
    r"^python -m benchmarks\.gpu": "longer/test_benchmarks_gpu.py",
    r"^python -m benchmarks\.document": "unit/test_benchmarks_document.py",
    r"^python -m benchmarks\.scaling": "unit/test_benchmarks_scaling.py",
    r"^python -m benchmarks( |$)": "unit/test_benchmarks_table.py",
    r"^python -m tests\.torture": "torture/test_campaign.py",
    r"doctor configs/|data\.download=true": "unit/test_launching_doctor.py",
    r"train configs/lb_8192.*run\.name=li": "unit/test_docs_commands.py",
    r"^\. \.venv|^nvidia-smi|run\.device=cuda": "longer/test_cuda_build.py",
    r"^pip ": "longer/test_wheel.py",
    r"^trackio |name: trackio": "longer/test_loggers.py",
    r"^curl ": "unit/test_monitoring_access.py",
    r"(mine|short|gradient|labels)\.yaml|runs/mine": "longer/test_docs_extending.py",
    r"^dist-train (export|replay) |train_mine\.py": "longer/test_api.py",
    r"sweep .*(--only \d|fashion\.yaml --jobs)|fashion\.yaml --analyses": "longer/test_sweep_sweep.py",
}
"""Commands that need more than a folder and two processes (a cluster, Docker, GPUs, hours), and their tests."""

pytestmark = pytest.mark.ranks


def commands(page: Path) -> list[str]:
    blocks = re.findall(r"^```(\w*)\n(.*?)^```", page.read_text(), flags=re.MULTILINE | re.DOTALL)
    shell = [block for language, block in blocks if language in ("", "sh")]
    lines = [line for block in shell for line in block.replace("\\\n", " ").splitlines() if line.strip()]
    return [line.split(" #")[0].strip() for line in lines]


def commands_of(name: str) -> list[str]:
    return commands(next(page for page in PAGES if page.stem == name))


COMMANDS = list(dict.fromkeys(command for page in PAGES for command in commands(page)))  # without repetitions, in order
SHIPPED = "dist_train:configs/"  # a file of the package, which is that of the checkout
MAKE_COMMANDS = [command for command in COMMANDS if re.match(r"(\w+=\S+ )*make ", command)]
README_COMMANDS = set(commands_of("README"))
TESTED_HERE = [
    command
    for command in COMMANDS
    if command not in MAKE_COMMANDS and not any(re.search(known, command) for known in TESTED_ELSEWHERE)
]


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder like the checkout, where a demo of one second has run, with the runs and images that the pages name."""
    folder = tmp_path_factory.mktemp("checkout")
    for name in ("launch", "slurm", "studies"):
        (folder / name).symlink_to(ROOT / name)
    shutil.copytree(ROOT / "results", folder / "results")
    shutil.copytree(ROOT / "configs", folder / "configs")
    settings = small_settings(run={"name": "demo", "epochs": 1})
    (folder / "configs" / "demo.yaml").write_text(yaml.safe_dump(settings))
    train_alone(str(folder / "configs" / "demo.yaml"), folder / "runs" / "demo")
    write_folder(folder / "images", per_class=24)
    for name, rate in (("sb", 0.05), ("lb", 0.02)):
        run = folder / "runs" / name
        # As many images as sharpness uses, but small ones: landscapes evaluate them at a thousand points.
        sections = small_settings(
            data={"synthetic_samples": 2048, "synthetic_shape": [1, 8, 8]},
            model={"width": 0.03125, "norm_samples": 20},
            batch={"global_size": 1024, "micro_size": 64},
        )
        words = (f"run.name={name}", f"optimizer.learning_rate={rate}", "checkpoint.keep=9")
        train_alone(write_config(folder, sections), run, *words)
    last, named = (run / "checkpoints" / f"step-{step:08}.pt" for step in (8, 160))
    shutil.copyfile(last, named)
    record = json.loads(last.with_suffix(".json").read_text())
    named.with_suffix(".json").write_text(json.dumps({**record, "step": 160}))
    subprocess.run(["tar", "-C", folder / "runs", "-xzf", ROOT / "results" / "fashion.tar.gz"], check=True)
    (folder / "runs" / "paper").symlink_to("fashion")
    return folder


@pytest.mark.parametrize(
    "command",
    [
        command
        if command in README_COMMANDS and SHIPPED not in command
        else pytest.param(command, marks=pytest.mark.lengthy)
        for command in TESTED_HERE
    ],
)
def test_documented_command_works(folder: Path, command: str) -> None:
    program = Path(sys.executable).parent / "dist-train"
    assert program.exists()
    ended = subprocess.run(
        ["bash", "-c", command.replace("/shared/", f"{folder}/shared/").replace(SHIPPED, "configs/")],
        cwd=folder,
        env=environment(DIST_TRAIN_PYTHON=sys.executable, HOME=str(folder)),
        stdin=subprocess.DEVNULL,
        capture_output=True,
        text=True,
        timeout=3 * PATIENCE,  # benchmarks.elastic takes minutes
        check=False,
    )
    assert ended.returncode == 0, ended.stdout + ended.stderr


@pytest.mark.parametrize("command", MAKE_COMMANDS)
def test_documented_make_target_exists(command: str) -> None:
    *variables, make, target = command.split()
    planned = subprocess.run(
        ["env", *variables, make, target, "--dry-run"],
        cwd=ROOT,
        env=os.environ,
        capture_output=True,
        text=True,
        check=False,
    )
    assert planned.returncode == 0, planned.stderr


def test_commands_not_run_here_have_a_test_elsewhere() -> None:
    assert len(TESTED_HERE) > 40
    for known, test in TESTED_ELSEWHERE.items():
        assert (ROOT / "tests" / test).is_file(), test
        assert any(re.search(known, command) for command in COMMANDS), f"no page shows {known}"
    for module in (match[1] for command in COMMANDS if (match := re.match(r"python -m (\S+)", command))):
        assert find_spec(module), module
