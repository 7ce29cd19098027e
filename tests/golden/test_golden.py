"""Twenty recorded losses of a small float32 run."""

from __future__ import annotations

import json

import pytest

from tests.golden.regenerate import LOSSES, golden_losses


def test_twenty_losses_are_those_recorded() -> None:
    # Other makers' processors may round otherwise; a change of what is computed shows in the third digit at the latest.
    assert golden_losses() == pytest.approx(json.loads(LOSSES.read_text()), rel=1e-3)
