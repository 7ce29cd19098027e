"""`run.profile_steps` in a real launch: every rank's trace, and Horovod's timeline."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from tests.launching import small_settings, train_ranks, write_config


@pytest.mark.ranks
def test_two_ranks_write_traces_and_the_horovod_timeline(tmp_path: Path) -> None:
    config = write_config(tmp_path, small_settings(run={"max_steps": 6, "profile_steps": 2}))
    train_ranks(2, "mpi", config, tmp_path / "run")
    folder = tmp_path / "run" / "profile"
    for rank in (0, 1):
        events = json.loads((folder / f"trace-step-00000003-rank-{rank}.json").read_text())["traceEvents"]
        for phase in ("forward_backward", "allreduce_wait", "optimizer"):
            assert sum(event.get("name") == phase for event in events) == 2
        assert sum(event.get("name") == "perturb_restore" for event in events) == 4
    timeline = json.loads((folder / "horovod-step-00000003.json").read_text())
    tensors = {event["args"].get("name") for event in timeline if event.get("name") == "process_name"}
    assert {"allreduce.gradient.0", "allreduce.tally"} <= tensors
    assert any(event.get("name") == "NEGOTIATE_ALLREDUCE" for event in timeline)
