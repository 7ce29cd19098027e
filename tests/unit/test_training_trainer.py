"""The loop: the same bits on any number of ranks and over any interruption; what it records and saves."""

from __future__ import annotations

import math
import random
import threading
from collections.abc import Callable, Sequence
from contextlib import nullcontext
from pathlib import Path
from typing import Any

import numpy
import pytest
import torch
from torch import Tensor, nn

from dist_train.checkpoint import writer
from dist_train.checkpoint.files import list_checkpoints, newest_whole, read_checkpoint, write_checkpoint
from dist_train.checkpoint.writer import CheckpointWriter, Saving
from dist_train.cluster import communicator
from dist_train.cluster.communicator import Communicator, Generation, GroupBrokenError, SingleProcess
from dist_train.config import Config
from dist_train.launching import assembly
from dist_train.models import build_model
from dist_train.optim.noise import SmoothOut
from dist_train.outcome import DivergedError, FaultError, StoppedError, UsageError
from dist_train.rundir.records import EvaluationRecord, EventRecord, Measurement, Observer, Record, TrainRecord
from dist_train.rundir.status import StatusFile, read_status
from dist_train.training import trainer as training_loop
from dist_train.training.consistency import verify_agreement
from dist_train.training.evaluation import evaluate, recompute_statistics, statistics_samples
from dist_train.training.recovery import ElasticTrainer
from dist_train.training.step import GlobalBatch, TrainingStep, Update
from dist_train.training.stopping import StopRequests
from dist_train.training.trainer import LastUpdate, Trainer
from tests.raising import raises
from tests.unit.simulated_ranks import SimulatedRanks, on_ranks, results
from tests.unit.small_trainers import build_trainer, small_config, state_bits
from tests.waiting import PATIENCE


class Notebook(Observer):
    """An observer that keeps every record, and the steps of the measurements."""

    def __init__(self) -> None:
        self.records: list[Record] = []
        self.measured_steps: list[int] = []

    def record(self, record: Record) -> None:
        self.records.append(record)

    def measurement(self, measurement: Measurement) -> None:
        self.measured_steps.append(measurement.step)

    @property
    def training(self) -> list[TrainRecord]:
        return [record for record in self.records if isinstance(record, TrainRecord)]

    @property
    def events(self) -> list[EventRecord]:
        return [record for record in self.records if isinstance(record, EventRecord)]

    def measured(self) -> list[tuple[object, ...]]:
        """What was measured, clocks left out."""
        measured: list[tuple[object, ...]] = []
        for record in self.records:
            match record:
                case TrainRecord():
                    measured.append((record.step, record.loss, record.accuracy, record.gradient_norm))
                case EvaluationRecord():
                    measured.append((record.step, record.split, record.loss, record.accuracy, record.samples))
                case EventRecord():
                    pass
        return measured


def run(
    folder: Path, comm: SimulatedRanks | SingleProcess, /, *, going_on: bool = False, **sections: Any
) -> tuple[dict[str, bytes], Notebook, Trainer]:
    notebook = Notebook()
    contents = None
    if going_on and comm.rank == 0:
        contents = newest_whole(folder / "checkpoints", {})
        assert contents is not None
    trainer = build_trainer(
        small_config(**sections),
        folder,
        comm,
        observers=[notebook] if comm.rank == 0 else [],
        contents=contents,
    )
    trainer.run()
    return state_bits(trainer.network), notebook, trainer


@pytest.fixture(scope="module")
def alone(tmp_path_factory: pytest.TempPathFactory) -> tuple[dict[str, bytes], list[tuple[object, ...]]]:
    [(state, notebook, _)] = results(1, lambda comm: run(tmp_path_factory.mktemp("alone"), comm))
    return state, notebook.measured()


@pytest.mark.parametrize("ranks", [2, 3, 5, 7])
def test_promise_3_the_number_of_ranks_does_not_change_a_bit(
    tmp_path: Path, alone: tuple[dict[str, bytes], list[tuple[object, ...]]], ranks: int
) -> None:
    ended = results(ranks, lambda each: run(tmp_path, each))
    assert ended[0][1].measured() == alone[1]
    assert all(state == alone[0] for state, _, _ in ended)


@pytest.mark.parametrize("norm", ["none", "batch"])
def test_promise_3_also_with_other_norms_and_running_statistics(tmp_path: Path, norm: str) -> None:
    model = {"norm": norm, **({"norm_statistics": "running"} if norm == "batch" else {})}
    [(expected, _, _)] = results(1, lambda each: run(tmp_path / "1", each, model=model))
    for state, _, _ in results(3, lambda each: run(tmp_path / "3", each, model=model)):
        assert state == expected


@pytest.mark.parametrize("stops", [[1, 4], [2], [3], [5]])
def test_promise_5_a_run_that_is_broken_off_and_gone_on_with_ends_with_the_same_bits(
    tmp_path: Path, alone: tuple[dict[str, bytes], list[tuple[object, ...]]], stops: list[int]
) -> None:
    group = [4, 1, 3]
    for index, until in enumerate([*stops, 6]):
        ended = results(
            group[index],
            lambda each, until=until, index=index: run(  # type: ignore[misc]
                tmp_path, each, going_on=index > 0, run={"max_steps": until}
            ),
        )
    assert all(state == alone[0] for state, _, _ in ended)
    expected = [entry for entry in alone[1] if isinstance(entry[0], int) and entry[0] > stops[-1]]
    assert ended[0][1].measured() == expected


def test_every_step_is_recorded_once_with_the_rate_and_the_noise_that_it_was_made_with(tmp_path: Path) -> None:
    _, notebook, trainer = run(
        tmp_path,
        SingleProcess(),
        schedule={"scaling": "linear", "base_batch": 13, "warmup_epochs": 1},
        noise={"schedule": {"kind": "cosine"}},
    )
    assert [record.step for record in notebook.training] == [1, 2, 3, 4, 5, 6]
    rates = [record.learning_rate for record in notebook.training]
    assert rates == pytest.approx([0.05, 0.05 + 0.05 / 3, 0.05 + 0.1 / 3, 0.1, 0.1, 0.1])
    amplitudes = [record.noise_amplitude for record in notebook.training]
    assert amplitudes[0] == 0.02
    assert amplitudes[3] == pytest.approx(0.01)
    assert all(record.samples_per_second > 0 for record in notebook.training)
    assert [record.epoch for record in notebook.training] == pytest.approx([s / 3 for s in range(1, 7)])
    assert trainer.total_steps == trainer.last_step == 6


def test_the_pace_of_records_evaluations_and_checkpoints_follows_the_settings(tmp_path: Path) -> None:
    _, notebook, _ = run(
        tmp_path,
        SingleProcess(),
        run={"epochs": 4},
        metrics={"every_steps": 5, "enabled": False},
        evaluation={"every_epochs": 2},
        checkpoint={"every_epochs": 0, "every_steps": 5, "keep": 10},
    )
    assert [record.step for record in notebook.training] == [5, 10, 12]
    evaluations = [record for record in notebook.records if isinstance(record, EvaluationRecord)]
    assert [(record.step, record.split, record.samples) for record in evaluations] == [
        (6, "train", 20),
        (6, "test", 25),
        (12, "train", 20),
        (12, "test", 25),
    ]
    assert [file.step for file in list_checkpoints(tmp_path / "checkpoints")] == [5, 10, 12]
    assert [event.step for event in notebook.events if event.event == "checkpoint"] == [5, 10, 12]


def test_the_status_moves_during_an_evaluation(tmp_path: Path) -> None:
    seen: list[tuple[str, int | None]] = []

    class Looking(Notebook):
        def record(self, record: Record) -> None:
            if isinstance(record, EvaluationRecord):
                status = read_status(trainer.directory.status)
                seen.append((record.split, status.step if status else None))
            super().record(record)

    looking = Looking()
    trainer = build_trainer(small_config(run={"max_steps": 1}), tmp_path, SingleProcess(), observers=[looking])
    trainer.status = StatusFile(trainer.directory.status, 1, check=lambda: None)
    trainer.run()
    assert seen == [("train", 1), ("test", 1)]


def test_schedules_stay_laid_out_over_the_epochs_when_a_run_stops_earlier(tmp_path: Path) -> None:
    schedule = {"decay": "cosine"}
    _, whole, _ = run(tmp_path / "whole", SingleProcess(), schedule=schedule)
    _, part, trainer = run(tmp_path / "part", SingleProcess(), schedule=schedule, run={"max_steps": 4})
    assert (trainer.total_steps, trainer.last_step) == (6, 4)
    rates = [record.learning_rate for record in whole.training]
    assert [record.learning_rate for record in part.training] == rates[:4]


def test_a_checkpoint_holds_the_clean_weights_the_progress_and_the_settings(tmp_path: Path) -> None:
    state, _, trainer = run(tmp_path, SingleProcess(), noise={"amplitude": 10.0})
    contents = read_checkpoint(list_checkpoints(tmp_path / "checkpoints")[-1].path)
    assert (contents.step, contents.epoch) == (6, 2.0)
    assert {name: tensor.numpy().tobytes() for name, tensor in contents.model.items()} == state
    clean = trainer.training_step.weights
    assert all(torch.equal(contents.model[name], value) for name, value in clean.named(clean.values).items())
    assert contents.config == trainer.config.model_dump(mode="json")
    assert contents.metrics == trainer.progress.metrics()
    assert contents.metrics["best_accuracy"] is not None


class AskedInStepTwo(StopRequests):
    def __init__(self) -> None:
        super().__init__()
        self._asked = 0

    def requested(self) -> bool:
        self._asked += 1
        return self._asked == 2


def test_promise_7_a_request_to_stop_on_one_rank_saves_once_and_stops_all(tmp_path: Path) -> None:
    notebooks: list[Notebook] = []

    def stopped(comm: SimulatedRanks) -> None:
        notebook = Notebook()
        notebooks.append(notebook)
        trainer = build_trainer(small_config(), tmp_path, comm, observers=[notebook] if comm.rank == 0 else [])
        if comm.rank == 1:
            trainer.stop = AskedInStepTwo()
        trainer.run()

    ended = on_ranks(3, stopped)
    assert all(isinstance(error, StoppedError) for error in ended), ended
    assert not str(ended[0]).startswith("stopped"), "tables and reports show it after the state"
    assert [file.step for file in list_checkpoints(tmp_path / "checkpoints")] == [2]
    [events] = [notebook.events for notebook in notebooks if notebook.events]
    assert [(event.event, event.step) for event in events] == [("signal", 2), ("checkpoint", 2)]


def test_a_request_to_stop_at_the_last_step_lets_the_run_finish(tmp_path: Path) -> None:
    trainer = build_trainer(small_config(run={"max_steps": 1}), tmp_path, SingleProcess())
    trainer.stop.request("SIGTERM")
    trainer.run()
    assert [file.step for file in list_checkpoints(tmp_path / "checkpoints")] == [1]


def test_promise_6_a_checkpoint_that_cannot_be_written_is_told_and_the_run_goes_on(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    write = write_checkpoint

    def fail_at_3(directory: Path, contents: Any, before: Any) -> Any:
        if contents.step == 3:
            raise OSError(28, "No space left on device")
        return write(directory, contents, before)

    monkeypatch.setattr(writer, "write_checkpoint", fail_at_3)
    _, notebook, trainer = run(tmp_path, SingleProcess())
    assert trainer.progress.step == 6
    [failed] = [event for event in notebook.events if event.event == "checkpoint_failed"]
    assert (failed.step, failed.details["error"]) == (3, "No space left on device")
    assert [file.step for file in list_checkpoints(tmp_path / "checkpoints")] == [6]


class LeftAlone(SingleProcess):
    """The rank of an elastic launch that is left when another one is lost."""

    is_elastic = True

    def __init__(self, losses_while_meeting: tuple[str, ...] = ()) -> None:
        self.losses_while_meeting = list(losses_while_meeting)

    def rendezvous(self, why: str, on_begin: Callable[[Generation], None] = lambda generation: None) -> Generation:
        self.generation += 1
        new = Generation(self.generation, 0, 1, ("", 0), ("node",), (why,), why, ())
        on_begin(new)
        if self.losses_while_meeting:
            raise GroupBrokenError(self.losses_while_meeting.pop())
        return new


@pytest.fixture
def lost_while_saving(monkeypatch: pytest.MonkeyPatch) -> None:
    """A rank is lost when the others wait for the last checkpoint."""
    losses, await_on_all = ["rank 1 died"], communicator.await_on_all_ranks

    def lose_one(comm: Communicator, attempt: Callable[[], bool], name: str) -> None:
        await_on_all(comm, attempt, name)
        if losses:
            raise GroupBrokenError(losses.pop())

    monkeypatch.setattr(writer, "await_on_all_ranks", lose_one)


@pytest.mark.usefixtures("lost_while_saving")
def test_promise_6_a_rank_lost_meanwhile_does_not_hide_that_the_last_checkpoint_failed(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def fail(*_: object) -> None:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(writer, "write_checkpoint", fail)
    with raises(FaultError, "checkpoint-not-written"):
        run(tmp_path, LeftAlone(), run={"max_steps": 1})


@pytest.mark.usefixtures("lost_while_saving")
@pytest.mark.parametrize("reason", ["", "SIGTERM"])
def test_a_rank_lost_after_the_last_update_is_recorded(tmp_path: Path, reason: str) -> None:
    notebook = Notebook()
    subject = build_trainer(small_config(), tmp_path, LeftAlone(), observers=[notebook])
    if reason:
        subject.stop.request(reason)
    with pytest.raises(StoppedError) if reason else nullcontext():
        subject.run()
    lost = [event for event in notebook.events if event.event == "rank_lost"]
    assert [(event.step, event.details["who"]) for event in lost] == [(1 if reason else 6, "rank 1 died")]


@pytest.mark.usefixtures("lost_while_saving")
def test_a_rank_lost_while_the_others_meet_is_recorded(tmp_path: Path) -> None:
    notebook = Notebook()
    build_trainer(small_config(), tmp_path, LeftAlone(("rank 2 died",)), observers=[notebook]).run()
    (lost,) = [event for event in notebook.events if event.event == "rank_lost"]
    assert (lost.details["who"], lost.details["generation"]) == ("rank 1 died; rank 2 died", 3)


class Awaited(LeftAlone):
    """A rank that others always wait to join."""

    @property
    def wants_rendezvous(self) -> bool:
        return True


def test_ranks_that_wait_to_join_are_met_between_updates_alone(tmp_path: Path) -> None:
    comm = Awaited()
    run(tmp_path, comm, run={"max_steps": 3})
    assert comm.generation == 3, "after the last update there is nothing to join for"


def test_a_model_that_does_not_fit_the_memory_is_refused(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def build(config: Config) -> nn.Module:
        raise RuntimeError("[enforce fail at alloc_cpu.cpp:124] DefaultCPUAllocator: can't allocate memory: you tried")

    monkeypatch.setattr(assembly, "build_model", build)
    with raises(UsageError, "out-of-memory"):
        build_trainer(small_config(), tmp_path, SingleProcess())


@pytest.mark.parametrize("max_steps", [None, 4])
def test_a_trainer_at_its_end_or_beyond_does_nothing(tmp_path: Path, max_steps: int | None) -> None:
    first, _, _ = run(tmp_path, SingleProcess())
    again, notebook, trainer = run(tmp_path, SingleProcess(), going_on=True, run={"max_steps": max_steps})
    assert again == first
    assert notebook.measured() == []
    fields = trainer.status_fields()
    assert (fields["step"], fields["total_steps"], fields["total_epochs"]) == (6, 6, 2.0)


@pytest.mark.parametrize("statistics", ["auto", "running"])
def test_promise_4_what_is_evaluated_and_saved_has_statistics_of_the_clean_weights(
    tmp_path: Path, statistics: str
) -> None:
    _, _, trainer = run(
        tmp_path, SingleProcess(), model={"norm_statistics": statistics}, checkpoint={"every_steps": 2, "keep": 9}
    )
    for file in list_checkpoints(tmp_path / "checkpoints"):
        saved = read_checkpoint(file.path).model
        model = build_model(trainer.config)
        model.load_state_dict(saved)
        recompute_statistics(
            model,
            trainer.splits.train,
            statistics_samples(100, 30, 6, 0),
            micro_size=6,
            compute=trainer.training_step.compute,
            comm=SingleProcess(),
        )
        recomputed = model.state_dict()
        same = [torch.equal(saved[name], recomputed[name]) for name in saved if "running" in name]
        assert all(same) if statistics == "auto" else not any(same), file.step


def test_a_run_that_computes_norm_statistics_shows_that_it_is_alive(tmp_path: Path) -> None:
    class Alive(Observer):
        seen = 0

        def progress(self, step: int) -> None:
            self.seen += 1

    seen = {}
    for samples in (30, 90):
        alive, folder = Alive(), tmp_path / str(samples)
        trainer = build_trainer(
            small_config(model={"norm_samples": samples}), folder, SingleProcess(), observers=[alive]
        )
        trainer.run()
        trainer.close()
        seen[samples] = alive.seen
    assert seen[90] - seen[30] == 2 * 60 // 6, "once for each of its micro-batches, in both epochs"


@pytest.mark.parametrize("method", ["smoothout", "langevin", "sam"])
def test_promise_6_a_slow_copy_still_holds_the_weights_of_its_step(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, method: str
) -> None:
    monkeypatch.setattr(writer, "_YIELD_SECONDS", 0.2)
    noise = {"method": method, **({"sharing": "micro_batch"} if method == "sam" else {})}
    config = small_config(noise=noise, checkpoint={"every_steps": 1, "keep": 9})
    trainer = build_trainer(config, tmp_path, SingleProcess())
    after: dict[int, dict[str, torch.Tensor]] = {}
    for _ in range(3):
        trainer.advance()
        after[trainer.progress.step] = {name: value.clone() for name, value in trainer.network.state_dict().items()}
    trainer.close()
    files = list_checkpoints(tmp_path / "checkpoints")
    assert {file.step for file in files} == set(after)
    for file in files:
        saved = read_checkpoint(file.path).model
        assert all(torch.equal(saved[name], value) for name, value in after[file.step].items())


def test_promise_6_recovery_changes_nothing_before_the_checkpoint_is_copied(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    go, copy = threading.Event(), CheckpointWriter._copy

    def copy_later(self: CheckpointWriter, name: str, value: Any) -> Any:
        assert go.wait(PATIENCE)
        return copy(self, name, value)

    class LosesAnother(LeftAlone):
        def rendezvous(self, why: str, on_begin: Callable[[Generation], None] = lambda generation: None) -> Generation:
            threading.Timer(0.3, go.set).start()
            return super().rendezvous(why, on_begin)

    report, losses, copied = Saving.report, ["rank 1 died"], []

    def lose_one(self: Saving) -> None:
        if losses:
            raise GroupBrokenError(losses.pop())
        report(self)

    monkeypatch.setattr(CheckpointWriter, "_copy", copy_later)
    monkeypatch.setattr(Saving, "report", lose_one)
    trainer = build_trainer(small_config(run={"max_steps": 1}), tmp_path, LosesAnother())
    assert isinstance(trainer, ElasticTrainer)
    trainer.regroup = lambda trainer, generation: copied.append(go.is_set())
    trainer.run()
    assert copied == [True]


@pytest.mark.parametrize("within", ["the comparison", "the next update"])
def test_promise_4_after_a_recovery_ranks_compare_anew_what_all_of_them_still_hold(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, within: str
) -> None:
    has_failed, late = threading.Event(), ["reset"]
    perturb, report = SmoothOut.perturb, Saving.report

    def fail_once(rank: int) -> None:
        if rank == 1 and not has_failed.is_set():
            has_failed.set()
            raise GroupBrokenError("reset")

    def compare(comm: Communicator, *rest: Any) -> None:
        verify_agreement(comm, *rest)
        fail_once(comm.rank)

    def begin(self: SmoothOut, step: int) -> None:
        perturb(self, step)
        if step == 1:
            fail_once(self.rank)

    def lag_behind(self: Saving) -> None:
        if self.comm.rank == 0 and late:
            assert has_failed.wait(PATIENCE)
            raise GroupBrokenError(late.pop())
        report(self)

    def rendezvous(self: SimulatedRanks, *_: object) -> Generation:
        return Generation(2, self.rank, self.size, ("", 0), ("a", "b"), (), "reset", ())

    if within == "the comparison":
        monkeypatch.setattr(training_loop, "verify_agreement", compare)
    else:
        monkeypatch.setattr(SmoothOut, "perturb", begin)
    monkeypatch.setattr(Saving, "report", lag_behind)
    monkeypatch.setattr(SimulatedRanks, "is_elastic", True)
    monkeypatch.setattr(SimulatedRanks, "rendezvous", rendezvous)
    ended = results(2, lambda comm: run(tmp_path, comm, comm={"verify_every": 1}, run={"max_steps": 2}))
    assert [trainer.progress.step for _, _, trainer in ended] == [2, 2]


def test_promise_5_ranks_that_meet_again_under_other_numbers_end_with_the_same_bits(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A first group breaks after an evaluation, the second in an update that has already chosen other grids."""
    sections: dict[str, Any] = {
        "noise": {"sharing": "rank"},
        "averaging": {"kind": "ema", "decay": 0.5},
        "comm": {"reduction": "exact32", "verify_every": 1},
        "early_stopping": {"patience": 9, "metric": "test.accuracy", "min_delta": 1.0},
        "metrics": {"enabled": True},
    }
    whole = results(2, lambda comm: run(tmp_path / "whole", comm, **sections))
    update, complete, broken = TrainingStep.__call__, Trainer._complete_step, set[int]()

    def break_once(subject: object) -> None:
        if id(subject) not in broken:
            broken.add(id(subject))
            raise GroupBrokenError("reset")

    def break_after_the_evaluation(self: Trainer, last: LastUpdate) -> None:
        complete(self, last)
        if self.progress.step == 3:
            break_once(self)

    def break_in_the_update(self: TrainingStep, batch: GlobalBatch, *rest: Any) -> Update:
        if batch.step == 3 and id(self.weights) not in broken:
            grids = self.reduction.accumulator
            grids.choose_grids([1 << 40] * len(grids.largest), 1)
            break_once(self.weights)
        return update(self, batch, *rest)

    def rendezvous(self: SimulatedRanks, *_: object) -> Generation:
        self.rank = 1 - self.rank
        return Generation(2, self.rank, self.size, ("", 0), ("a", "b"), (), "reset", ())

    monkeypatch.setattr(Trainer, "_complete_step", break_after_the_evaluation)
    monkeypatch.setattr(TrainingStep, "__call__", break_in_the_update)
    monkeypatch.setattr(SimulatedRanks, "is_elastic", True)
    monkeypatch.setattr(SimulatedRanks, "rendezvous", rendezvous)
    again = results(2, lambda comm: run(tmp_path / "again", comm, **sections))
    assert len(broken) == 4
    assert again[0][1].measured_steps == [1, 2, 4, 5, 6], "what a broken group has not measured to the end is dropped"
    for (state, _, trainer), (expected, _, undisturbed) in zip(again, whole, strict=True):
        assert state == expected
        assert torch.equal(trainer.state.averaging.kept, undisturbed.state.averaging.kept)
        assert trainer.progress == undisturbed.progress


@pytest.mark.parametrize("done", [1, 2], ids=["those of the weights", "those of their average"])
def test_promise_4_after_a_recovery_all_ranks_compute_statistics_anew_or_none(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, done: int
) -> None:
    """Rank 0 has noted that they are computed when the group breaks, rank 1 has not."""
    recompute, evaluate, calls, broken = recompute_statistics, Trainer._evaluate_splits, [0, 0], set[int]()

    def break_on_rank(rank: int, comm: Communicator) -> None:
        if comm.rank == rank and calls[rank] == done and rank not in broken:
            broken.add(rank)
            raise GroupBrokenError("reset")

    def recompute_first(*arguments: Any, comm: Communicator, **named: Any) -> None:
        recompute(*arguments, comm=comm, **named)
        calls[comm.rank] += 1
        break_on_rank(1, comm)

    def evaluate_later(self: Trainer, suffix: str) -> Any:
        break_on_rank(0, self.comm)
        return evaluate(self, suffix)

    def rendezvous(self: SimulatedRanks, *_: object) -> Generation:
        return Generation(2, self.rank, self.size, ("", 0), ("a", "b"), (), "reset", ())

    monkeypatch.setattr(training_loop, "recompute_statistics", recompute_first)
    monkeypatch.setattr(Trainer, "_evaluate_splits", evaluate_later)
    monkeypatch.setattr(SimulatedRanks, "is_elastic", True)
    monkeypatch.setattr(SimulatedRanks, "rendezvous", rendezvous)
    ended = results(2, lambda comm: run(tmp_path, comm, averaging={"kind": "ema"}, run={"max_steps": 1}))
    assert [trainer.progress.step for _, _, trainer in ended] == [1, 1]
    assert (broken, calls) == ({0, 1}, [done + 2] * 2)


def test_ranks_that_have_met_share_the_statistics_of_sync_norm(tmp_path: Path) -> None:
    config = small_config(model={"norm": "sync"})

    def begin_together(comm: SimulatedRanks) -> dict[str, bytes]:
        trainer = build_trainer(config, tmp_path / "together", comm)
        trainer.advance()
        return state_bits(trainer.network)

    def begin_alone(comm: SimulatedRanks) -> dict[str, bytes]:
        met, [alone] = dict(vars(comm)), results(1, lambda each: each)
        vars(comm).update(vars(alone))
        trainer = build_trainer(config, tmp_path / f"{met['rank']}", comm)
        vars(comm).update(met)
        trainer.training_step.noise.rank = comm.rank
        trainer._divide_work(6)
        trainer.advance()
        return state_bits(trainer.network)

    assert results(2, begin_alone) == results(2, begin_together)


def test_who_may_take_over_keeps_the_records_before_the_last_checkpoints(tmp_path: Path) -> None:
    """Whether they are on disk, rank 0 alone knows."""
    trainer = build_trainer(small_config(checkpoint={"every_steps": 1}), tmp_path, LeftAlone())
    assert isinstance(trainer, ElasticTrainer)
    trainer.run()
    assert [record.step for record in trainer.recent.all() if isinstance(record, TrainRecord)] == [1, 2, 3, 4, 5, 6]


def with_torchs_norm(images: Any, width: float, norm: object) -> nn.Module:
    convolution = nn.Conv2d(images.shape[0], 4, 3)
    return nn.Sequential(
        convolution, nn.BatchNorm2d(4), nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(4, images.classes)
    )


def test_a_model_without_norms_of_ours_makes_no_passes_for_their_statistics(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(training_loop, "recompute_statistics", lambda *_, **__: pytest.fail("passes were made"))
    model = {"name": f"{__name__}:with_torchs_norm", "width": 1.0, "norm_statistics": "recomputed"}
    run(tmp_path, SingleProcess(), model=model, run={"max_steps": 2}, averaging={"kind": "ema"})


def test_promises_4_and_5_ranks_share_the_buffers_that_a_model_s_own_layers_change(tmp_path: Path) -> None:
    """Evaluations on all ranks are of the model that the checkpoint holds, also in a run that resumes."""
    sections: dict[str, Any] = {
        "model": {"name": f"{__name__}:with_torchs_norm", "width": 1.0, "norm_statistics": "running"},
        "evaluation": {"every_epochs": 1, "batch_size": 9, "train_samples": 0},
    }
    whole = results(3, lambda comm: run(tmp_path / "whole", comm, **sections))
    assert [state for state, _, _ in whole] == [whole[0][0]] * 3
    _, notebook, trainer = whole[0]
    test, compute = trainer.splits.test, trainer.training_step.compute
    alone = evaluate(trainer.network, test, len(test), batch_size=9, compute=compute, comm=SingleProcess())
    assert notebook.measured()[-1] == (6, "test", alone.loss, alone.accuracy, alone.samples)

    results(3, lambda comm: run(tmp_path / "parts", comm, **sections, run={"max_steps": 2}))
    resumed = results(3, lambda comm: run(tmp_path / "parts", comm, going_on=True, **sections))
    assert [state for state, _, _ in resumed] == [whole[0][0]] * 3


class CountingPasses(nn.Module):
    """Counts in a frozen parameter, as a teacher whose weights follow those that are trained."""

    def __init__(self) -> None:
        super().__init__()
        self.passes = nn.Parameter(torch.zeros(1), requires_grad=False)

    def forward(self, values: Tensor) -> Tensor:
        if self.training:
            self.passes.add_(1.0)
        return values


def with_counts(images: Any, width: float, norm: object) -> nn.Module:
    return nn.Sequential(*with_torchs_norm(images, width, norm).children(), CountingPasses())


@pytest.mark.parametrize(("micro_size", "passes_in_update"), [(6, 5), ("auto", 2)])
def test_promise_6_a_slow_copy_holds_what_forward_passes_change_as_it_was_at_its_step(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, micro_size: int | str, passes_in_update: int
) -> None:
    """Passes that try the model, or what fits the memory, count for nothing."""
    monkeypatch.setattr(writer, "_YIELD_SECONDS", 0.2)
    model = {"name": f"{__name__}:with_counts", "norm_statistics": "running"}
    sections: dict[str, Any] = {"model": model, "batch": {"micro_size": micro_size}}
    _, _, trainer = run(tmp_path, SingleProcess(), **sections, checkpoint={"every_steps": 1, "keep": 9})
    trainer.close()
    files = list_checkpoints(tmp_path / "checkpoints")
    models = {file.step: read_checkpoint(file.path).model for file in files}
    for name in ("1.num_batches_tracked", "5.passes"):
        passes = {step: int(model[name]) for step, model in models.items()}
        assert passes == {step: passes_in_update * step for step in range(1, 7)}, name


class Slowing(torch.optim.SGD):
    """SGD whose rate falls with a count of updates, a number in its first group."""

    def step(self) -> None:  # type: ignore[override]  # no closure
        group = self.param_groups[0]
        group["k"] = group.get("k", 0) + 1
        group["lr"] /= group["k"]
        super().step()


def slowing(settings: Any, groups: Sequence[Any]) -> torch.optim.Optimizer:
    return Slowing([parameter for group in groups for parameter in group.parameters], lr=settings.learning_rate)


class Mixed(torch.optim.SGD):
    """SGD with a momentum in another type than the weights', a mask, a text and a list of tensors as its state."""

    def __init__(self, parameters: list[nn.Parameter], rate: float) -> None:
        super().__init__(parameters, lr=rate)
        for parameter in parameters:
            double = torch.zeros_like(parameter, dtype=torch.float64)
            mask = torch.arange(parameter.numel()).view(parameter.shape) % 3 > 0
            rows = [torch.zeros(len(parameter), dtype=torch.float64)]
            self.state[parameter] = {"mean": double, "mask": mask, "kind": "mean", "rows": rows}

    @torch.no_grad()
    def step(self) -> None:  # type: ignore[override]  # no closure
        for group in self.param_groups:
            for parameter in group["params"]:
                assert parameter.grad is not None
                state, gradient = self.state[parameter], parameter.grad.double()
                state[state["kind"]].lerp_(gradient, 0.1)
                state["rows"][0].add_(gradient.flatten(1).sum(1) if gradient.dim() > 1 else gradient)
                moved = state["mean"] + 1e-3 * state["rows"][0].view(-1, *[1] * (gradient.dim() - 1))
                parameter.sub_((group["lr"] * moved).to(parameter.dtype) * state["mask"])


def mixed(settings: Any, groups: Sequence[Any]) -> torch.optim.Optimizer:
    return Mixed([parameter for group in groups for parameter in group.parameters], settings.learning_rate)


def with_a_tensor_as_rate(settings: Any, groups: Sequence[Any]) -> torch.optim.Optimizer:
    rate = torch.tensor(settings.learning_rate)
    return torch.optim.SGD([parameter for group in groups for parameter in group.parameters], lr=rate)


@pytest.mark.parametrize("name", ["slowing", "mixed", "with_a_tensor_as_rate"])
def test_promise_5_more_ranks_go_on_with_the_state_of_a_plugin_s_optimizer(tmp_path: Path, name: str) -> None:
    optimizer = {"name": f"{__name__}:{name}"}
    expected, _, _ = run(tmp_path / "whole", SingleProcess(), optimizer=optimizer)
    run(tmp_path / "run", SingleProcess(), optimizer=optimizer, run={"max_steps": 3})
    resumed = results(2, lambda each: run(tmp_path / "run", each, going_on=True, optimizer=optimizer))
    assert [state for state, _, _ in resumed] == [expected] * 2


class Drawing(torch.optim.SGD):
    """SGD with noise from each of the global generators."""

    @torch.no_grad()
    def step(self) -> None:  # type: ignore[override]  # no closure
        super().step()
        for parameter in self.param_groups[0]["params"]:
            parameter.add_(torch.randn_like(parameter), alpha=1e-3 * random.random() * numpy.random.rand())


def drawing(settings: Any, groups: Sequence[Any]) -> torch.optim.Optimizer:
    return Drawing([parameter for group in groups for parameter in group.parameters], lr=settings.learning_rate)


def test_promise_5_what_a_plugin_s_optimizer_draws_depends_on_seed_and_step_alone(tmp_path: Path) -> None:
    optimizer = {"name": f"{__name__}:drawing"}
    torch.manual_seed(1)
    expected, _, _ = run(tmp_path / "whole", SingleProcess(), optimizer=optimizer)
    torch.manual_seed(2)
    before = torch.get_rng_state()
    run(tmp_path / "run", SingleProcess(), optimizer=optimizer, run={"max_steps": 3})
    resumed, _, _ = run(tmp_path / "run", SingleProcess(), going_on=True, optimizer=optimizer)
    assert resumed == expected
    assert torch.equal(torch.get_rng_state(), before)


class Unused(nn.Module):
    """Has a weight that no loss depends on."""

    def __init__(self) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.zeros(1))

    def forward(self, values: Tensor) -> Tensor:
        return values


def with_an_unused_weight(images: Any, width: float, norm: object) -> nn.Module:
    return nn.Sequential(*with_torchs_norm(images, width, norm).children(), Unused())


class Overflowing(torch.optim.SGD):
    """SGD whose third update leaves the last weight infinite, and whose next one 0 again."""

    updates = 0

    @torch.no_grad()
    def step(self) -> None:  # type: ignore[override]  # no closure
        super().step()
        self.updates += 1
        self.param_groups[-1]["params"][-1].fill_(math.inf if self.updates == 3 else 0.0)


def overflowing(settings: Any, groups: Sequence[Any]) -> torch.optim.Optimizer:
    parameters = [parameter for group in groups for parameter in group.parameters]
    return Overflowing(sorted(parameters, key=lambda each: -each.numel()), lr=settings.learning_rate)


@pytest.mark.parametrize("last_step", [3, 6])
def test_weights_that_are_not_finite_are_told_even_if_no_loss_shows_it(tmp_path: Path, last_step: int) -> None:
    sections: dict[str, Any] = {
        "model": {"name": f"{__name__}:with_an_unused_weight", "norm_statistics": "running"},
        "optimizer": {"name": f"{__name__}:overflowing"},
        "noise": {"method": "none"},
        "run": {"max_steps": last_step},
    }
    notebook = Notebook()
    subject = build_trainer(small_config(**sections), tmp_path, SingleProcess(), observers=[notebook])
    with raises(DivergedError, "evaluation-not-finite") if last_step == 3 else nullcontext():
        subject.run()
    told = [event for event in notebook.events if event.event == "non_finite_evaluation"]
    assert [(event.step, event.details["what"]) for event in told] == [(3, "weights")]


@pytest.mark.parametrize("kind", [numpy.float32, torch.tensor])
def test_an_amplitude_may_be_a_number_of_numpy_or_torch(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, kind: Callable[[float], Any]
) -> None:
    monkeypatch.setattr(SmoothOut, "amplitude", lambda noise, step: kind(0.5))
    _, notebook, _ = run(tmp_path, SingleProcess(), run={"max_steps": 1})
    assert [type(record.noise_amplitude) for record in notebook.training] == [float]


def flip_a_bit(monkeypatch: pytest.MonkeyPatch, rank: int, step: int) -> None:
    """Let a bit of the weights of `rank` change after update `step`."""
    make = TrainingStep.__call__

    def flipping(self: TrainingStep, batch: GlobalBatch, *rest: Any) -> Update:
        update = make(self, batch, *rest)
        if self.noise.rank == rank and batch.step + 1 == step:
            self.weights.values.view(torch.int32)[7] ^= 1
        return update

    monkeypatch.setattr(TrainingStep, "__call__", flipping)


@pytest.mark.parametrize("verify_every", [100, 0])
@pytest.mark.parametrize("reason", ["", "SIGTERM"])
def test_promise_4_ranks_that_disagree_save_no_checkpoint(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, reason: str, verify_every: int
) -> None:
    flip_a_bit(monkeypatch, 1, 2)
    checkpoint = {"every_epochs": 0, "every_steps": None if reason else 1, "keep": 9}

    def job(comm: SimulatedRanks) -> None:
        config = small_config(comm={"verify_every": verify_every}, checkpoint=checkpoint, run={"max_steps": 3})
        trainer = build_trainer(config, tmp_path, comm)
        try:
            trainer.advance()
            if reason:
                trainer.stop.request(reason)
            trainer.advance()
        finally:
            trainer.close()

    ended = on_ranks(2, job)
    if verify_every:
        assert [getattr(error, "code", None) for error in ended] == ["weights-differ"] * 2
        assert "after step 2 " in str(ended[0])
    before = [] if reason else [1]
    assert [file.step for file in list_checkpoints(tmp_path / "checkpoints")] == before + [2] * (not verify_every)


def test_ranks_compare_their_weights_once_a_step(tmp_path: Path) -> None:
    def job(comm: SimulatedRanks) -> int:
        run(tmp_path, comm, comm={"verify_every": 2}, checkpoint={"every_epochs": 0, "every_steps": 3})
        return comm.names.count("agreement")

    assert results(2, job) == [4] * 2  # after updates 2, 3, 4 and 6
