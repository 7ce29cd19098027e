"""The protocol of recovery, every interleaving of it: no update is lost or mixed up, nobody hangs, all end alike."""

from __future__ import annotations

import pytest

from dist_train.cluster.membership import Decision, Event, Membership, P, decide
from tests.unit import recovery_model
from tests.unit.recovery_model import Limits, explore


@pytest.mark.parametrize("limits", [Limits(1, deaths=1, joins=0), Limits(2, deaths=1, joins=0)])
def test_two_ranks_end_in_one_state_whoever_dies_when(limits: Limits) -> None:
    assert explore(2, limits) > 200


@pytest.mark.parametrize("min_ranks", [1, 2])
def test_who_is_asked_to_stop_does_so_in_one_state_however_few_are_left(min_ranks: int) -> None:
    assert explore(2, Limits(2, deaths=1, joins=0, min_ranks=min_ranks, stops=True)) > 4_000


def test_three_ranks_end_in_one_state_whoever_dies_when() -> None:
    assert explore(3, Limits(1, deaths=1, joins=0)) > 5_000


@pytest.mark.parametrize(("size", "joins"), [(2, 0), (1, 1)])
def test_groups_that_break_though_nobody_is_lost_end_a_run_only_after_the_third(size: int, joins: int) -> None:
    assert explore(size, Limits(2, deaths=0, joins=joins, breaks=3)) > 500


def test_the_model_finds_a_rank_that_is_forgotten(monkeypatch: pytest.MonkeyPatch) -> None:
    def forgetful(state: Membership, event: Event[P], *args: P.args, **kwargs: P.kwargs) -> Decision:
        state, messages = decide(state, event, *args, **kwargs)
        return state, tuple(message for message in messages if message.kind != "end")

    monkeypatch.setattr(recovery_model, "decide", forgetful)
    with pytest.raises(AssertionError, match="hangs"):
        explore(2, Limits(2, deaths=0, joins=1))
