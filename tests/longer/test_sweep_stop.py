"""Sweeps of real runs that are stopped, continued or killed."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
from contextlib import suppress
from pathlib import Path

from dist_train.outcome import ExitCode
from dist_train.rundir.status import read_status
from dist_train.sweep.sweep import StopSignals
from tests.launching import environment, kill, launch
from tests.unit.studies import write_study
from tests.waiting import PATIENCE, wait_for

LONG = {"run.epochs": 2000, "checkpoint.every_epochs": 0, "evaluation.every_epochs": 0}


class Sweep:
    """A running sweep of two endless runs."""

    def __init__(self, folder: Path) -> None:
        self.study = str(write_study(folder, settings=LONG, seeds=[0]))
        self.runs = [folder / "runs" / "small" / f"{variant}-seed-0" for variant in ("plain", "noisy")]
        self.process = subprocess.Popen(
            [sys.executable, "-m", "dist_train", "sweep", self.study, "--jobs", "2"],
            env=environment(),
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            text=True,
            start_new_session=True,
        )
        try:
            wait_for(lambda: all(self.is_training(run) for run in self.runs))
        except BaseException:
            kill(self.process)
            raise

    def is_training(self, run: Path) -> bool:
        status = read_status(run / "status.json")
        return status is not None and status.state == "running" and status.step > 2

    def states(self) -> list[str]:
        return [status.state if (status := read_status(run / "status.json")) else "" for run in self.runs]


# SIGTERM is tested by TestStopping in test_sweep_sweep.py.
def test_stopped_sweep_saves_its_runs_and_the_same_command_continues(tmp_path: Path) -> None:
    sweep = Sweep(tmp_path)
    try:
        sweep.process.send_signal(signal.SIGINT)
        output, _ = sweep.process.communicate(timeout=PATIENCE)
    finally:
        kill(sweep.process)
    assert sweep.process.returncode == ExitCode.STOPPED, output
    assert sweep.states() == ["stopped", "stopped"]
    assert "2 stopped:" in output
    saved = [status.step for run in sweep.runs if (status := read_status(run / "status.json"))]
    ended = launch(1, "alone", "sweep", sweep.study, f"run.max_steps={max(saved) + 3}", "--jobs", "2")
    assert ended.code == 0, ended.output
    assert ended.output.count("continues (stopped") == 2
    assert sweep.states() == ["finished", "finished"]
    for run, step in zip(sweep.runs, saved, strict=True):
        records = [json.loads(line) for line in (run / "metrics.jsonl").read_text().splitlines()]
        assert [record["step"] for record in records if record.get("event") == "resumed"] == [step]


def test_sweep_trains_though_the_disk_of_its_output_is_full(tmp_path: Path) -> None:
    study = write_study(tmp_path, settings={"run.max_steps": 2}, seeds=[0])
    command = [sys.executable, "-m", "dist_train", "sweep", str(study), "--jobs", "2"]
    with open("/dev/full", "w") as full:
        subprocess.run(command, env=environment(PYTHONUNBUFFERED=""), stdout=full, stderr=full, timeout=PATIENCE)
    ends = [read_status(tmp_path / "runs/small" / f"{variant}-seed-0/status.json") for variant in ("plain", "noisy")]
    assert [end.state for end in ends if end] == ["finished", "finished"]


def test_sweep_learns_how_runs_end_where_sigchld_is_ignored() -> None:
    before = signal.signal(signal.SIGCHLD, signal.SIG_IGN)
    try:
        with StopSignals():
            assert subprocess.run(["false"]).returncode == 1
    finally:
        signal.signal(signal.SIGCHLD, before)


def test_killed_sweep_stops_its_runs(tmp_path: Path) -> None:
    sweep = Sweep(tmp_path)
    pids = [status.pid for run in sweep.runs if (status := read_status(run / "status.json"))]
    try:
        os.kill(sweep.process.pid, signal.SIGKILL)
        wait_for(lambda: sweep.states() == ["stopped", "stopped"])
    finally:
        kill(sweep.process)
        for pid in pids:
            with suppress(ProcessLookupError):
                os.kill(pid, signal.SIGKILL)


def test_sweep_trains_on_two_ranks(tmp_path: Path) -> None:
    study = str(write_study(tmp_path, seeds=[0]))
    ended = launch(1, "alone", "sweep", study, "run.max_steps=2", "--ranks", "2", "--only", "1")
    assert ended.code == 0, ended.output
    status = read_status(tmp_path / "runs" / "small" / "plain-seed-0" / "status.json")
    assert status is not None
    assert (status.state, status.world_size) == ("finished", 2)
