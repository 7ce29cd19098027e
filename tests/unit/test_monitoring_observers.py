from __future__ import annotations

import logging
import os
import signal
import sys
import tracemalloc
from collections.abc import Mapping
from dataclasses import replace
from pathlib import Path
from threading import Barrier, Event, Thread
from types import SimpleNamespace
from typing import Any

import pytest
from pydantic import BaseModel

import dist_train.monitoring.observers
from dist_train.api import evaluate
from dist_train.config.sections import CommSettings
from dist_train.monitoring.observers import Mlflow, MlflowOptions, Observers, Tracker, Wandb, WandbOptions
from dist_train.rundir.metrics_file import to_json
from dist_train.rundir.records import EventRecord, Measurement, Observer, Outcome, Record, RunFacts
from tests.unit.exporting import FACTS, OUTCOME, measurement, train
from tests.waiting import PATIENCE

EVENT = EventRecord(1, "signal", 0.0, {})


class Notebook(Observer):
    def __init__(self) -> None:
        self.calls: list[str] = []

    def begin(self, facts: RunFacts) -> None:
        self.calls.append("begin")

    def record(self, record: Record) -> None:
        self.calls.append("record")

    def measurement(self, measurement: Measurement) -> None:
        self.calls.append("measurement")

    def progress(self, step: int) -> None:
        self.calls.append(f"progress {step}")

    def sync(self) -> None:
        self.calls.append("sync")

    def end(self, outcome: Outcome) -> None:
        self.calls.append("end")


class Failing(Notebook):
    def __init__(self, error: BaseException) -> None:
        super().__init__()
        self.error = error

    def record(self, record: Record) -> None:
        super().record(record)
        raise self.error

    def sync(self) -> None:
        super().sync()
        raise self.error


def test_a_call_to_an_mlflow_server_that_is_away_fails_before_the_other_ranks_give_up(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def longest_call(tracking_uri: str) -> None:
        """Raise TimeoutError with the seconds that a call may take, as urllib3 counts them."""
        retries = int(os.environ["MLFLOW_HTTP_REQUEST_MAX_RETRIES"])
        pauses = [2 * 2**count + 1 for count in range(1, retries)]  # with MLflow's factor and jitter
        raise TimeoutError(sum(pauses) + (retries + 1) * float(os.environ["MLFLOW_HTTP_REQUEST_TIMEOUT"]))

    entities = SimpleNamespace(Param=None)
    monkeypatch.setitem(sys.modules, "mlflow", SimpleNamespace(MlflowClient=longest_call, entities=entities))
    monkeypatch.setitem(sys.modules, "mlflow.entities", entities)
    monkeypatch.setattr(os, "environ", {})
    (tmp_path / "config.yaml").write_text("{}")
    logger = Mlflow(tmp_path, MlflowOptions(tracking_uri="http://away"))
    with pytest.raises(TimeoutError) as given_up:
        logger.begin(replace(FACTS, run_directory=tmp_path))
    assert given_up.value.args[0] < CommSettings().timeout
    logger.end(OUTCOME)
    assert os.environ == {}


def test_the_end_of_a_run_waits_a_minute_for_a_wandb_server_that_is_away(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    class Settings(BaseModel, extra="allow"):
        finish_timeout: float | None = None  # as wandb's

    limits: list[float | None] = []
    wandb = SimpleNamespace(init=lambda settings, **_: limits.append(settings.finish_timeout), Settings=Settings)
    monkeypatch.setitem(sys.modules, "wandb", wandb)
    for environment in ({}, {"WANDB_FINISH_TIMEOUT": "600"}):
        monkeypatch.setattr(os, "environ", environment)
        Wandb(tmp_path, WandbOptions()).open(FACTS, {})
    assert limits == [60.0, None]


class Steps(Tracker):
    def open(self, facts: RunFacts, settings: Mapping[str, Any]) -> None:
        self.first = self.last = 0

    def log(self, numbers: Mapping[str, float], step: int, moment: float) -> None:
        self.first, self.last = self.first or step, step


def test_a_tracker_logs_the_records_of_earlier_launches_one_at_a_time(tmp_path: Path) -> None:
    line = to_json(train(1)).replace('"step": 1,', '"step": %d,')
    (tmp_path / "metrics.jsonl").write_text("".join(f"{line % step}\n" for step in range(1, 5001)) + line[:40])
    (tmp_path / "config.yaml").write_text("{}")
    tracker = Steps()
    tracemalloc.start()
    tracker.begin(replace(FACTS, run_directory=tmp_path))
    _, peak = tracemalloc.get_traced_memory()
    tracemalloc.stop()
    assert (tracker.first, tracker.last) == (1, 5000)
    assert peak < 2 * (tmp_path / "metrics.jsonl").stat().st_size, "of which the keys of what is logged are most"


def test_an_observer_that_raises_is_reported_once_and_dropped_and_the_others_go_on(
    caplog: pytest.LogCaptureFixture,
) -> None:
    before, failing, after = Notebook(), Failing(OSError("no space left")), Notebook()
    observers = Observers([before, failing, after])
    with caplog.at_level(logging.WARNING):
        for step in range(3):
            observers.progress(step)
            observers.record(EVENT)
    assert failing.calls == ["progress 0", "record"]
    assert before.calls == after.calls == ["progress 0", "record", "progress 1", "record", "progress 2", "record"]
    (warning,) = caplog.records
    assert "Failing" in warning.getMessage()
    assert f"OSError: no space left at {Path(__file__).name}:" in warning.getMessage()


def test_an_observer_whose_end_hangs_is_reported_and_holds_up_neither_the_others_nor_the_run(
    caplog: pytest.LogCaptureFixture, monkeypatch: pytest.MonkeyPatch
) -> None:
    class Hanging(Observer):
        def end(self, outcome: Outcome) -> None:
            Event().wait(PATIENCE)  # for a server that is away

    after, handler = Notebook(), signal.getsignal(signal.SIGALRM)
    monkeypatch.setattr(dist_train.monitoring.observers, "_LONGEST_END_SECONDS", 0.2)
    signal.setitimer(signal.ITIMER_REAL, 1000.0, 7.0)  # the caller's, such as that of a test or of a notebook
    try:
        Observers([Hanging(), after]).end(OUTCOME)
    finally:
        left, interval = signal.setitimer(signal.ITIMER_REAL, 0.0)
    assert after.calls == ["end"]
    (warning,) = caplog.records
    assert "Hanging" in warning.getMessage()
    assert "0.2 s" in warning.getMessage()
    assert signal.getsignal(signal.SIGALRM) == handler
    assert interval == 7.0
    assert 0.0 < left <= 1000.0 - 0.2


def test_an_observer_cannot_call_what_every_rank_must(
    caplog: pytest.LogCaptureFixture, monkeypatch: pytest.MonkeyPatch
) -> None:
    class Evaluating(Observer):
        def record(self, record: Record) -> None:
            evaluate("runs/none")

    for name, value in {"RANK": "0", "WORLD_SIZE": "2", "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": "9"}.items():
        monkeypatch.setenv(name, value)
    Observers([Evaluating()]).record(EVENT)
    assert "on every rank" in caplog.text


def test_an_observer_overrides_only_what_it_needs(caplog: pytest.LogCaptureFixture) -> None:
    class Steps(Observer):
        def __init__(self) -> None:
            self.steps: list[int] = []

        def progress(self, step: int) -> None:
            self.steps.append(step)

    observer = Steps()
    observers = Observers([observer])
    observers.begin(FACTS)
    observers.record(EVENT)
    observers.measurement(measurement(1))
    observers.progress(1)
    observers.sync()
    observers.end(OUTCOME)
    assert observer.steps == [1]
    assert not caplog.records


@pytest.mark.parametrize("error", [KeyboardInterrupt(), SystemExit(3)])
def test_what_is_meant_to_end_the_process_passes(error: BaseException) -> None:
    with pytest.raises(type(error)):
        Observers([Failing(error)]).record(EVENT)


def test_two_threads_that_meet_the_same_failure_report_it_once(caplog: pytest.LogCaptureFixture) -> None:
    both = Barrier(2, timeout=PATIENCE)

    class Meeting(Failing):
        def record(self, record: Record) -> None:
            both.wait()
            super().record(record)

        def sync(self) -> None:
            both.wait()
            super().sync()

    observers = Observers([Meeting(OSError("gone")) for _ in range(20)])
    with caplog.at_level(logging.WARNING):
        threads = [Thread(target=observers.sync), Thread(target=observers.record, args=(EVENT,))]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join()
    assert len(caplog.records) == 20
