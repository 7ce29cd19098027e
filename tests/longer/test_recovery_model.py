"""The protocol of recovery among three ranks, every interleaving of deaths and joins: minutes of them."""

from __future__ import annotations

import pytest

from tests.unit.recovery_model import Limits, explore


@pytest.mark.lengthy
@pytest.mark.parametrize("limits", [Limits(2, deaths=2, joins=0), Limits(2, deaths=1, joins=1)])
def test_three_ranks_end_in_one_state_whoever_dies_and_joins_when(limits: Limits) -> None:
    assert explore(3, limits) > 50_000
