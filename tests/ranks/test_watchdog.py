"""A rank that hangs under real launchers: the run ends with its name, and nothing is left."""

from __future__ import annotations

import os
import signal
from pathlib import Path

import pytest

from tests.launching import descendants, kill, mostly_lengthy, small_settings, start, status, write_config
from tests.waiting import PATIENCE, wait_for_lines, wait_until_gone

pytestmark = pytest.mark.ranks

TIMEOUT = 6.0


@pytest.mark.parametrize(("controller", "stopped"), mostly_lengthy([("torch", 1), ("gloo", 1), ("mpi", 0)]))
def test_a_stopped_rank_ends_the_run_with_its_name(tmp_path: Path, controller: str, stopped: int) -> None:
    config = write_config(
        tmp_path,
        small_settings(run={"epochs": 5000}, evaluation={"every_epochs": 0}, comm={"timeout": TIMEOUT}),
    )
    run = tmp_path / "run"
    process = start(2, controller, "train", config, "--run-dir", str(run))
    try:
        pid = _rank_that_trains(process.pid, stopped, run)
        everybody = descendants(process.pid)
        os.kill(pid, signal.SIGSTOP)
        output, _ = process.communicate(timeout=PATIENCE)
        wait_until_gone(everybody)
    finally:
        kill(process)
    assert process.returncode != 0
    assert output.count(f"rank {stopped} (") == 1, output
    assert "[rank-lost]" in output
    after = status(run)
    assert (after["state"], after["exit_code"]) == ("failed", 1)
    assert f"process {pid})" in after["reason"]
    # whichever rank is left to say so
    assert after["step"] >= 1
    assert (after["epoch"], after["total_steps"]) == (after["step"] / 8, 5000 * 8)


@pytest.mark.parametrize("controller", ["torch"])
def test_a_killed_rank_is_named_by_the_one_that_is_left(tmp_path: Path, controller: str) -> None:
    config = write_config(tmp_path, small_settings(run={"epochs": 5000}, evaluation={"every_epochs": 0}))
    run = tmp_path / "run"
    process = start(2, controller, "train", config, "--run-dir", str(run))
    try:
        pid = _rank_that_trains(process.pid, 1, run)
        os.kill(pid, signal.SIGKILL)
        output, _ = process.communicate(timeout=PATIENCE)
    finally:
        kill(process)
    assert process.returncode != 0
    assert f"process {pid})" in output
    assert "[rank-lost]" in output
    assert status(run)["reason"].startswith("rank 1 (")


def _rank_that_trains(launcher: int, rank: int, run: Path) -> int:
    wait_for_lines(run / "metrics.jsonl", 4)
    return _rank(launcher, rank)


def _rank(pid: int, rank: int) -> int:
    names = {f"HOROVOD_RANK={rank}".encode(), f"OMPI_COMM_WORLD_RANK={rank}".encode(), f"RANK={rank}".encode()}
    for candidate in descendants(pid):
        try:
            variables = Path(f"/proc/{candidate}/environ").read_bytes().split(b"\0")
            words = Path(f"/proc/{candidate}/cmdline").read_bytes().split(b"\0")
        except OSError:
            continue
        if names & set(variables) and words[1:3] == [b"-m", b"dist_train"]:
            return candidate
    raise AssertionError(f"no rank {rank}")
