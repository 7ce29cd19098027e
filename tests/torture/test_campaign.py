"""A short deterministic campaign like that of `make torture`."""

from __future__ import annotations

from pathlib import Path

import pytest

from tests.torture.campaign import Campaign
from tests.waiting import PATIENCE


@pytest.mark.ranks
@pytest.mark.lengthy
def test_nothing_is_lost_in_a_short_campaign(tmp_path: Path) -> None:
    messages: list[str] = []
    campaign = Campaign(tmp_path, seed=11, epochs=30, log=messages.append, patience=PATIENCE)
    campaign.run(faults=6, jobs=2)
    assert campaign.tally.hits >= 6
    assert not campaign.tally.details, "\n".join(campaign.tally.details)
    assert messages
