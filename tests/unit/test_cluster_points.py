"""Ranks that share points of work."""

from __future__ import annotations

import os
import subprocess
import sys

import pytest

from dist_train.cluster.communicator import SingleProcess
from dist_train.cluster.rendezvous import join_points
from dist_train.outcome import UsageError
from tests.raising import raises
from tests.services.servers import free_port
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


_RANKS = """
import os, sys, torch
sys.modules["mpi4py"] = None
from dist_train.cluster.rendezvous import join_points
for rank in range(2):
    if os.fork() == 0:
        os.environ |= {"SLURM_PROCID": str(rank), "SLURM_LOCALID": str(1 - rank)}  # Slurm may number ranks in any order
        comm = join_points()
        assert (comm.rank, comm.size, comm.backend) == (rank, 2, "torch-gloo"), (comm.rank, comm.size, comm.backend)
        sys.exit()
assert [os.wait()[1] for _ in range(2)] == [0, 0]
"""
"""Of the processes that this one becomes, each is a rank; they share the import of torch."""


def test_ranks_of_srun_without_mpi4py_meet_by_torch() -> None:
    kept = {name: value for name, value in os.environ.items() if not name.startswith("OMPI_")}
    store = {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(free_port())}
    step = {"SLURM_STEP_ID": "0", "SLURM_STEP_NUM_TASKS": "2", "SLURM_NODEID": "0", **store}
    subprocess.run([sys.executable, "-c", _RANKS], env={**kept, **step}, timeout=PATIENCE, check=True)


def test_ranks_that_evaluate_do_not_wait_for_ever_for_one_that_is_missing() -> None:
    kept = {name: value for name, value in os.environ.items() if not name.startswith(("OMPI_", "SLURM_"))}
    launch = {"RANK": "0", "WORLD_SIZE": "2", "MASTER_ADDR": "127.0.0.1"}
    lines = """
import os
from pathlib import Path
from dist_train.cluster import rendezvous
from dist_train.cluster.rendezvous import join_points
from dist_train.training.evaluation import evaluate_stored
from tests.services.servers import free_port
rendezvous._MEASURING_SECONDS = 0.5
for join in (join_points, lambda: evaluate_stored(Path("run"), "test", [])):
    os.environ["MASTER_PORT"] = str(free_port())
    if os.fork() == 0:
        join()
        os._exit(0)
    print(os.waitstatus_to_exitcode(os.wait()[1]))
"""
    ended = subprocess.run(
        [sys.executable, "-c", lines], env={**kept, **launch}, capture_output=True, text=True, timeout=PATIENCE
    )
    assert ended.stdout.split() == ["1", "1"], ended.stderr
    assert ended.stderr.count("have not all met within 0.5 s") == 2, ended.stderr
