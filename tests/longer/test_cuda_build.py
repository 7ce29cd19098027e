"""The set-up with PyPI's torch for CUDA, without a GPU, a toolkit or root."""

from __future__ import annotations

import os
import shutil
import subprocess
import sys
from collections.abc import Iterator, Mapping
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]
NEEDED = ("docker", "launch", "dist_train", "pyproject.toml", "setup.py", "README.md")
SUM = """\
import horovod.torch as hvd
import torch
hvd.init()
assert torch.version.cuda and hvd.nccl_built() and hvd.size() == 2
# The last bit of 2^62 + 1 is lost in a double.
total = hvd.allreduce(torch.tensor([2**61 + hvd.rank(), -1 - hvd.rank()]), op=hvd.Sum)
assert total.tolist() == [2**62 + 1, -3], total
print("the sum is right")
"""

pytestmark = [pytest.mark.lengthy, pytest.mark.ranks, pytest.mark.timeout(3600)]


def clean_environment() -> dict[str, str]:
    """Return the environment without this machine's pip settings, CUDA toolkit and device."""
    dropped = ("PIP_FIND_LINKS", "PIP_CONSTRAINT", "CUDA_HOME", "DEVICE", "DIST_TRAIN_MPI")
    kept = {name: value for name, value in os.environ.items() if name not in dropped}
    return {**kept, "PIP_CONFIG_FILE": os.devnull, "DIST_TRAIN_NVCC": "wheel", "PYTHON": sys.executable}


@pytest.fixture(scope="module")
def clone(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Path]:
    """A clone of the project after its set-up, in which Horovod was built."""
    folder = tmp_path_factory.mktemp("cuda")
    for name in NEEDED:
        copy = shutil.copytree if (ROOT / name).is_dir() else shutil.copy
        copy(ROOT / name, folder / name)
    variables = {**clean_environment(), "DIST_TRAIN_CACHE": str(folder / "cache")}
    result = subprocess.run([folder / "docker/environment.sh"], env=variables, stderr=subprocess.PIPE, text=True)
    assert result.returncode == 0, result.stderr
    yield folder
    shutil.rmtree(folder)  # gigabytes


def record(clone: Path) -> Mapping[str, str]:
    return dict(line.split("=", 1) for line in (clone / ".venv" / "setup.env").read_text().splitlines())


def test_nvcc_and_nccl_come_from_packages(clone: Path) -> None:
    facts = record(clone)
    assert facts["nvcc"] == "PyPI"
    assert "-nccl2." in facts["wheel"]


@pytest.mark.parametrize("launcher", ["horovodrun --gloo -np 2", "mpirun -np 2 --oversubscribe --bind-to none"])
def test_two_ranks_on_the_cpu_sum_integers(clone: Path, launcher: str) -> None:
    (clone / "sum.py").write_text(SUM)
    program, *options = launcher.split()
    path = record(clone)["mpirun"] if program == "mpirun" else str(clone / ".venv/bin" / program)
    variables = {**clean_environment(), "PATH": f"{clone}/.venv/bin:{os.environ['PATH']}"}
    variables |= {"OMPI_ALLOW_RUN_AS_ROOT": "1", "OMPI_ALLOW_RUN_AS_ROOT_CONFIRM": "1"}
    result = subprocess.run(
        [path, *options, clone / ".venv/bin/python", clone / "sum.py"],
        env=variables,
        capture_output=True,
        text=True,
        timeout=300,
        check=False,
    )
    assert result.stdout.count("the sum is right") == 2, result.stdout + result.stderr
    assert result.returncode == 0


def test_second_set_up_is_a_no_op(clone: Path) -> None:
    result = subprocess.run(
        [clone / "docker/environment.sh"],
        env=clean_environment(),
        stderr=subprocess.PIPE,
        text=True,
        check=True,
    )
    assert result.stderr == "set-up: .venv is up to date\n"
