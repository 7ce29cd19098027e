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


@pytest.mark.parametrize(
    ("controller", "stopped", "dealing"),
    # With dynamic shares the others may wait for rank 0, which serves the counters, outside of collectives.
    mostly_lengthy([("torch", 1, "even"), ("gloo", 1, "even"), ("mpi", 0, "even"), ("torch", 0, "dynamic")]),
)
def test_stopped_rank_ends_the_run_and_is_named(tmp_path: Path, controller: str, stopped: int, dealing: str) -> None:
    settings = small_settings(
        run={"epochs": 5000},
        batch={"micro_size": 4, "dealing": dealing},
        evaluation={"every_epochs": 0},
        comm={"timeout": TIMEOUT},
    )
    config = write_config(tmp_path, settings)
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
