"""Twenty recorded losses of a small float32 run."""

from __future__ import annotations

import json

import pytest

from tests.golden.regenerate import LOSSES, golden_losses


def test_losses_are_those_recorded() -> None:
    # Other processors may round differently; a change of the computation shows in the third digit at the latest.
    assert golden_losses() == pytest.approx(json.loads(LOSSES.read_text()), rel=1e-3)
