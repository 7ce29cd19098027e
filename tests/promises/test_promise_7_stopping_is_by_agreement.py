"""Promise 7: a signal only sets a flag; the ranks agree at the next step boundary, save once, and exit 75."""

from __future__ import annotations

import os
import signal
from pathlib import Path

import pytest

from tests.launching import (
    descendants,
    kill,
    mostly_lengthy,
    small_settings,
    start,
    status,
    train_alone,
    train_ranks,
    weights_digest,
    write_config,
)
from tests.waiting import PATIENCE, wait_for_lines

pytestmark = pytest.mark.ranks


@pytest.mark.parametrize(
    ("ranks", "controller", "number"),
    mostly_lengthy(
        [
            (2, "torch", signal.SIGTERM),
            (2, "gloo", signal.SIGUSR2),
            (1, "alone", signal.SIGTERM),
            (2, "mpi", signal.SIGTERM),
        ]
    ),
)
def test_signal_to_one_rank_stops_all_at_the_same_step(
    tmp_path: Path, ranks: int, controller: str, number: signal.Signals
) -> None:
    config = write_config(
        tmp_path,
        small_settings(run={"epochs": 50_000}, evaluation={"every_epochs": 0}, checkpoint={"every_epochs": 0}),
    )
    run = tmp_path / "run"
    process = start(ranks, controller, "train", config, "--run-dir", str(run))
    try:
        wait_for_lines(run / "metrics.jsonl", 4)
        os.kill(_training_processes(process.pid)[-1], number)
        output, _ = process.communicate(timeout=PATIENCE)
    finally:
        kill(process)
    if controller != "gloo":  # horovodrun exits with 1 whatever the ranks' exit code
        assert process.returncode == 75, output
        assert "Traceback" not in output
    after = status(run)
    assert (after["state"], after["exit_code"]) == ("stopped", 75), output
    assert [path.name for path in (run / "checkpoints").glob("*.pt")] == [f"step-{after['step']:08d}.pt"]

    step = after["step"]
    train_alone(config, tmp_path / "whole", f"run.max_steps={step + 5}")
    train_ranks(ranks, controller, config, run, f"run.max_steps={step + 5}")
    assert weights_digest(run) == weights_digest(tmp_path / "whole")


def _training_processes(pid: int) -> list[int]:
    """Return the training processes among `pid` and its descendants."""
    training = []
    for candidate in [pid, *descendants(pid)]:
        words = Path(f"/proc/{candidate}/cmdline").read_bytes().split(b"\0")
        if (
            b"dist_train" in words
            and b"launch" not in words
            and b"horovodrun" not in words[1]
            and b"mpirun" not in words[0]
        ):
            training.append(candidate)
    return training
