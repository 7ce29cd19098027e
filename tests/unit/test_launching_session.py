"""What is told of a launch: facts before it, events at its beginning and end, and who watches."""

from __future__ import annotations

import errno
import json
import logging
import os
import re
import signal
import socket
import sys
import threading
import time
from collections.abc import Callable
from contextlib import ExitStack
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Any
from unittest.mock import Mock

import pytest
import torch

import dist_train
from dist_train.checkpoint import writer
from dist_train.checkpoint.files import CheckpointFile, newest_whole, write_checkpoint
from dist_train.cli.main import main
from dist_train.cluster.communicator import Generation, GroupBrokenError, RankLostError, SingleProcess
from dist_train.config import Config, DataSettings, load_config
from dist_train.config.sections import MetricsSettings
from dist_train.launching import run
from dist_train.launching.assembly import assemble
from dist_train.launching.preflight import ResumePoint
from dist_train.launching.run import Regrouping, _leave, _meet, train
from dist_train.launching.session import Session, build_observers
from dist_train.monitoring.observers import Observers
from dist_train.monitoring.prometheus.exporter import Exporter
from dist_train.outcome import (
    DisagreementError,
    DivergedError,
    ExitCode,
    FaultError,
    StoppedError,
    UsageError,
    exit_code_of,
)
from dist_train.rundir.lock import LockRequest, RunLock, is_locked
from dist_train.rundir.metrics_file import JsonLines, read_records, rewind, to_json
from dist_train.rundir.paths import RunDirectory
from dist_train.rundir.records import EventRecord, Observer, Outcome, Record, RunFacts, TrainRecord
from dist_train.rundir.status import Status, read_status
from dist_train.training.recovery import ElasticTrainer
from dist_train.training.stopping import StopRequests
from dist_train.training.trainer import Trainer
from dist_train.watch.run_table import read_runs
from tests.raising import raises
from tests.unit import drawing_data
from tests.unit.checkpoint_files import write
from tests.unit.drawing_data import SIZE, Drawing
from tests.unit.exporting import FACTS, OUTCOME
from tests.unit.image_folders import write_folder
from tests.unit.operator_recorder import OperatorRecorder
from tests.unit.simulated_ranks import SimulatedRanks, on_ranks, results
from tests.unit.small_trainers import build_trainer, small_config
from tests.unit.test_cli_commands import write_config
from tests.waiting import PATIENCE, wait_for

LOGGER = """
from dist_train import Observer

def silent(directory):
    return Observer()
"""


class Told(Observer):
    """An observer that keeps what it is told, in order."""

    def __init__(self) -> None:
        self.facts: list[RunFacts] = []
        self.events: list[EventRecord] = []
        self.ends: list[Outcome] = []

    def begin(self, facts: RunFacts) -> None:
        self.facts.append(facts)

    def regroup(self, facts: RunFacts) -> None:
        self.facts.append(facts)

    def record(self, record: Record) -> None:
        assert not self.ends, "nothing comes after the end"
        if isinstance(record, EventRecord):
            self.events.append(record)

    def end(self, outcome: Outcome) -> None:
        self.ends.append(outcome)


def begun(
    folder: Path, comm: SimulatedRanks | SingleProcess, /, *, going_on: bool = False, **settings: Any
) -> tuple[Session, Told]:
    told, config, directory = Told(), small_config(**settings), RunDirectory(folder)
    if comm.rank == 0:
        directory.create()
    contents = newest_whole(directory.checkpoints, {}) if going_on else None
    session = Session(directory, comm, Observers([told]))
    resume_point = ResumePoint(config, contents)
    trainer = assemble(resume_point, session, StopRequests())
    session.trainer = trainer
    session.begin(resume_point)
    return session, told


def test_a_rank_may_take_longer_to_load_its_data_than_ranks_wait_for_each_other(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    comms: dict[int, SimulatedRanks] = {}
    slow = threading.Lock()

    def waiting(settings: DataSettings, split: str, seed: int) -> Drawing:
        if split == "train" and slow.acquire(blocking=False):
            looks = "load the data: done"
            wait_for(lambda: any(each.names.count(looks) >= 3 for each in comms.values()), "the other rank")
        return Drawing(60)

    monkeypatch.setattr(drawing_data, "drawing", waiting)
    own = {"name": "tests.unit.drawing_data:drawing", "shape": (3, SIZE, SIZE), "classes": 2}
    config = small_config(data=own, evaluation={"train_samples": 9})

    def launch(comm: SimulatedRanks) -> int:
        comms[comm.rank] = comm
        return len(build_trainer(config, tmp_path, comm).splits.train)

    assert results(2, launch) == [60, 60]


def test_a_run_that_cannot_begin_closes_its_data(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    close = Mock()
    monkeypatch.setattr(Trainer, "close", close)
    monkeypatch.setattr(Session, "begin", Mock(side_effect=RankLostError("a rank is gone")))
    with raises(RankLostError, "rank-lost"):
        train(small_config(), tmp_path / "run")
    close.assert_called_once()


def test_a_run_begun_from_python_warns_of_settings_without_effect(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    train(small_config(noise={"method": "none", "amplitude": 0.3}, run={"max_steps": 1}), tmp_path / "run")
    assert capsys.readouterr().err.count("noise.amplitude has no effect") == 1
    assert "noise.amplitude has no effect" in (tmp_path / "run/logs/rank-0.log").read_text()


@pytest.mark.parametrize(("folder", "warns"), [("new/spare", False), ("file/spare", True)])
def test_a_fallback_directory_that_is_of_no_use_is_reported_before_it_is_needed(
    tmp_path: Path, caplog: pytest.LogCaptureFixture, folder: str, warns: bool
) -> None:
    (tmp_path / "file").touch()
    settings = {"fallback_directory": str(tmp_path / folder)}
    train(small_config(checkpoint=settings, run={"max_steps": 1}), tmp_path / "run")
    assert ("checkpoint.fallback_directory" in caplog.text) == warns
    assert not (tmp_path / "new").exists()


def test_status_has_the_address_of_the_metrics_while_they_are_served(tmp_path: Path) -> None:
    addresses: list[str] = []

    class Reader(Observer):
        def record(self, record: Record) -> None:
            status = read_status(tmp_path / "run/status.json")
            addresses.append(status.metrics if status else "")

    assert train(small_config(metrics={"enabled": True, "port": 0}), tmp_path / "run", [Reader()]).state == "finished"
    assert addresses
    assert all(re.fullmatch(r"http://127\.0\.0\.1:[1-9][0-9]*/metrics", address) for address in addresses)
    status = read_status(tmp_path / "run/status.json")
    assert status is not None
    assert status.metrics == ""


@pytest.mark.parametrize(
    ("checkpoint", "interval"),
    [
        ({}, 3),
        ({"every_steps": 2}, 2),
        ({"every_steps": 5}, 3),
        ({"every_epochs": 0, "every_steps": 5}, 5),
        ({"every_epochs": 2}, 0),
        ({"every_epochs": 0}, 0),
    ],
)
def test_the_interval_of_checkpoints_is_the_shorter_planned_one(
    tmp_path: Path, checkpoint: dict[str, int], interval: int
) -> None:
    session, told = begun(tmp_path / "run", SingleProcess(), checkpoint=checkpoint)
    session.finish()
    assert [facts.checkpoint_interval for facts in told.facts] == [interval]


def test_every_rank_s_observers_are_told_the_facts_and_the_end(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("SLURM_JOB_ID", "4711")
    before = time.time()

    def launch(comm: SimulatedRanks) -> Told:
        session, told = begun(tmp_path / "run", comm)
        session.finish()
        return told

    for rank, told in enumerate(results(3, launch)):
        [facts] = told.facts
        assert (facts.rank, facts.world_size, facts.name) == (rank, 3, "run")
        assert (facts.slurm_job, facts.node) == ("4711", socket.gethostname())
        assert facts.nodes == (socket.gethostname(),) * 3
        assert before <= facts.launched <= time.time()
        assert facts.revision.startswith(dist_train.__version__) == (rank == 0)
        assert [end.state for end in told.ends] == ["finished"]


def test_a_run_in_the_current_folder_has_the_name_of_that(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    train(small_config(run={"max_steps": 1}), ".", [told := Told()])
    assert [facts.name for facts in told.facts] == [summary.name for summary in read_runs(Path())] == [tmp_path.name]


def test_all_ranks_of_a_launch_know_when_it_began_and_a_rank_that_joins_learns_it(tmp_path: Path) -> None:
    def launch(comm: SimulatedRanks) -> float:
        session, told = begun(tmp_path / "run", comm)
        if comm.rank == 1:
            joining = Session(session.directory, comm, Observers([told]))
            joining.trainer = session.trainer
            session = joining
        session.note_generation(("here", "here"))
        return told.facts[-1].launched

    before = time.time()
    first, joined = results(2, launch)
    assert before < first == joined


@pytest.mark.parametrize(
    ("reduction", "norm", "given", "threshold"),
    [
        ("float", "ghost", {}, "0"),
        ("exact", "sync", {}, "0"),
        ("exact", "ghost", {}, None),
        ("float", "ghost", {"HOROVOD_FUSION_THRESHOLD": "1"}, "1"),
    ],
)
def test_horovod_sums_floats_one_by_one_so_that_their_bits_do_not_depend_on_what_is_ready_in_time(
    reduction: str, norm: str, given: dict[str, str], threshold: str | None, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(os, "environ", {**given})
    with ExitStack() as stack:
        _meet(small_config(comm={"reduction": reduction}, model={"norm": norm}), stack)
    assert os.environ.get("HOROVOD_FUSION_THRESHOLD") == threshold


@pytest.mark.parametrize(("reduction", "warnings"), [("exact", 2), ("float", 0)])
def test_devices_of_different_models_are_warned_of_where_the_bits_are_to_be_the_same(
    tmp_path: Path,
    caplog: pytest.LogCaptureFixture,
    monkeypatch: pytest.MonkeyPatch,
    reduction: str,
    warnings: int,
) -> None:
    device = threading.local()  # of each rank
    monkeypatch.setattr("dist_train.launching.session.device_name", lambda _: device.name)

    def launch(comm: SimulatedRanks) -> list[str]:
        device.name = ("this card", "that card")[comm.rank]
        session, _ = begun(tmp_path / "run", comm, comm={"reduction": reduction})
        recorded = [session.status.current.environment["device"]] if session.status else []
        session.note_generation(("here", "here"))  # nothing new
        device.name = "this card"  # as if another rank had joined
        session.note_generation(("here", "here"))
        return recorded + ([session.status.current.environment["device"]] if session.status else [])

    assert results(2, launch) == [["that card, this card", "this card"], []]
    assert caplog.text.count("devices differ") == warnings


@pytest.mark.parametrize(("norm", "warnings"), [("ghost", 1), ("sync", 0)])
def test_ranks_without_a_micro_batch_are_warned_of_once(
    tmp_path: Path, caplog: pytest.LogCaptureFixture, norm: str, warnings: int
) -> None:
    batch = {"global_size": 32, "micro_size": 16}
    results(3, lambda comm: begun(tmp_path / "run", comm, model={"norm": norm}, batch=batch))
    assert caplog.text.count("leaves 1 of the 3 ranks without work") == warnings


@pytest.mark.parametrize(
    ("norm", "micro_size", "global_size", "warnings"),
    [("ghost", 6, 26, 1), ("ghost", "auto", 26, 1), ("ghost", 8, 26, 0), ("ghost", 6, 6, 0), ("batch", 6, 26, 0)],
)
def test_micro_batches_smaller_than_the_ghost_size_are_warned_of_once(
    tmp_path: Path,
    caplog: pytest.LogCaptureFixture,
    norm: str,
    micro_size: int | str,
    global_size: int,
    warnings: int,
) -> None:
    model = {"norm": norm, "ghost_size": 8}
    batch = {"global_size": global_size, "micro_size": micro_size}
    # an even share of 26 samples among six ranks: 4
    results(6, lambda comm: begun(tmp_path / "run", comm, model=model, batch=batch))
    assert sum("model.ghost_size" in message for message in caplog.messages) == warnings


@pytest.mark.parametrize(
    ("micro_size", "ranks", "draws", "warnings"), [(26, 1, 1, 1), (13, 2, 1, 1), (13, 1, 1, 0), (26, 1, 2, 0)]
)
def test_graphs_that_no_rank_would_use_are_warned_of_once(
    tmp_path: Path, caplog: pytest.LogCaptureFixture, micro_size: int, ranks: int, draws: int, warnings: int
) -> None:
    def launch(comm: SimulatedRanks) -> None:
        session, _ = begun(tmp_path / "run", comm, batch={"micro_size": micro_size}, noise={"draws": draws})
        assert session.trainer is not None
        session.trainer.training_step = replace(session.trainer.training_step, graph_recorder=OperatorRecorder())
        session.begin(ResumePoint(session.trainer.config))

    results(ranks, launch)
    assert caplog.text.count("precision.cuda_graphs has no effect") == warnings


NORMLESS = """
from torch import nn
def net(images, width, norm): return nn.Sequential(nn.Flatten(), nn.Linear(64, images.classes))
"""


def test_a_model_without_norms_is_not_warned_of_them(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    (tmp_path / "mine.py").write_text(NORMLESS)
    model = {"name": f"{tmp_path / 'mine.py'}:net", "width": 1.0, "norm": "ghost", "ghost_size": 8}
    begun(tmp_path / "run", SingleProcess(), model=model, batch={"global_size": 26, "micro_size": 6})
    assert "ghost norm" not in caplog.text


@pytest.mark.parametrize(
    ("keeps_logger", "before", "folder", "changed"),
    [
        (True, {}, "mine", ""),
        (True, {}, "moved", ""),
        (False, {}, "mine", ""),  # as a replay, which has no loggers
        (False, {"mine.py": "another digest"}, "mine", "mine.py"),
        (True, {"gone.py": "a digest"}, "mine", "gone.py"),
    ],
)
def test_plugins_have_changed_if_they_could_change_the_result(
    tmp_path: Path, keeps_logger: bool, before: dict[str, str], folder: str, changed: str
) -> None:
    code = {"mine/mine.py": "def half(over):\n    return 1 - over / 2\n", "logs/logs.py": LOGGER}
    for name, text in code.items():
        (tmp_path / name).parent.mkdir()
        (tmp_path / name).write_text(text)
    settings: dict[str, Any] = {
        "schedule": {"decay": f"{tmp_path}/mine/mine.py:half"},
        "metrics": {"loggers": [{"name": f"{tmp_path}/logs/logs.py:silent"}]},
    }
    session, _ = begun(tmp_path / "run", SingleProcess(), **settings)
    trainer = session.trainer
    assert trainer is not None
    assert [*trainer.plugins] == ["logs/logs.py", "mine/mine.py"]
    plugins = {**trainer.plugins, **{f"mine/{name}": digest for name, digest in before.items()}}
    saved = trainer.state.contents(trainer.progress, 0.0, trainer.config, plugins)
    write_checkpoint(session.directory.checkpoints, saved, lambda: None)
    if not keeps_logger:
        del settings["metrics"]
    (tmp_path / "mine").rename(tmp_path / folder)
    settings["schedule"] = {"decay": f"{tmp_path}/{folder}/mine.py:half"}
    _, told = begun(tmp_path / "run", SingleProcess(), going_on=True, **settings)
    events = [event.details["files"] for event in told.events if event.event == "plugins_changed"]
    assert events == ([f"mine/{changed}"] if changed else [])


def test_outside_of_slurm_there_is_no_job_and_nothing_was_requeued(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.delenv("SLURM_JOB_ID", raising=False)
    monkeypatch.delenv("SLURM_RESTART_COUNT", raising=False)
    _, told = begun(tmp_path, SingleProcess())
    assert told.facts[0].slurm_job == ""
    assert told.events == []


@pytest.mark.parametrize(("count", "events"), [("0", []), ("2", [("requeued", {"restart": 2})]), ("x", [])])
def test_a_job_that_slurm_has_started_anew_says_so(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, count: str, events: list[object]
) -> None:
    monkeypatch.setenv("SLURM_JOB_ID", "17")
    monkeypatch.setenv("SLURM_RESTART_COUNT", count)
    _, told = begun(tmp_path, SingleProcess())
    assert [(event.event, dict(event.details)) for event in told.events] == events


@pytest.mark.parametrize(
    ("error", "event"),
    [
        (DivergedError("the loss is not finite"), "not_finite"),
        (DisagreementError("rank 2 holds other weights"), "disagreement"),
        (StoppedError("stopped"), None),
        (UsageError("no"), None),
    ],
)
def test_how_a_run_fails_is_an_event_before_its_end_on_rank_0(
    tmp_path: Path, error: Exception, event: str | None
) -> None:
    def launch(comm: SimulatedRanks) -> Told:
        session, told = begun(tmp_path, comm)
        session.fail(type(error)(*error.args))
        return told

    first, second = results(2, launch)
    assert [record.event for record in first.events] == ([event] if event else [])
    assert all(str(error) in str(record.details["reason"]) for record in first.events)
    assert second.events == []
    assert len(first.ends) == len(second.ends) == 1


def test_a_long_reason_is_cut_in_the_status(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    def launch(comm: SimulatedRanks) -> None:
        session, _ = begun(tmp_path, comm)
        with caplog.at_level(logging.INFO):
            session.fail(RuntimeError("word " * 1000 + "end"))

    results(1, launch)
    status = read_status(tmp_path / "status.json")
    assert status is not None
    assert len(status.reason) < 600
    assert status.reason.endswith("... (see the log)")
    assert "word end" in caplog.text


def test_a_rank_that_is_left_keeps_in_the_status_how_far_the_run_was(tmp_path: Path) -> None:
    def launch(comm: SimulatedRanks) -> None:
        session, _ = begun(tmp_path, comm)
        trainer = session.trainer
        assert trainer is not None
        trainer.run()
        comm.barrier()
        if comm.rank == 1:
            session.lose("rank 0 does not answer")

    results(2, launch)
    status = read_status(RunDirectory(tmp_path).status)
    assert status is not None
    assert (status.state, status.reason) == ("failed", "rank 1: rank 0 does not answer")
    assert (status.step, status.epoch, status.total_steps) == (6, 2.0, 6)
    assert status.environment


def test_records_that_cannot_be_flushed_keep_the_checkpoint_back_and_are_recorded_further(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    directory, first, second = RunDirectory(tmp_path), EventRecord(1, "one", 5.0, {}), EventRecord(2, "two", 5.0, {})

    def fail(descriptor: int) -> None:
        raise OSError(errno.EDQUOT, "Disk quota exceeded")

    session = Session(directory, SingleProcess(), Observers([JsonLines(directory.metrics)]))
    session.observers.record(first)
    with monkeypatch.context() as patch:
        patch.setattr(os, "fsync", fail)
        with pytest.raises(OSError, match="quota"):
            session.before_publishing()
    session.observers.record(second)
    session.before_publishing()
    assert read_records(directory.metrics) == (first, second)
    session.finish()


def test_a_run_directory_that_was_replaced_gets_no_checkpoint(tmp_path: Path) -> None:
    session, _ = begun(tmp_path / "run", SingleProcess())
    session.lock = LockRequest(session.directory).wait(0)
    session.before_publishing()
    (tmp_path / "run").rename(tmp_path / "moved")
    begun(tmp_path / "run", SingleProcess())
    LockRequest(session.directory).wait(0)
    with pytest.raises(OSError, match="replaced"):
        session.before_publishing()


def test_a_launch_that_has_lost_its_lock_leaves_the_status_to_the_one_that_has_it(tmp_path: Path) -> None:
    directory = RunDirectory(tmp_path)
    lost, held = (Session(directory, SingleProcess(), Observers(), locked_anew(directory)) for _ in range(2))
    lost.fail(FaultError("the node was cut off"))
    status = read_status(directory.status)
    assert status is not None
    assert status.state == "starting"
    held.finish()
    status = read_status(directory.status)
    assert status is not None
    assert status.state == "finished"


def locked_anew(directory: RunDirectory) -> RunLock:
    """Return the lock, of which a file server believes that the process which had it is gone."""
    directory.lock.unlink(missing_ok=True)
    lock = LockRequest(directory).wait(0)
    assert lock is not None
    return lock


def test_a_relative_fallback_directory_is_that_of_the_launch_also_for_one_in_another_folder(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    directory = RunDirectory(tmp_path / "run")

    class FillsTheDisk(Observer):
        def begin(self, facts: RunFacts) -> None:
            directory.checkpoints.rename(tmp_path / "kept")
            directory.checkpoints.touch()

    for folder in ("here", "there"):
        (tmp_path / folder).mkdir()
    monkeypatch.chdir(tmp_path / "here")
    config = small_config(checkpoint={"fallback_directory": "spare"}, run={"max_steps": 2})
    with raises(FaultError, "checkpoint-not-written"):
        train(config, directory.root, [FillsTheDisk()])
    directory.checkpoints.unlink()
    (tmp_path / "kept").rename(directory.checkpoints)
    monkeypatch.chdir(tmp_path / "there")
    train(config, directory.root, [told := Told()])
    assert [facts.start_step for facts in told.facts] == [2]


def test_a_run_that_begins_again_at_another_run_s_later_checkpoint_has_no_records_before_it(tmp_path: Path) -> None:
    class LeavesAt4(Observer):
        def record(self, record: Record) -> None:
            if record.step == 4:
                sys.exit()

    def continued(*observers: Observer) -> None:
        settings = {"checkpoint": {"every_epochs": 0}, "evaluation": {"every_epochs": 0}}
        train(small_config(**settings, run={"resume": str(tmp_path / "one")}), tmp_path / "other", observers)

    train(small_config(run={"max_steps": 2}), tmp_path / "one")
    with pytest.raises(SystemExit):
        continued(LeavesAt4())
    train(small_config(run={"max_steps": 5}), tmp_path / "one")
    continued()
    records = read_records(tmp_path / "other" / "metrics.jsonl")
    assert [record.step for record in records if isinstance(record, TrainRecord)] == [6]


@pytest.mark.parametrize(
    ("every", "kept", "warns"), [(1, 2, True), (1, 3, False), (2, 1, True), (2, 2, False), (9, 0, False)]
)
def test_records_that_end_before_the_checkpoint_are_reported(
    tmp_path: Path, caplog: pytest.LogCaptureFixture, every: int, kept: int, warns: bool
) -> None:
    """A copy of the run directory may have those of an earlier moment, or none."""
    settings = {"metrics": {"enabled": False, "every_steps": every}, "evaluation": {"every_epochs": 0}}
    train(small_config(**settings, run={"max_steps": 3}), tmp_path)
    metrics = tmp_path / "metrics.jsonl"
    rewind(metrics, kept)
    train(small_config(**settings), tmp_path)
    assert (f"{metrics} ends at step" in caplog.text) == warns


def test_a_resume_with_other_data_records_it(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    root = write_folder(tmp_path / "data", per_class=10)

    def events_at_beginning(root: Path) -> list[str]:
        data = {"name": "imagefolder", "root": root, "classes": 3, "image_size": 16}
        session, told = begun(tmp_path / "run", SingleProcess(), going_on=True, data=data)
        if not list((tmp_path / "run" / "checkpoints").glob("*.pt")):
            session._running.run()
        session._running.close()
        return [event.event for event in told.events]

    events_at_beginning(root)
    moved = root.rename(tmp_path / "elsewhere")
    assert "data_changed" not in events_at_beginning(moved)
    assert not caplog.records
    (moved / "train" / "bee" / "0000.png").rename(moved / "train" / "bee" / "9999.png")
    assert "data_changed" in events_at_beginning(moved)
    assert "run.init_from" in caplog.text
    checkpoints = tmp_path / "run" / "checkpoints"
    former = newest_whole(checkpoints, {})
    assert former is not None
    for path in checkpoints.iterdir():
        path.unlink()
    write(checkpoints, **{**vars(former), "data": ""})  # as of a version that did not record it
    assert "data_changed" not in events_at_beginning(moved)


def test_the_last_good_checkpoint_is_not_one_whose_evaluation_was_not_finite(tmp_path: Path) -> None:
    session, told = begun(tmp_path, SingleProcess())
    for step, non_finite in ((1, 1), (2, 1), (3, 3)):
        write(session.directory.checkpoints, step, metrics={"non_finite_step": non_finite})
    session.fail(DivergedError("the loss is not finite"))
    assert [end.reason for end in told.ends] == [
        f"the loss is not finite; the last good checkpoint is {session.directory.checkpoint(2)}"
    ]


def test_a_checkpoint_that_is_being_written_when_the_launch_fails_is_recorded(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    session, told = begun(tmp_path, SingleProcess(), checkpoint={"every_steps": 1})
    trainer, failed = session._running, threading.Event()

    def write_late(*arguments: Any) -> CheckpointFile:
        assert failed.wait(PATIENCE)
        return write_checkpoint(*arguments)

    monkeypatch.setattr(writer, "write_checkpoint", write_late)
    trainer.advance()
    threading.Timer(0.2, failed.set).start()
    session.fail(OSError("the data are gone"))
    assert [(event.event, event.step) for event in told.events if event.event == "checkpoint"] == [("checkpoint", 1)]
    assert [end.last_checkpoint for end in told.ends] == [session.directory.checkpoint(1)]
    trainer.close()


@pytest.mark.parametrize("error", [None, StoppedError("stopped"), DivergedError("the loss is not finite")])
def test_a_record_that_cannot_be_read_does_not_change_how_a_launch_ends(
    tmp_path: Path, error: StoppedError | DivergedError | None
) -> None:
    session, told = begun(tmp_path, SingleProcess())
    write(session.directory.checkpoints, 1)
    record = session.directory.checkpoint(1).with_suffix(".json")
    record.unlink()
    record.symlink_to(record)  # as if the file server did not answer
    if error is None:
        session.finish()
    else:
        session.fail(error)
    status = read_status(session.directory.status)
    assert status is not None
    assert status.exit_code == (ExitCode.FINISHED if error is None else error.exit_code)
    assert [end.last_checkpoint for end in told.ends] == [None]


def test_a_finished_run_stays_finished_if_a_later_launch_is_refused(tmp_path: Path) -> None:
    root, run = write_folder(tmp_path / "data", per_class=10), tmp_path / "run"
    config = small_config(data={"name": "imagefolder", "root": root, "classes": 3, "image_size": 16})

    def refused() -> Status | None:
        root.rename(tmp_path / "not mounted")
        with raises(UsageError, "image-folder-missing"):
            train(config, run)
        (tmp_path / "not mounted").rename(root)
        return read_status(run / "status.json")

    train(config, run)
    before = read_status(run / "status.json")
    assert before is not None
    (run / "status.json").write_text(replace(before, state="stopped").to_json())
    after = refused()
    assert after is not None
    assert (after.state, after.exit_code) == ("failed", ExitCode.USAGE)
    assert train(config, run).state == "finished"
    after = refused()
    assert after is not None
    assert (after.state, after.exit_code, after.step) == ("finished", ExitCode.USAGE, before.step)
    assert str(root) in after.reason


def test_a_stopped_run_that_fewer_steps_make_a_finished_one_has_these_settings(tmp_path: Path) -> None:
    class Stops(Observer):
        def record(self, record: Record) -> None:
            os.kill(os.getpid(), signal.SIGTERM)

    with raises(StoppedError, "stopped"):
        train(small_config(), tmp_path, [Stops()])
    assert train(small_config(run={"max_steps": 1}), tmp_path).state == "finished"
    assert load_config(tmp_path / "config.yaml").run.max_steps == 1
    with raises(StoppedError, "stopped"):
        train(small_config(), tmp_path, [Stops()])
    status = read_status(tmp_path / "status.json")
    assert status is not None
    assert status.state == "stopped"


def test_a_damaged_checkpoint_that_a_refused_launch_finds_is_recorded_by_the_next(tmp_path: Path) -> None:
    root, directory = write_folder(tmp_path / "data", per_class=10), RunDirectory(tmp_path / "run")
    data = {"name": "imagefolder", "root": root, "classes": 3, "image_size": 16}
    config = small_config(data=data, checkpoint={"every_steps": 1})
    outcome = train(config, directory.root)
    last = directory.checkpoint(outcome.step)
    last.write_bytes(b"")
    with raises(UsageError, "settings-changed"):
        train(small_config(data=data, optimizer={"learning_rate": 0.5}), directory.root)
    root.rename(tmp_path / "not mounted")
    with raises(UsageError, "image-folder-missing"):
        train(config, directory.root)
    assert last.exists()
    (tmp_path / "not mounted").rename(root)
    train(config, directory.root)
    events = [each for each in read_records(directory.metrics) if isinstance(each, EventRecord)]
    damaged = [(each.step, each.details) for each in events if each.event == "corrupt_checkpoint"]
    assert damaged == [(outcome.step - 1, {"path": last.name})]
    assert last.with_name(f"{last.name}.damaged").exists()
    assert newest_whole(directory.checkpoints, {}) is not None


@pytest.mark.parametrize("by", ["lose", "fail"])
def test_what_a_failed_rank_has_recorded_of_itself_is_kept(tmp_path: Path, by: str) -> None:
    session, told = begun(tmp_path, SingleProcess())
    path = session.directory.status
    fields = json.loads(path.read_text())
    path.write_text(
        json.dumps(
            {**fields, "pid": os.getpid() + 1, "state": "failed", "exit_code": 2, "reason": "rank 1: no such device"}
        )
    )
    if by == "lose":
        session.lose("rank 1 died")
    else:
        session.fail(RankLostError("rank 1 died"))
    status = read_status(path)
    assert status is not None
    assert status.reason == "rank 1: no such device"
    assert [(end.reason, end.exit_code) for end in told.ends] == [(status.reason, 2)] * (by == "fail")


def test_how_a_rank_has_ended_is_kept_if_another_is_lost_after_it(tmp_path: Path) -> None:
    session, told = begun(tmp_path, SingleProcess())
    session.fail(DivergedError("the loss is not finite"))
    before = session.directory.status.read_text()
    session.lose("rank 1 died")
    assert session.directory.status.read_text() == before
    assert [end.exit_code for end in told.ends] == [ExitCode.DIVERGED]


def test_prometheus_learns_that_a_run_whose_ranks_are_lost_has_failed(tmp_path: Path) -> None:
    session, _ = begun(tmp_path / "run", SingleProcess())
    exporter = Exporter(MetricsSettings(port=0, targets_directory=tmp_path / "targets"))
    session.observers = Observers([exporter])
    exporter.begin(FACTS)
    session.lose("rank 1 does not answer")
    (target,) = (tmp_path / "targets").glob("*.json")
    wait_for(lambda: '"outcome": "failed"' in target.read_text())
    exporter.end(OUTCOME)


FAILING = """
import torch
from dist_train.optim.noise import SmoothOut

class Optimizer(torch.optim.SGD):
    def __init__(self, settings, groups):
        super().__init__([parameter for group in groups for parameter in group.parameters])
        self.updates = 0

    def step(self):
        self.updates += 1
        if self.updates == 2:
            torch.ones(2) @ torch.ones(3)

class Noise(SmoothOut):
    def perturb(self, step):
        if step == 1:
            raise KeyError("mine")
        super().perturb(step)

class Broken(SmoothOut):
    def restore(self):
        self.weights.compute_with(None)

class Model(torch.nn.Module):
    def __init__(self, images, width, norm):
        super().__init__()
        self.layer, self.last = torch.nn.Linear(64, images.classes), 0

    def forward(self, images):
        if len(images) == 2 and self.last == 6:
            raise ValueError("a batch's last micro-batch is smaller")
        self.last = len(images)
        return self.layer(images.flatten(1))

class Few(Model):
    def forward(self, images):
        if len(images) > 4:
            raise RuntimeError("more than in the trial")
        return super().forward(images)
"""


@pytest.mark.parametrize(
    ("settings", "mistake"),
    [
        ({"optimizer": {"name": "Optimizer"}}, "torch.ones(2) @"),
        ({"noise": {"method": "Noise"}}, "KeyError"),
        ({"model": {"name": "Model", "norm": "none", "width": 1.0}, "batch": {"global_size": 26}}, "ValueError"),
        ({"model": {"name": "Few", "norm": "none", "width": 1.0}, "batch": {"micro_size": "auto"}}, "RuntimeError"),
    ],
)
def test_a_plugin_that_fails_in_training_is_named_with_the_line(
    tmp_path: Path, settings: dict[str, dict[str, Any]], mistake: str
) -> None:
    file = tmp_path / "mine.py"
    file.write_text(FAILING)
    for section in settings.values():
        section.update({key: f"{file}:{value}" for key, value in section.items() if key in ("name", "method")})
    with raises(UsageError, "plugin-failed") as failed:
        train(small_config(**settings), tmp_path / "run")
    line = next(number for number, text in enumerate(FAILING.splitlines(), 1) if mistake in text)
    assert f"mine.py:{line}:" in str(failed.value)
    status = read_status(tmp_path / "run" / "status.json")
    assert status is not None
    assert (status.state, status.exit_code) == ("failed", ExitCode.USAGE)


@pytest.mark.parametrize(
    "fault", ["OSError('stale file handle')", "RuntimeError('CUDA error: uncorrectable ECC error')"]
)
def test_a_fault_of_the_machine_within_a_plugin_s_call_may_be_retried(tmp_path: Path, fault: str) -> None:
    (tmp_path / "mine.py").write_text(FAILING.replace("torch.ones(2) @ torch.ones(3)", f"raise {fault}"))
    with pytest.raises((FaultError, RuntimeError)) as caught:
        train(small_config(optimizer={"name": f"{tmp_path / 'mine.py'}:Optimizer"}), tmp_path / "run")
    assert exit_code_of(caught.value) == ExitCode.FAULT


def test_a_mistake_in_the_package_that_a_plugin_calls_is_not_the_plugin_s(tmp_path: Path) -> None:
    (tmp_path / "mine.py").write_text(FAILING)
    with pytest.raises(TypeError):
        train(small_config(noise={"method": f"{tmp_path / 'mine.py'}:Broken"}), tmp_path / "run")


class Leaving(Told):
    """An observer that ends the process, as far as it can, after the second update."""

    def __init__(self, leave: Callable[[], object]) -> None:
        super().__init__()
        self.leave = leave

    def record(self, record: Record) -> None:
        super().record(record)
        if record.step == 2:
            self.leave()


def interrupt_twice() -> None:
    for _ in range(2):
        signal.raise_signal(signal.SIGINT)


@pytest.mark.parametrize(
    ("leave", "error"),
    [(interrupt_twice, KeyboardInterrupt), (partial(sys.exit, 3), SystemExit)],
    ids=["signals", "exit"],
)
def test_a_run_that_is_left_at_once_has_ended(
    tmp_path: Path, leave: Callable[[], object], error: type[BaseException]
) -> None:
    told = Leaving(leave)
    with pytest.raises(error):
        train(small_config(), tmp_path / "run", [told])
    status = read_status(tmp_path / "run" / "status.json")
    assert status is not None
    assert (status.state, status.reason, status.step) == ("failed", error.__name__, 2)
    assert [outcome.state for outcome in told.ends] == ["failed"]
    assert train(small_config(), tmp_path / "run").state == "finished"


@pytest.mark.parametrize(
    ("error", "is_left", "state"),
    [
        (OSError("stale file handle"), True, "running"),
        (UsageError("a rank that is not restarted"), True, "failed"),
        (RankLostError("no rank is left"), False, "failed"),
    ],
)
def test_a_rank_that_fails_where_others_may_continue_keeps_nobody_waiting_and_the_status(
    tmp_path: Path, error: Exception, is_left: bool, state: str
) -> None:
    session, told = begun(tmp_path, SingleProcess())
    session.comm.is_elastic = True
    session.fail(error)
    assert [outcome.is_left for outcome in told.ends] == [is_left]
    status = read_status(session.directory.status)
    assert status is not None
    assert status.state == state


def test_a_gpu_without_memory_for_nccl_is_recorded_by_its_rank_alone(tmp_path: Path) -> None:
    begun(tmp_path, SingleProcess())
    other = SingleProcess()
    other.rank, other.size = 1, 2
    Session(RunDirectory(tmp_path), other, Observers()).fail(UsageError("no memory for NCCL", code="out-of-memory"))
    status = read_status(tmp_path / "status.json")
    assert status is not None
    assert (status.state, status.exit_code, status.reason) == ("failed", ExitCode.USAGE, "rank 1: no memory for NCCL")


@pytest.mark.parametrize("code", ["plugin-failed", "plugin-data-form", "image-depth"])
def test_a_mistake_in_the_samples_of_a_rank_in_training_is_recorded_by_that_rank(tmp_path: Path, code: str) -> None:
    first, _ = begun(tmp_path, SingleProcess())
    other = SingleProcess()
    other.rank, other.size = 1, 2
    session = Session(RunDirectory(tmp_path), other, Observers())
    session.trainer = first.trainer
    session.fail(UsageError("sample 7 has the label 10", code=code))
    status = read_status(tmp_path / "status.json")
    assert status is not None
    assert (status.state, status.exit_code) == ("failed", ExitCode.USAGE)
    assert status.reason == "rank 1: sample 7 has the label 10"


@pytest.mark.parametrize("error", [RankLostError("the run has ended meanwhile"), OSError("no such device")])
def test_a_rank_that_fails_before_it_has_joined_leaves_the_status_to_the_others(
    tmp_path: Path, error: Exception
) -> None:
    begun(tmp_path, SingleProcess())[0].finish()
    before = read_status(tmp_path / "status.json")
    joining = SingleProcess()
    joining.rank, joining.size, joining.is_elastic, joining.is_joining = 1, 2, True, True
    Session(RunDirectory(tmp_path), joining, Observers()).fail(error)
    assert read_status(tmp_path / "status.json") == before


class LosesOneWhileItMeets(SingleProcess):
    """The only rank left, which learns of a loss once it has taken over the run directory."""

    is_elastic = True
    has_lost_one = False

    def broadcast(self, tensor: torch.Tensor, name: str, root: int = 0) -> None:
        if name == "launch time.length" and not self.has_lost_one:
            self.has_lost_one = True
            raise GroupBrokenError("rank 1 died")


class Collecting(Observer):
    """Keeps the records that it gets."""

    def __init__(self) -> None:
        self.records: list[Record] = []
        self.has_begun = False

    def begin(self, facts: RunFacts) -> None:
        self.has_begun = True

    def record(self, record: Record) -> None:
        self.records.append(record)


CONNECTING = """
from dist_train import Observer


class Connecting(Observer):
    def __init__(self, directory):
        if (directory / "server-is-down").exists():
            raise ConnectionError("no answer")
"""
"""A logger that cannot be built while a file says that its server is down."""


def test_a_loss_right_after_a_takeover_without_a_logger_s_server_loses_no_record_of_the_former_rank_0(
    tmp_path: Path,
) -> None:
    directory = RunDirectory(tmp_path)
    directory.create()
    (tmp_path / "connecting.py").write_text(CONNECTING)
    config = small_config(metrics={"loggers": [{"name": f"{tmp_path}/connecting.py:Connecting"}]})
    written, former = EventRecord(1, "signal", 4.0, {}), EventRecord(1, "dealing", 5.0, {})
    of_rank_0 = EventRecord(1, "checkpoint", 4.5, {"path": "step-00000001.pt", "seconds": 30.5})
    directory.metrics.write_text(f"{to_json(written)}\n{to_json(of_rank_0)}\n")
    own = Collecting()
    generation = Generation(2, 0, 1, ("", 0), ("here",), ("rank 0 died",), "", ())

    def launch(comm: SimulatedRanks) -> None:
        comm.is_elastic = True
        opened = build_observers(config.metrics, directory, comm.rank)
        session = Session(directory, comm, opened, more_observers=[own])
        session.trainer = trainer = assemble(ResumePoint(config), session, StopRequests())
        session._show_facts(("here",))
        if comm.rank == 0:
            session.finish()
        comm.barrier()  # a rank takes over once rank 0 has ended
        if comm.rank == 0:
            return
        (tmp_path / "server-is-down").touch()
        with raises(UsageError, "plugin-failed"):
            build_observers(config.metrics, directory, 0)
        assert isinstance(trainer, ElasticTrainer)
        trainer.progress.step = 1
        trainer.recent.add(written)
        trainer.recent.add(former)
        session.comm = trainer.comm = LosesOneWhileItMeets()
        with ExitStack() as stack:
            regroup = Regrouping(session, stack)
            with pytest.raises(GroupBrokenError):
                regroup(trainer, generation)
            regroup(trainer, generation)
            assert not trainer.recent.add(replace(of_rank_0, time=6.0)), "it would be counted twice"
            assert trainer.time_limit._longest_save == 30.5
            session.finish()

    results(2, launch)
    assert is_locked(directory.lock) is False
    assert all(record in read_records(directory.metrics) for record in (written, former))
    assert former in own.records
    assert written not in own.records
    assert own.has_begun


def test_threads_are_as_many_as_suit_all_ranks(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(run, "share_of_threads", lambda comm: 4 - comm.rank)
    shared = results(3, lambda comm: run._shared_config(comm, Config()))
    assert [config.precision.threads for config in shared] == [2] * 3


@pytest.mark.parametrize("is_held", [False, True])
def test_a_rank_that_cannot_take_over_fails_alone(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, is_held: bool
) -> None:
    monkeypatch.setattr(run, "LEASE_SECONDS", 0.0)
    directory = RunDirectory(tmp_path)
    directory.create()
    if is_held:
        assert LockRequest(directory).wait(0.0)
    else:
        directory.lock.mkdir()  # an OSError, whoever runs the test
    generation = Generation(2, 0, 2, ("", 0), ("here", "there"), ("rank 0 died",), "", ())

    def regroup(comm: SimulatedRanks) -> None:
        comm.is_elastic = True
        session = Session(directory, comm, Observers())
        trainer = assemble(ResumePoint(small_config()), session, StopRequests())
        assert isinstance(trainer, ElasticTrainer)
        trainer.saving.writer = None
        with ExitStack() as stack:
            Regrouping(session, stack)(trainer, generation)

    failed, other = on_ranks(2, regroup)
    assert isinstance(failed, FaultError if is_held else OSError)
    assert isinstance(other, RankLostError)


def test_ranks_do_not_wait_in_one_operation_while_rank_0_reads_a_large_checkpoint(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Gloo ends an operation for which a rank does not come in time."""
    comms: dict[int, SimulatedRanks] = {}

    def find(config: Config, directory: RunDirectory) -> ResumePoint:
        before = len(comms[1].names)
        wait_for(lambda: len(comms[1].names) > before + 3, "rank 1 waits in one operation")
        return ResumePoint(config)

    def launch(comm: SimulatedRanks) -> None:
        comms[comm.rank] = comm
        comm.barrier()
        with ExitStack() as stack:
            run._open_run(small_config(), RunDirectory(tmp_path), comm, stack)

    monkeypatch.setattr(run, "find_resume_point", find)
    results(2, launch)


@pytest.mark.parametrize("error", [None, DivergedError("the loss is inf"), FaultError("the last save failed")])
def test_no_rank_leaves_a_run_that_has_ended_before_rank_0(tmp_path: Path, error: Exception | None) -> None:
    """Slurm's srun, which lets the other ranks end within LOSS_SECONDS, killed rank 0 while a tracker uploaded."""
    comms: dict[int, SimulatedRanks] = {}
    is_done = threading.Event()

    class Uploads(Observer):
        def end(self, outcome: Outcome) -> None:
            wait_for(lambda: len(comms[1].names) > 3, "rank 1 waits in one operation")
            is_done.set()

    def finish(comm: SimulatedRanks) -> bool:
        comms[comm.rank] = comm
        comm.barrier()
        session = Session(RunDirectory(tmp_path), comm, Observers([Uploads()] if comm.rank == 0 else []))
        if error is None:
            assert run._finish(session).state == "finished"
        else:
            comm.last_action_failed = isinstance(error, FaultError)
            run._fail(session, error)
            assert run._is_shared(error, comm), "this rank waits for the others when it has closed its files"
        return is_done.is_set()

    assert results(2, finish) == [True, True]


def test_a_launch_whose_log_cannot_be_opened_has_failed(tmp_path: Path) -> None:
    """It was `starting` for ever."""
    directory = RunDirectory(tmp_path)
    (directory.logs / "rank-0.log").mkdir(parents=True)
    with raises(FaultError, "disk-failed"):
        train(small_config(), tmp_path)
    status = read_status(directory.status)
    assert status is not None
    assert (status.state, status.exit_code) == ("failed", ExitCode.FAULT)
    assert "rank-0.log" in status.reason


def test_a_rank_whose_new_log_cannot_be_opened_continues_without_it(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    directory = RunDirectory(tmp_path)
    directory.create()
    (directory.logs / "rank-1.log").mkdir()
    generation = Generation(2, 0, 2, ("", 0), ("here", "there"), ("rank 1 died",), "", ())

    def regroup(comm: SimulatedRanks) -> None:
        comm.is_elastic = True
        session = Session(directory, comm, Observers())
        trainer = assemble(ResumePoint(small_config()), session, StopRequests())
        assert isinstance(trainer, ElasticTrainer)
        session.trainer = trainer
        with ExitStack() as stack:
            Regrouping(session, stack)(trainer, generation)

    results(2, regroup)
    assert "rank 1 continues without its log" in capsys.readouterr().err


def test_a_launch_that_begins_again_keeps_in_the_status_how_far_the_run_was(tmp_path: Path) -> None:
    session, _ = begun(tmp_path, SingleProcess())
    assert session.status is not None
    session.status.change("running", step=4, epoch=1.5, total_steps=6, best_accuracy=0.5)
    Session(RunDirectory(tmp_path), SingleProcess(), Observers([]))
    status = read_status(RunDirectory(tmp_path).status)
    assert status is not None
    assert (status.state, status.step, status.epoch, status.total_steps) == ("starting", 4, 1.5, 6)


def test_a_run_that_diverged_goes_on_from_its_checkpoint_and_its_record_of_it_is_gone(tmp_path: Path) -> None:
    settings = {"model": {"norm": "none", "width": 0.25}, "checkpoint": {"every_steps": 1}}
    config = write_config(tmp_path, optimizer={"learning_rate": 1e30}, **settings)
    run = tmp_path / "run"

    def events() -> list[EventRecord]:
        return [record for record in read_records(run / "metrics.jsonl") if isinstance(record, EventRecord)]

    assert main(["train", config, "--run-dir", str(run)]) == 3
    assert len([event for event in events() if event.event == "not_finite"]) == 1
    assert main(["train", config, "--run-dir", str(run), "run.resume=auto"]) == 3
    assert len([event for event in events() if event.event == "not_finite"]) == 1
    assert [event.event for event in events()].count("resumed") == 1


def test_a_finished_run_started_again_keeps_its_records_and_the_versions_that_trained_it(tmp_path: Path) -> None:
    run = tmp_path / "run"
    words = ["train", write_config(tmp_path), "--run-dir", str(run)]
    assert main(words) == 0
    assert not RunDirectory(run).reserve.exists()
    records, file = (run / "metrics.jsonl").read_bytes(), RunDirectory(run).status
    status = json.loads(file.read_text())
    status["environment"]["torch"] = "1.2.3"
    file.write_text(json.dumps(status))
    assert main(words) == 0
    assert (run / "metrics.jsonl").read_bytes() == records
    after = json.loads(file.read_text())
    assert (after["state"], after["environment"]) == ("finished", status["environment"])
    assert main([*words, "run.epochs=4"]) == 0
    assert json.loads(file.read_text())["environment"]["torch"] == torch.__version__


@pytest.mark.parametrize("source", ["", "other@3"])
def test_a_run_whose_checkpoints_are_gone_begins_again_and_keeps_its_records(tmp_path: Path, source: str) -> None:
    run = tmp_path / "run"
    words = ["train", write_config(tmp_path), "--run-dir", str(run)]
    if source:
        assert main([*words[:-1], str(tmp_path / "other")]) == 0
        words.append(f"run.resume={tmp_path / source}")
    assert main(words) == 0
    records = (run / "metrics.jsonl").read_bytes()
    for path in (run / "checkpoints").iterdir():
        path.unlink()
    assert main(words) == 0
    (kept,) = run.glob("metrics-*.jsonl")
    assert kept.read_bytes() == records
    assert kept.name in (run / "logs" / "rank-0.log").read_text()
    assert len(read_records(run / "metrics.jsonl")) == len(read_records(kept))


@pytest.mark.parametrize("missing", ["step-*", "step-00000006.pt"])
def test_a_refused_launch_leaves_the_records_to_one_that_finds_all_checkpoints(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, missing: str
) -> None:
    """As where a run is started before all of it has been copied, and its data are not there yet."""
    directory = RunDirectory(tmp_path / "run")
    train(small_config(), directory.root)
    records = directory.metrics.read_bytes()
    copied = {path: path.read_bytes() for path in directory.checkpoints.glob(missing)}
    for path in copied:
        path.unlink()
        if missing.endswith(".pt"):
            path.touch()
    with monkeypatch.context() as patch:
        patch.setattr(run, "assemble", Mock(side_effect=UsageError("no data")))
        with raises(UsageError, "usage"):
            train(small_config(), directory.root)
    for path, content in copied.items():
        path.write_bytes(content)
    assert train(small_config(), directory.root).step == 6
    assert directory.metrics.read_bytes() == records


@pytest.mark.parametrize(
    ("metrics", "first", "others"),
    [
        ({"enabled": False}, [], []),
        ({"enabled": True}, ["Exporter"], []),
        ({"enabled": True, "ranks": "all"}, ["Exporter"], ["Exporter"]),
        ({"enabled": False, "ranks": "all", "loggers": [{"name": "tensorboard"}]}, ["TensorBoard"], []),
    ],
)
def test_who_watches_follows_the_settings(
    tmp_path: Path, metrics: dict[str, object], first: list[str], others: list[str]
) -> None:
    directory = RunDirectory(tmp_path)
    directory.create()
    settings = small_config(metrics=metrics).metrics

    def names(comm: SimulatedRanks) -> list[str]:
        session = Session(directory, comm, build_observers(settings, directory, comm.rank))
        observers = [type(observer).__name__ for observer in session.observers]
        session.finish()
        return observers

    opened = results(2, names)
    assert opened[0][0] == "EventCounts"
    assert opened[0][2:] == ["RanksFile", *first]
    assert opened[1] == others


def test_a_token_that_cannot_be_read_is_said_before_training_starts(tmp_path: Path) -> None:
    metrics = {"enabled": True, "port": 0, "token_file": str(tmp_path / "missing")}
    with raises(UsageError, "secret-unreadable"):
        train(small_config(metrics=metrics), tmp_path / "run")
    assert not (tmp_path / "run").exists()


@pytest.mark.parametrize("error", [DivergedError("not finite"), ValueError("of this rank alone")])
def test_group_that_cannot_be_left_does_not_hide_the_error_of_the_run(error: Exception) -> None:
    comm = Mock(close=Mock(side_effect=RuntimeError("NCCL error")))
    with pytest.raises(RuntimeError, match="NCCL error"):
        _leave(comm, None, None, None)
    _leave(comm, type(error), error, None)
