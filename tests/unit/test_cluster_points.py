"""Ranks that share points of work."""

from __future__ import annotations

import os
import socket
import subprocess
import sys

import pytest

from dist_train.cluster.communicator import SingleProcess
from dist_train.cluster.rendezvous import join_points
from dist_train.outcome import UsageError
from tests.raising import raises
from tests.waiting import PATIENCE


def test_alone_no_mpi_is_loaded(monkeypatch: pytest.MonkeyPatch) -> None:
    for name in ("OMPI_COMM_WORLD_SIZE", "SLURM_STEP_ID", "HOROVOD_SIZE"):
        monkeypatch.delenv(name, raising=False)
    monkeypatch.setitem(sys.modules, "mpi4py", None)
    assert isinstance(join_points(), SingleProcess)


def test_gloo_is_refused_with_the_fix(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("OMPI_COMM_WORLD_SIZE", raising=False)
    monkeypatch.setenv("HOROVOD_SIZE", "2")
    monkeypatch.setenv("HOROVOD_RANK", "0")
    with raises(UsageError, "launcher-unsupported"):
        join_points()


def test_a_missing_mpi4py_is_told(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("OMPI_COMM_WORLD_SIZE", "2")
    monkeypatch.setenv("OMPI_COMM_WORLD_RANK", "0")
    monkeypatch.setitem(sys.modules, "mpi4py", None)
    with raises(UsageError, "mpi4py-missing"):
        join_points()


_RANK = """
import sys
sys.modules["mpi4py"] = None
from dist_train.cluster.rendezvous import join_points
comm = join_points()
print(comm.rank, comm.size, comm.backend)
"""


def test_ranks_of_srun_without_mpi4py_meet_by_torch() -> None:
    with socket.socket() as found:
        found.bind(("127.0.0.1", 0))
        port = found.getsockname()[1]
    kept = {name: value for name, value in os.environ.items() if not name.startswith("OMPI_")}
    step = {"SLURM_STEP_ID": "0", "SLURM_STEP_NUM_TASKS": "2", "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(port)}
    ranks = [
        subprocess.Popen(
            [sys.executable, "-c", _RANK],
            env={**kept, **step, "SLURM_PROCID": str(rank)},
            stdout=subprocess.PIPE,
            text=True,
        )
        for rank in range(2)
    ]
    try:
        # torch 2.8's Gloo prints a line, too
        said = [rank.communicate(timeout=PATIENCE)[0].splitlines()[-1].split() for rank in ranks]
    finally:
        for rank in ranks:
            rank.kill()
    assert [words[:2] for words in said] == [["0", "2"], ["1", "2"]]


@pytest.mark.parametrize("join", ["join_points()", 'evaluate_stored(Path("run"), "test", [])'])
def test_ranks_that_evaluate_do_not_wait_for_ever_for_one_that_is_missing(join: str) -> None:
    with socket.socket() as found:
        found.bind(("127.0.0.1", 0))
        port = found.getsockname()[1]
    kept = {name: value for name, value in os.environ.items() if not name.startswith(("OMPI_", "SLURM_"))}
    launch = {"RANK": "0", "WORLD_SIZE": "2", "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(port)}
    lines = f"""
from pathlib import Path
from dist_train.cluster import rendezvous
from dist_train.cluster.rendezvous import join_points
from dist_train.training.evaluation import evaluate_stored
rendezvous._MEASURING_SECONDS = 0.5
{join}
"""
    ended = subprocess.run(
        [sys.executable, "-c", lines], env={**kept, **launch}, capture_output=True, text=True, timeout=PATIENCE
    )
    assert (ended.returncode, "have not all met within 0.5 s" in ended.stderr) == (1, True), ended.stderr
