from __future__ import annotations

import time
from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch

from dist_train.checkpoint.files import list_checkpoints
from dist_train.cluster.communicator import Generation, GroupBrokenError, Pending, SingleProcess
from dist_train.outcome import StoppedError
from dist_train.training import trainer
from dist_train.training.stopping import TimeLimit, job_time_limit
from tests.unit.small_trainers import build_trainer, small_config


def first_near(limit: TimeLimit, seconds_a_step: float) -> float:
    """Return when a run that takes so long for each step is asked to stop."""
    now = 0.0
    while not limit.check(now, now):
        now += seconds_a_step
    return now


def test_a_job_without_a_limit_is_never_near_its_end() -> None:
    assert not any(TimeLimit(None).check(now, now) for now in (0.0, 1e12))


@pytest.mark.parametrize("seconds_a_step", [0.1, 3.0, 40.0])
@pytest.mark.parametrize("seconds_a_save", [0.0, 2.0, 60.0])
def test_a_step_and_a_save_fit_in_what_is_left(seconds_a_step: float, seconds_a_save: float) -> None:
    limit = TimeLimit(1000.0)
    limit.note_saved(seconds_a_save)
    limit.note_saved(0.0)  # another, to a disk that is less busy
    asked = first_near(limit, seconds_a_step)
    assert asked + seconds_a_step + 2 * seconds_a_save + 10 <= 1000
    assert asked > 1000 - 4 * seconds_a_step - 2 * seconds_a_save - 20, "nor much too early"


def test_a_rank_that_takes_over_knows_how_long_steps_take(tmp_path: Path) -> None:
    heir = build_trainer(small_config(), tmp_path, SingleProcess())
    assert heir.saving.writer is not None
    assert not any(heir.time_limit.check(now, now) for now in (0.0, 60.0, 120.0))
    heir.become_writer(heir.observers, None, heir.saving.writer, TimeLimit(1000.0), None)
    assert heir.time_limit.check(1000.0 - 2 * 60.0, 120.0)


def test_an_evaluation_counts_as_part_of_its_step() -> None:
    limit = TimeLimit(1000.0)
    assert not any(limit.check(now, now) for now in (0.0, 1.0, 101.0, 102.0))
    assert limit.check(800.0, 800.0)


def test_a_clock_that_is_set_is_no_long_step() -> None:
    limit = TimeLimit(1000.0)
    assert not any(limit.check(now, uptime) for now, uptime in ((100.0, 0.0), (600.0, 1.0), (601.0, 2.0)))
    assert limit.check(990.0, 3.0)


class BreaksOnce(SingleProcess):
    """A rank that loses another in the second update, and waits `pause` seconds of `clock` for one in its place."""

    is_elastic = True
    pause = 10_000.0
    updates = 0

    def __init__(self, clock: SimpleNamespace) -> None:
        self._clock = clock

    def allreduce_async(self, tensor: torch.Tensor, name: str) -> Pending:
        self.updates += name == "tally"
        if name == "tally" and self.updates == 2:
            raise GroupBrokenError("rank 1 died")
        return Pending()

    def rendezvous(self, why: str, on_begin: Callable[[Generation], None] = lambda generation: None) -> Generation:
        now = time.monotonic() + self.pause
        self._clock.monotonic = lambda: now
        return Generation(2, 0, 1, ("", 0), ("here",), ("rank 1 died",), "", ())


def test_waiting_for_another_rank_is_no_long_step(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    clock = SimpleNamespace(time=time.time, monotonic=time.monotonic, perf_counter=time.perf_counter)
    monkeypatch.setattr(trainer, "time", clock)
    waiting = build_trainer(small_config(), tmp_path, BreaksOnce(clock))
    waiting.time_limit = TimeLimit(time.time() + BreaksOnce.pause)
    waiting.run()
    assert waiting.progress.step == waiting.last_step


def test_an_extended_limit_is_noticed_before_the_run_stops() -> None:
    ends = [2000.0, 3000.0, 3000.0]
    limit = TimeLimit(1000.0, lambda: ends.pop(0))
    asked = first_near(limit, 1.0)
    assert 3000 - 30 < asked < 3000 - 15
    assert not ends
    assert limit.check(asked + 1, asked + 1), "Slurm is not asked again"


@pytest.mark.parametrize("seconds", [700.0, 7000.0])
@pytest.mark.parametrize("stopped_late", [0.0, 3.0])
def test_a_suspension_of_the_job_is_no_long_step(seconds: float, stopped_late: float) -> None:
    ends = [1000.0 + seconds, 1000.0 + seconds]
    limit = TimeLimit(1000.0, lambda: ends.pop(0))
    assert not any(limit.check(now, now) for now in (0.0, 1.0, 2.0))
    resumed = 3.0 + seconds - stopped_late
    assert not limit.check(resumed, resumed)
    while not limit.check(resumed, resumed):
        resumed += 1.0
    assert 1000 + seconds - 60 < resumed < 1000 + seconds - 20


def test_a_suspension_does_not_hide_how_long_an_evaluation_takes() -> None:
    limit = TimeLimit(5000.0, lambda: 5700.0)
    assert not any(limit.check(now, now) for now in (0.0, 1.0, 101.0, 802.0, 803.0))
    assert not limit.check(3600.0, 804.0)
    assert not limit.check(5475.0, 805.0)
    assert limit.check(5485.0, 806.0), "twice the 100 s before the suspension, and 20 s"


def test_in_an_extended_limit_an_evaluation_fits_as_before() -> None:
    ends = [5000.0, 5000.0]
    limit = TimeLimit(1000.0, lambda: ends.pop(0))
    assert not any(limit.check(now, now) for now in (0.0, 1.0, 101.0, 102.0))
    assert not limit.check(900.0, 103.0)
    assert not limit.check(4700.0, 104.0)
    assert limit.check(4800.0, 105.0)


def test_a_limit_that_slurm_does_not_know_stays() -> None:
    assert 1000 - 30 < first_near(TimeLimit(1000.0, lambda: None), 1.0) < 1000 - 15


def test_slurm_is_asked_for_the_end_of_the_job(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    squeue = tmp_path / "squeue"
    squeue.write_text("#!/bin/sh\necho 2033-05-18T03:33:20\n")
    squeue.chmod(0o755)
    monkeypatch.setenv("PATH", str(tmp_path))
    monkeypatch.setenv("SLURM_JOB_ID", "7")
    monkeypatch.setenv("SLURM_JOB_END_TIME", "1000")
    limit = job_time_limit()
    assert not limit.check(990.0, 990.0)
    monkeypatch.delenv("SLURM_JOB_END_TIME")  # which older versions do not set
    for end in (limit.end, job_time_limit().end):
        assert end is not None
        assert abs(end - 2e9) <= 86400


def test_a_run_near_its_limit_is_saved_and_stopped(tmp_path: Path) -> None:
    limited = build_trainer(small_config(), tmp_path, SingleProcess())
    limited.time_limit = TimeLimit(1.0)
    with pytest.raises(StoppedError):
        limited.run()
    assert limited.progress.step == 2, "all ranks hear of it in the step after"
    assert [file.step for file in list_checkpoints(tmp_path / "checkpoints")] == [2]


def test_the_limit_is_that_of_the_slurm_job(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("SLURM_JOB_ID", "7")
    monkeypatch.setenv("SLURM_JOB_END_TIME", "1000")
    assert job_time_limit().check(990.0, 990.0)
    monkeypatch.delenv("SLURM_JOB_ID")
    assert not job_time_limit().check(990.0, 990.0)
