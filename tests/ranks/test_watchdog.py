"""A hanging rank under real launchers: the run ends, names the rank, and leaves no process behind."""

from __future__ import annotations

import os
import signal
from pathlib import Path

import pytest

from tests.launching import (
    descendants,
    kill,
    mostly_lengthy,
    process_of_rank,
    small_settings,
    start,
    status,
    write_config,
)
from tests.waiting import PATIENCE, wait_for_lines, wait_until_gone

pytestmark = pytest.mark.ranks

TIMEOUT = 6.0


@pytest.mark.parametrize(("controller", "stopped"), mostly_lengthy([("torch", 1), ("gloo", 1), ("mpi", 0)]))
def test_stopped_rank_ends_the_run_and_is_named(tmp_path: Path, controller: str, stopped: int) -> None:
    config = write_config(
        tmp_path,
        small_settings(run={"epochs": 5000}, evaluation={"every_epochs": 0}, comm={"timeout": TIMEOUT}),
    )
    run = tmp_path / "run"
    process = start(2, controller, "train", config, "--run-dir", str(run))
    try:
        wait_for_lines(run / "metrics.jsonl", 4)
        pid = process_of_rank(process.pid, stopped)
        processes = descendants(process.pid)
        os.kill(pid, signal.SIGSTOP)
        output, _ = process.communicate(timeout=PATIENCE)
        wait_until_gone(processes)
    finally:
        kill(process)
    assert process.returncode != 0
    assert output.count(f"rank {stopped} (") == 1, output
    assert "[rank-lost]" in output
    after = status(run)
    assert (after["state"], after["exit_code"]) == ("failed", 1)
    assert f"process {pid})" in after["reason"]
    # Any remaining rank may have written this.
    assert after["step"] >= 1
    assert (after["epoch"], after["total_steps"]) == (after["step"] / 8, 5000 * 8)
