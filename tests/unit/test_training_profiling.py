"""The profiler looks at a few updates after the first two, and names the phases of an update."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

from dist_train.cluster.communicator import SingleProcess
from dist_train.training.measuring import Profiler
from tests.unit.small_trainers import build_trainer, small_config, state_bits

PHASES = {"perturb_restore": 2, "forward_backward": 1, "allreduce_wait": 1, "optimizer": 1}
"""How often each occurs in an update."""


class Recorder(SingleProcess):
    """A rank that notes when its timeline starts and stops."""

    def __init__(self) -> None:
        self.calls: list[str] = []

    def start_timeline(self, path: Path) -> None:
        self.calls.append(path.name)

    def stop_timeline(self) -> None:
        self.calls.append("stop")


def ranges(folder: Path) -> dict[str, dict[str, int]]:
    """Return how often each trace has each phase."""
    found = {}
    for path in sorted(folder.glob("trace-*.json")):
        events: list[dict[str, Any]] = json.loads(path.read_text())["traceEvents"]
        found[path.name] = {phase: sum(event.get("name") == phase for event in events) for phase in PHASES}
    return found


def test_a_run_leaves_a_trace_that_names_each_phase_of_each_profiled_update(tmp_path: Path) -> None:
    trainer = build_trainer(small_config(run={"profile_steps": 2}), tmp_path / "profiled", SingleProcess())
    trainer.run()
    trainer.close()
    assert ranges(tmp_path / "profiled" / "profile") == {
        "trace-step-00000003-rank-0.json": {phase: 2 * often for phase, often in PHASES.items()},
    }
    plain = build_trainer(small_config(), tmp_path / "plain", SingleProcess())
    plain.run()
    plain.close()
    assert not (tmp_path / "plain" / "profile").exists()
    assert state_bits(trainer.network) == state_bits(plain.network)


def test_a_run_that_ends_before_leaves_what_was_seen(tmp_path: Path) -> None:
    comm = Recorder()
    profiler = Profiler(9, tmp_path / "profile", comm)
    for step in (41, 42, 43):
        profiler.after_update(step)
    profiler.close()
    profiler.close()
    assert comm.calls == ["horovod-step-00000043.json", "stop"]
    assert list(ranges(tmp_path / "profile")) == ["trace-step-00000043-rank-0.json"]


def test_a_run_that_ends_before_it_begins_leaves_nothing(tmp_path: Path) -> None:
    profiler = Profiler(9, tmp_path / "profile", SingleProcess())
    profiler.after_update(1)
    profiler.close()
    assert list(tmp_path.iterdir()) == []


def test_a_folder_that_cannot_be_made_is_told_and_costs_nothing(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    comm = Recorder()
    (tmp_path / "file").touch()
    profiler = Profiler(1, tmp_path / "file" / "profile", comm)
    for step in range(4):
        profiler.after_update(step)
    profiler.close()
    assert [record.levelname for record in caplog.records] == ["ERROR"]
    assert comm.calls == []
