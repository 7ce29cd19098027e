"""Who takes whose state after a loss, what is redone, which records are kept."""

from __future__ import annotations

from dataclasses import replace

import pytest

from dist_train.checkpoint.state import Progress
from dist_train.cluster.communicator import Generation, GroupBrokenError, RendezvousRequestedError, broadcast_value
from dist_train.outcome import FaultError, UsageError
from dist_train.rundir.records import EventRecord, Record
from dist_train.training.recovery import (
    Interruption,
    RankState,
    RecentRecords,
    Recovery,
    SharedState,
    agree_on_recovery,
    assign_progress,
    plan_recovery,
)
from dist_train.training.trainer import LastUpdate
from tests.raising import raises
from tests.unit.records import evaluation, train
from tests.unit.simulated_ranks import SimulatedRanks, results


def rank(step: int, *, has_state: bool = True, is_complete: bool = True, is_writer: bool = False) -> RankState:
    return RankState(has_state, step, is_complete, is_writer)


def test_all_continue_from_the_newest_state_and_the_others_take_it() -> None:
    recovery = plan_recovery([rank(4, is_writer=True), rank(5, is_complete=False), rank(5), rank(0, has_state=False)])
    assert (recovery.source, recovery.receivers, recovery.is_step_complete) == (1, (0, 3), False)


def test_a_rank_that_joins_before_the_first_update_takes_the_state_of_the_others() -> None:
    recovery = plan_recovery([rank(0, has_state=False), rank(0)])
    assert (recovery.source, recovery.receivers) == (1, (0,))


def test_equal_ranks_take_nothing_and_redo_what_one_of_them_has_not_done() -> None:
    assert plan_recovery([rank(5, is_writer=True), rank(5)]).is_step_complete
    recovery = plan_recovery([rank(5, is_writer=True), rank(5, is_complete=False)])
    assert (recovery.receivers, recovery.is_step_complete) == ((), False)


def test_what_a_lost_rank_0_was_to_write_the_next_one_writes() -> None:
    assert not plan_recovery([rank(5), rank(5)]).is_step_complete


def test_what_rank_0_has_not_made_itself_it_has_not_written() -> None:
    assert not plan_recovery([rank(4, is_writer=True), rank(5)]).is_step_complete


def test_without_a_state_there_is_nothing_to_continue() -> None:
    with raises(FaultError, "rank-lost"):
        plan_recovery([rank(0, has_state=False)])


@pytest.mark.parametrize(
    ("joining", "code"), [((1, 8, 3, 0), "ranks-differ-in-settings"), ((1, 9, 3, 1), "ranks-differ-in-observers")]
)
def test_who_differs_cannot_join(joining: tuple[int, ...], code: str) -> None:
    def job(comm: SimulatedRanks) -> Recovery:
        is_first = comm.rank == 0
        return agree_on_recovery(comm, RankState(is_first, 0, True, is_first, (1, 9, 3, 0) if is_first else joining))

    with raises(UsageError, code):
        results(2, job)


def test_progress_and_the_last_update_travel_whole() -> None:
    progress = Progress(step=7, best_accuracy=0.1 + 0.2, loss_scale=2.0**16, grid_exponents=[20, 21])
    whole = SharedState(
        progress, 16, LastUpdate(replace(train(7), loss=0.1 + 0.2, gradient_norm=1e-300), False, 1, Progress(step=7))
    )
    none = SharedState(Progress(), 8, None)

    def job(comm: SimulatedRanks) -> SharedState:
        return broadcast_value(comm, whole if comm.rank == 1 else none, "state", 1)

    assert results(3, job) == [whole] * 3
    held = Progress()
    assign_progress(held, progress)
    assert held == progress


def test_a_record_counts_once() -> None:
    recent = RecentRecords(3)
    assert [recent.add(train(step)) for step in (1, 2, 2, 3)] == [True, True, False, True]
    assert [recent.add(EventRecord(3, "checkpoint", seconds, {})) for seconds in (0.0, 1.0)] == [True, False]
    assert [record.step for record in recent.all()] == [2, 3, 3]
    assert RecentRecords(0).add(train(1))


def test_who_joins_takes_the_records_of_the_others() -> None:
    before: list[Record] = [
        train(1, loss=0.1 + 0.2),
        evaluation(1),
        EventRecord(1, "checkpoint", 0.5, {"path": "step-00000001.pt"}),
    ]

    def job(comm: SimulatedRanks) -> list[Record]:
        recent = RecentRecords(100)
        for record in before if comm.rank == 1 else before[: comm.rank == 0]:
            recent.add(record)
        recent.share(comm, 1, takes=comm.rank == 2)
        return recent.all()

    assert results(3, job) == [before[:1], before, before]


def test_late_event_does_not_hide_a_repeated_record() -> None:
    recent = RecentRecords(100)
    assert [recent.add(record) for record in (train(10), EventRecord(8, "checkpoint", 0.0, {}), train(10))] == [
        True,
        True,
        False,
    ]


def generation(*lost: str, joined: tuple[str, ...] = (), report: str = "") -> Generation:
    return Generation(2, 0, 1, ("", 0), ("node",), lost, report, joined)


def test_a_loss_over_several_generations_is_one_event() -> None:
    comm = SimulatedRanks.__new__(SimulatedRanks)
    comm.size = 1
    interruption = Interruption()
    interruption.note(GroupBrokenError("gradient.0: reset"), update_is_redone=True)
    assert "reset" in interruption.why
    interruption.add(generation("rank 1 died"))
    interruption.note(GroupBrokenError("standings: reset"), update_is_redone=False)
    interruption.add(generation("rank 2 died", joined=("rank 1 (node, process 7)",)))
    (lost, details), (joined, more) = interruption.events(comm)
    assert (lost, details["who"], details["redone"]) == ("rank_lost", "rank 1 died; rank 2 died", 1)
    assert (joined, more["who"]) == ("rank_joined", "rank 1 (node, process 7)")
    assert list(interruption.events(comm)) == []


@pytest.mark.parametrize("error", [RendezvousRequestedError("ranks join"), GroupBrokenError("a rank does not come")])
def test_a_meeting_by_agreement_redoes_nothing(error: GroupBrokenError) -> None:
    comm = SimulatedRanks.__new__(SimulatedRanks)
    comm.size = 2
    interruption = Interruption()
    interruption.note(error, update_is_redone=True)
    interruption.add(generation(report=interruption.why))
    ((name, details),) = interruption.events(comm)
    assert (name, details["redone"]) == ("regrouped", int(type(error) is GroupBrokenError))
