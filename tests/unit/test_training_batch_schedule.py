"""A global batch that changes along the way: samples, epochs, rates, bits, records, and what is refused."""

from __future__ import annotations

import math
import threading
from collections import Counter
from dataclasses import replace
from itertools import pairwise
from pathlib import Path
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch.nn import functional

from dist_train.checkpoint.files import list_checkpoints, read_checkpoint
from dist_train.checkpoint.writer import Saving
from dist_train.cluster.communicator import Generation, GroupBrokenError, SingleProcess
from dist_train.config import ConfigError
from dist_train.data.images import BatchRequest
from dist_train.data.plan import epoch_order
from dist_train.launching.session import run_facts
from dist_train.models import build_model
from dist_train.monitoring.prometheus.board import Board
from dist_train.optim.noise import SmoothOut
from dist_train.outcome import UsageError
from dist_train.rundir.epochs import Epochs
from dist_train.rundir.records import EvaluationRecord, EventRecord
from dist_train.training.recovery import ElasticTrainer
from dist_train.training.step import GlobalBatch, TrainingStep
from tests.raising import raises, raises_problems
from tests.unit.exporting import FACTS
from tests.unit.plain_step import samples_of
from tests.unit.simulated_ranks import SimulatedRanks, results
from tests.unit.small_trainers import build_trainer, small_config
from tests.unit.test_training_trainer import run
from tests.waiting import PATIENCE

SCHEDULE = [{"epoch": 1, "global_size": 30}, {"epoch": 3, "global_size": 50}]
SECTIONS: dict[str, Any] = {
    "run": {"epochs": 5},
    "batch": {"global_size": 12, "micro_size": 6, "schedule": SCHEDULE},
    "schedule": {"decay": "cosine", "warmup_epochs": 2, "scaling": "linear", "base_batch": 6},
    "averaging": {"kind": "lawa", "every_steps": 3, "last": 2},
}
"""Of 100 samples: 8 updates, then twice 3, then twice 2."""
SIZES = [12] * 8 + [30] * 6 + [50] * 4
ENDS = [8, 11, 14, 16, 18]


def sections(**changed: dict[str, Any]) -> dict[str, Any]:
    return {name: {**SECTIONS.get(name, {}), **changed.get(name, {})} for name in {*SECTIONS, *changed}}


def test_promise_6_rank_0_records_the_new_size_though_only_another_rank_made_the_update(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    has_failed, breaks = threading.Event(), ["reset"]

    def before_update(self: SmoothOut, step: int, learning_rate: float) -> None:
        if step == 8 and self.rank == 0 and not has_failed.is_set():
            has_failed.set()
            raise GroupBrokenError("reset")

    def after_update(self: SmoothOut, step: int) -> None:
        if step == 8 and self.rank == 1:
            assert has_failed.wait(PATIENCE)

    def report(self: Saving) -> None:
        if self.comm.rank == 1 and has_failed.is_set() and breaks:
            raise GroupBrokenError(breaks.pop())

    def rendezvous(self: SimulatedRanks, *_: object) -> Generation:
        return Generation(2, self.rank, self.size, ("", 0), ("a", "b"), (), "reset", ())

    def job(comm: SimulatedRanks) -> list[list[tuple[int, str]]]:
        _, notebook, trainer = run(tmp_path, comm, **sections(run={"max_steps": 10}))
        assert isinstance(trainer, ElasticTrainer)
        records = notebook.records, trainer.recent.all()
        return [[(each.step, each.event) for each in some if isinstance(each, EventRecord)] for some in records]

    monkeypatch.setattr(SmoothOut, "before_update", before_update)
    monkeypatch.setattr(SmoothOut, "after_update", after_update)
    monkeypatch.setattr(Saving, "report", report)
    monkeypatch.setattr(SimulatedRanks, "is_elastic", True)
    monkeypatch.setattr(SimulatedRanks, "rendezvous", rendezvous)
    (recorded, kept), (_, kept_elsewhere) = results(2, job)
    assert all((9, "batch_size") in events for events in (recorded, kept, kept_elsewhere))
    assert not breaks


def test_every_epoch_has_its_own_batches_and_no_sample_twice(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    seen: list[tuple[int, int, list[int]]] = []
    make = TrainingStep.__call__

    def noting(self: TrainingStep, batch: GlobalBatch, *rest: Any) -> Any:
        seen.append((batch.step, batch.epoch, batch.indices.tolist()))
        return make(self, batch, *rest)

    monkeypatch.setattr(TrainingStep, "__call__", noting)
    _, _, trainer = run(tmp_path, SingleProcess(), **SECTIONS)
    assert [step for step, _, _ in seen] == list(range(18))
    assert [len(indices) for _, _, indices in seen] == SIZES
    assert trainer.total_steps == trainer.last_step == 18
    for epoch, (start, end) in enumerate(pairwise([0, *ENDS])):
        assert {number for _, number, _ in seen[start:end]} == {epoch}
        samples = [sample for _, _, indices in seen[start:end] for sample in indices]
        assert max(Counter(samples).values()) == 1
        assert samples == epoch_order(100, 0, epoch)[: len(samples)].tolist()
        # what is left would not make another batch
        assert 100 - len(samples) < SIZES[start]


def test_rates_epochs_evaluations_and_checkpoints_are_those_of_the_passes(tmp_path: Path) -> None:
    _, notebook, trainer = run(tmp_path, SingleProcess(), **sections(checkpoint={"keep": 9}))
    done = [step / 8 for step in range(8)] + [1 + step / 3 for step in range(6)] + [3 + step / 2 for step in range(4)]
    assert [record.epoch for record in notebook.training] == pytest.approx([*done[1:], 5.0])
    base, peak = 0.05, 0.05 * 12 / 6
    wanted = [
        base + (peak - base) * epoch / 2 if epoch < 2 else peak * (1 + math.cos(math.pi * (epoch - 2) / 3)) / 2
        for epoch in done
    ]
    assert [record.learning_rate for record in notebook.training] == pytest.approx(wanted)
    pairs = zip(notebook.training, SIZES, strict=True)
    assert all(record.samples_per_second * record.step_seconds == pytest.approx(size) for record, size in pairs)
    evaluations = [record for record in notebook.records if isinstance(record, EvaluationRecord)]
    assert [(it.step, it.epoch) for it in evaluations if it.split == "test"] == list(
        zip(ENDS, range(1, 6), strict=True)
    )
    files = list_checkpoints(tmp_path / "checkpoints")
    assert [(file.step, read_checkpoint(file.path).epoch) for file in files] == list(
        zip(ENDS, range(1, 6), strict=True)
    )
    changes = [event for event in notebook.events if event.event == "batch_size"]
    assert [(event.step, dict(event.details)) for event in changes] == [
        (9, {"before": 12, "now": 30}),
        (15, {"before": 30, "now": 50}),
    ]
    assert trainer.plan.global_size == 50


def test_a_batch_of_a_single_update_is_recorded_as_the_others(tmp_path: Path) -> None:
    schedule = [{"epoch": 1, "global_size": 60}, {"epoch": 2, "global_size": 30}]
    _, notebook, _ = run(tmp_path, SingleProcess(), **sections(run={"max_steps": 10}, batch={"schedule": schedule}))
    changes = [event for event in notebook.events if event.event == "batch_size"]
    assert [(event.step, dict(event.details)) for event in changes] == [
        (9, {"before": 12, "now": 60}),
        (10, {"before": 60, "now": 30}),
    ]


@pytest.mark.parametrize(("reduction", "noise"), [("exact", "smoothout"), ("exact32", "sam")])
def test_promises_3_and_5_the_same_bits_on_any_number_of_ranks_and_over_any_interruption(
    tmp_path: Path, reduction: str, noise: str
) -> None:
    own = {"method": noise, "sharing": "micro_batch", "schedule": {"kind": "linear"}}
    changed = sections(comm={"reduction": reduction}, noise=own)
    [(expected, notebook, _)] = results(1, lambda each: run(tmp_path / "1", each, **changed))
    for ranks in (2, 3):
        for state, _, _ in results(ranks, lambda each, ranks=ranks: run(tmp_path / str(ranks), each, **changed)):  # type: ignore[misc]
            assert state == expected
    # within a stage, at its end, after its first update, within the next one
    for index, until in enumerate([5, 8, 9, 13, 14, 15, 18]):
        part = {**changed, "run": {**changed["run"], "max_steps": until}}

        def resume(each: SimulatedRanks, index: int = index, part: dict[str, Any] = part) -> Any:
            return run(tmp_path / "parts", each, going_on=index > 0, **part)

        ended = results((3, 1, 2)[index % 3], resume)
        steps = {record.step for record in ended[0][1].training}
        whole = [entry for entry in notebook.measured() if entry[0] in steps and len(entry) == 4]
        assert [entry for entry in ended[0][1].measured() if len(entry) == 4] == whole
    assert all(state == expected for state, _, _ in ended)


def test_updates_are_those_of_plain_pytorch(tmp_path: Path) -> None:
    config = small_config(
        model={"width": 0.0625, "norm": "group"},
        noise={"method": "none"},
        optimizer={"momentum": 0.0, "nesterov": False},
        batch={"global_size": 40, "micro_size": 16, "schedule": [{"epoch": 1, "global_size": 100}]},
    )
    trainer, plain, samples = build_trainer(config, tmp_path, SingleProcess()), build_model(config), samples_of(config)
    optimizer = torch.optim.SGD(plain.parameters(), 0.05)
    for epoch, start, size in [(0, 0, 40), (0, 40, 40), (1, 0, 100)]:
        inputs, labels = samples.read(BatchRequest(epoch_order(100, 0, epoch)[start : start + size], epoch))
        optimizer.zero_grad()
        functional.cross_entropy(plain(inputs), labels).backward()
        optimizer.step()
        trainer.advance()
        for parameter, wanted in zip(trainer.network.parameters(), plain.parameters(), strict=True):
            torch.testing.assert_close(parameter.detach(), wanted.detach(), rtol=0, atol=1e-5)
    trainer.close()


@pytest.mark.parametrize("micro_size", [4, 7])
def test_without_a_schedule_nothing_changes(tmp_path: Path, micro_size: int) -> None:
    batch: dict[str, Any] = {"global_size": 26, "micro_size": micro_size}
    _, one, _ = run(tmp_path / "one", SingleProcess(), batch=batch)
    # the same batch as before, from the second epoch on
    batch = {**batch, "schedule": [{"epoch": 1, "global_size": 26}]}
    _, other, _ = run(tmp_path / "other", SingleProcess(), batch=batch)
    assert one.measured() == other.measured()
    assert [it.learning_rate for it in one.training] == [it.learning_rate for it in other.training]


@settings(deadline=None, max_examples=100)
@given(
    samples=st.integers(20, 300),
    first=st.integers(1, 20),
    changes=st.lists(st.tuples(st.integers(1, 4), st.integers(1, 20)), max_size=3),
)
def test_epochs_are_those_that_counting_gives(samples: int, first: int, changes: list[tuple[int, int]]) -> None:
    sizes = [(0, first)]
    for later, size in changes:
        sizes.append((sizes[-1][0] + later, size))
    epochs = Epochs.of(sizes, lambda size: samples // size)
    step = used = 0
    for epoch in range(sizes[-1][0] + 2):
        size = [size for begins, size in sizes if begins <= epoch][-1]
        assert (epochs.steps(epoch), epochs.done(step)) == (step, epoch)
        for place in range(samples // size):
            assert epochs.place(step) == (epoch, place)
            assert epochs.stage(step).global_size == size
            assert epochs.done(step) == pytest.approx(epoch + place / (samples // size), rel=1e-14)
            assert epochs.samples(step) == used
            step, used = step + 1, used + size


def test_metrics_count_the_samples_and_epochs_and_the_batch_in_force(tmp_path: Path) -> None:
    trainer = build_trainer(small_config(**SECTIONS), tmp_path, SingleProcess())
    facts = run_facts(trainer, 0.0, "", "", ("here",))
    assert (facts.global_size, facts.micro_batches, facts.epochs, facts.total_steps) == (12, 2, 5.0, 18)
    assert [facts.passes.samples(step) for step in (8, 9, 18)] == [96, 126, 96 + 180 + 200]
    assert [facts.passes.done(step) for step in (4, 8, 16)] == [0.5, 1.0, 4.0]
    intervals = []
    for trainer.progress.step in (0, 8, 14):  # where the launch resumes
        intervals.append(run_facts(trainer, 0.0, "", "", ("here",)).checkpoint_interval)
    assert intervals == [8, 3, 2], "an epoch each"
    trainer.last_step = trainer.progress.step = 8
    assert run_facts(trainer, 0.0, "", "", ("here",)).global_size == 12, "that of the last update"
    trainer.close()
    assert FACTS.passes.samples(10) == 10 * FACTS.global_size
    board = Board(replace(FACTS, global_size=12, micro_size=6, micro_batches=2))
    board.apply(EventRecord(9, "batch_size", 0.0, {"before": 12, "now": 30}))
    assert (board.snapshot().facts.global_size, board.snapshot().facts.micro_batches) == (30, 5)


@pytest.mark.parametrize(
    ("changed", "path", "code"),
    [
        (
            {"batch": {"schedule": [*SCHEDULE, {"epoch": 3, "global_size": 60}]}},
            "batch.schedule",
            "batch-schedule-order",
        ),
        ({"batch": {"schedule": SCHEDULE[::-1]}}, "batch.schedule", "batch-schedule-order"),
        ({"run": {"epochs": 3}}, "batch.schedule", "batch-schedule-order"),
        ({"batch": {"schedule": [{"epoch": 1, "global_size": 5}]}}, "batch.schedule", "micro-above-global"),
        ({"batch": {"schedule": [{"epoch": 1, "global_size": 31}]}}, "batch.micro_size", "one-sample-left"),
        ({"batch": {"micro_size": "auto"}}, "batch.micro_size", "batch-schedule-micro"),
        ({"batch": {"dealing": "measured"}}, "batch.dealing", "batch-schedule-dealing"),
        (
            {"comm": {"op": "adasum", "reduction": "float"}, "noise": {"method": "none"}},
            "comm.op",
            "batch-schedule-adasum",
        ),
        ({"schedule": {"keep_updates": True}}, "schedule.keep_updates", "batch-schedule-updates"),
        ({"averaging": {"every_steps": None}}, "averaging.every_steps", "batch-schedule-averaging"),
        ({"noise": {"mix": 0.5, "passes": "one"}, "batch": {"global_size": 24}}, "noise.passes", "passes-unequal"),
    ],
)
def test_what_cannot_work_is_refused(changed: dict[str, Any], path: str, code: str) -> None:
    small_config(**SECTIONS)
    with raises_problems((path, code)):
        small_config(**sections(**changed))


@pytest.mark.parametrize("change", [{"epoch": 0, "global_size": 12}, {"epoch": 1}, {"epoch": 1, "global_size": 0}])
def test_a_change_has_an_epoch_after_the_first_and_a_size(change: dict[str, int]) -> None:
    with pytest.raises(ConfigError):
        small_config(**sections(batch={"schedule": [change]}))


def test_a_batch_above_the_training_samples_is_refused(tmp_path: Path) -> None:
    with raises(UsageError, "too-few-samples"):
        build_trainer(
            small_config(**sections(batch={"schedule": [{"epoch": 1, "global_size": 102}]})), tmp_path, SingleProcess()
        )
