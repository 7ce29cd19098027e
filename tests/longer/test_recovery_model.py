"""The recovery protocol in every interleaving of deaths, joins and stops, which takes minutes."""

from __future__ import annotations

import pytest

from tests.unit.recovery_model import Limits, explore


@pytest.mark.lengthy
def test_ranks_that_wait_for_others_agree_to_stop_in_every_interleaving() -> None:
    assert explore(2, Limits(2, deaths=1, joins=1, min_ranks=2, stops=True)) > 50_000


@pytest.mark.lengthy
@pytest.mark.parametrize("limits", [Limits(2, deaths=2, joins=0), Limits(2, deaths=1, joins=1)])
def test_three_ranks_agree_on_one_state_in_every_interleaving(limits: Limits) -> None:
    assert explore(3, limits) > 40_000
